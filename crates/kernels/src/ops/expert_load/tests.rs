use super::*;
use crate::DType;
use crate::ops::moe_permute;
use crate::testing::{ctx, levels};
use hadal_numerics::{Purpose, Rng};

#[test]
fn micro_batches_add_up() {
    for ctx in levels() {
        // Below, at and past a block of threads; experts that nobody chooses.
        for experts in [1, 7, 256, 300] {
            let mut counts = ctx.zeros(DType::I32, experts);
            let mut all = Vec::new();
            for (batch, n) in [500, 0, 77].into_iter().enumerate() {
                let rng = Rng::new(1, Purpose::Test, batch as u64);
                let indices: Vec<i32> = (0..n).map(|i| rng.below(i, experts as u64) as i32).collect();
                let [mut offsets, mut rows, mut slots] =
                    [experts + 1, indices.len(), indices.len()].map(|n| ctx.zeros(DType::I32, n));
                let (o, r, s) = (offsets.view_mut(), rows.view_mut(), slots.view_mut());
                moe_permute::plan(&ctx, ctx.from_i32(&indices).view(), experts, o, r, s);
                add(&ctx, offsets.view(), counts.view_mut());
                all.extend(indices);
            }
            assert_eq!(counts.view().to_i32(), reference::load(&all, experts));
        }
    }
}

#[test]
#[should_panic(expected = "offsets of 2 experts")]
fn offsets_of_another_gate_are_refused() {
    let ctx = ctx();
    add(&ctx, ctx.from_i32(&[0, 1]).view(), ctx.zeros(DType::I32, 2).view_mut());
}
