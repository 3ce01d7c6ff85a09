use super::*;
use crate::Buf;
use crate::testing::{assert_close, contexts, ctx, gpu, levels, normals};
use hadal_numerics::Tolerance;

/// Lengths of tensors in arena order: none, one, around a block and a lane, and some blocks.
const LENGTHS: [usize; 9] = [1, 0, 15, 16_384, 16_385, 3, 50_001, 16_383, 17];

fn arena(scale: f32) -> (Vec<f32>, Vec<Range<usize>>) {
    let mut at = 0;
    // A gap of 7 between tensors, as alignment leaves one.
    let tensors: Vec<_> = LENGTHS
        .iter()
        .map(|&n| {
            let range = at..at + n;
            at = range.end + 7;
            range
        })
        .collect();
    (normals(1, at, scale), tensors)
}

fn run(ctx: &Ctx, grad: &[f32], tensors: &[Range<usize>]) -> Buf {
    let mut out = ctx.zeros(crate::DType::F32, 1);
    norm(ctx, ctx.from_f32(grad).view(), tensors, out.view_mut());
    out
}

fn expected(grad: &[f32], tensors: &[Range<usize>]) -> f64 {
    reference::norm(&grad.iter().map(|&g| g.into()).collect::<Vec<_>>(), tensors)
}

#[test]
fn every_device_matches_the_reference() {
    for ctx in levels() {
        // The largest scale overflows f32 squares; the smallest makes them vanish.
        for scale in [1.0, 1e-30, 1e30] {
            let (grad, tensors) = arena(scale);
            for n in 0..=tensors.len() {
                let found = run(&ctx, &grad, &tensors[..n]);
                assert_close(
                    "norm",
                    &found,
                    &[expected(&grad, &tensors[..n])],
                    Tolerance { element: 1e-7, cosine: 1e-9 },
                );
            }
        }
    }
}

#[test]
fn elements_between_tensors_do_not_count() {
    let grad = [3.0, f32::NAN, 4.0, f32::INFINITY];
    for ctx in levels() {
        assert_eq!(run(&ctx, &grad, &[0..1, 2..3]).view().to_f32(), [5.0]);
    }
}

#[test]
fn a_broken_gradient_is_seen() {
    for ctx in levels() {
        let norm = |second| run(&ctx, &[1.0, second], &[0..1, 1..2]).view().to_f32()[0];
        assert!(norm(f32::NAN).is_nan());
        assert_eq!(norm(f32::NEG_INFINITY), f32::INFINITY);
    }
}

#[test]
fn same_bits_for_any_thread_count_and_any_place_in_the_arena() {
    let (grad, tensors) = arena(1.0);
    let bits = |ctx: &Ctx, grad: &[f32], tensors: &[Range<usize>]| run(ctx, grad, tensors).view().to_f32()[0].to_bits();
    let all: Vec<u32> = contexts().iter().map(|c| bits(c, &grad, &tensors)).collect();
    assert!(all.iter().all(|&b| b == all[0]), "{all:?}");
    for ctx in [ctx()].into_iter().chain(gpu()) {
        let here = bits(&ctx, &grad, &tensors);
        for by in [0, 4, 5] {
            let mut moved = vec![1.0; by];
            moved.extend(&grad);
            let shifted: Vec<_> = tensors.iter().map(|t| t.start + by..t.end + by).collect();
            assert_eq!(bits(&ctx, &moved, &shifted), here);
        }
    }
}

#[test]
#[should_panic(expected = "tensor 1..4 of 3 gradients")]
fn a_tensor_past_the_end_is_refused() {
    run(&ctx(), &[1.0; 3], &[0..1, 1..4]);
}
