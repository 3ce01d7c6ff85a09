use super::*;
use crate::testing::{ctx, levels, normals};
use hadal_numerics::{Purpose, Rng};

#[test]
fn every_device_matches_the_reference() {
    for ctx in levels() {
        // One expert, few, past a block of threads; small loads, where many are at the mean, and sums past 2^31.
        for (experts, largest) in [(1, 9), (4, 3), (64, 3), (256, 2), (300, 1 << 30), (7, 1 << 31)] {
            let rng = Rng::new(1, Purpose::Test, experts);
            let load: Vec<i32> = (0..experts).map(|e| rng.below(e, largest) as i32).collect();
            let bias = normals(2, load.len(), 0.1);
            let mut found = ctx.from_f32(&bias);
            step(&ctx, ctx.from_i32(&load).view(), 1e-3, found.view_mut());
            let wide: Vec<i64> = load.iter().map(|&l| l.into()).collect();
            assert_eq!(found.view().to_f32(), reference::step(&wide, 1e-3, &bias), "{experts} experts");
        }
    }
}

#[test]
fn a_mean_between_integers_has_nobody_at_it() {
    for ctx in levels() {
        let mut bias = ctx.from_f32(&[0.5; 4]);
        step(&ctx, ctx.from_i32(&[2, 1, 1, 1]).view(), 0.25, bias.view_mut());
        assert_eq!(bias.view().to_f32(), [0.25, 0.75, 0.75, 0.75]);
        // Equal loads, and none at all, change nothing.
        for load in [[3; 4], [0; 4]] {
            step(&ctx, ctx.from_i32(&load).view(), 0.25, bias.view_mut());
            assert_eq!(bias.view().to_f32(), [0.25, 0.75, 0.75, 0.75]);
        }
    }
}

#[test]
#[should_panic(expected = "loads and biases of a gate")]
fn another_gate_is_refused() {
    let ctx = ctx();
    step(&ctx, ctx.from_i32(&[1, 2]).view(), 0.1, ctx.from_f32(&[0.0]).view_mut());
}
