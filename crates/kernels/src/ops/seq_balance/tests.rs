use super::*;
use crate::testing::{assert_close, assert_same_bits, contexts, ctx, finite_difference, gpu, levels, normals};
use crate::{Buf, DType};
use hadal_numerics::Tolerance;

/// (E, K, lengths): V3 and V2-Lite, around a block, empty sequences at the ends and between, experts that fill no
/// vectors, no tokens, no sequences.
fn cases() -> Vec<(usize, usize, Vec<usize>)> {
    vec![
        (256, 8, vec![65, 3]),
        (64, 6, vec![64, 128, 1]),
        (7, 5, vec![0, 5, 0, 0, 63, 0]),
        (17, 16, vec![33]),
        (31, 9, vec![2, 18]),
        (33, 3, vec![80]),
        (2, 1, vec![1]),
        (4, 1, vec![0, 0]),
        (4, 2, vec![]),
    ]
}

/// Scores in (0, 1), as a sigmoid gives them.
fn scores(stream: u64, n: usize) -> Vec<f32> {
    normals(stream, n, 2.0).iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
}

fn run(ctx: &Ctx, scores: &[f32], experts: usize, top_k: usize, lengths: &[usize], weights: &[f32]) -> (Buf, Buf) {
    let mut cu = vec![0];
    lengths.iter().for_each(|&l| cu.push(cu[cu.len() - 1] + l as i32));
    let (mut loss, mut d) = (ctx.zeros(DType::F32, lengths.len()), ctx.zeros(DType::F32, scores.len()));
    forward_backward(
        ctx,
        SeqBalance {
            scores: ctx.from_f32(scores).view(),
            experts,
            top_k,
            cu: ctx.from_i32(&cu).view(),
            seq_weights: ctx.from_f32(weights).view(),
            loss: loss.view_mut(),
            d_scores: d.view_mut(),
        },
    );
    (loss, d)
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v.into()).collect()
}

#[test]
fn reference_gradient_is_the_difference_quotient() {
    let (experts, tokens) = (6, 4);
    let s = wide(&scores(1, experts * tokens));
    let f = reference::load(&s, experts, 2);
    finite_difference("d_scores", &s, &reference::gradient(&s, &f), |s| reference::loss(s, &f));
}

#[test]
fn every_device_matches_the_reference() {
    for ctx in levels() {
        for (experts, k, lengths) in cases() {
            let n: usize = lengths.iter().sum();
            let s = scores(2, n * experts);
            let weights = normals(3, lengths.len(), 1.0);
            let (loss, d) = run(&ctx, &s, experts, k, &lengths, &weights);
            let (mut losses, mut gradients, mut at) = (vec![], vec![], 0);
            for (&l, &w) in lengths.iter().zip(&weights) {
                let s = wide(&s[at * experts..(at + l) * experts]);
                at += l;
                if l == 0 {
                    losses.push(0.0);
                    continue;
                }
                let f = reference::load(&s, experts, k);
                losses.push(reference::loss(&s, &f));
                gradients.extend(reference::gradient(&s, &f).iter().map(|g| g * f64::from(w)));
            }
            assert_close("loss", &loss, &losses, Tolerance::F32_OP);
            assert_close("d_scores", &d, &gradients, Tolerance::F32_OP);
        }
    }
}

#[test]
fn known_values() {
    // Every expert used alike: the loss is 1. All tokens on one expert that has the share p: E / K * p.
    for ctx in levels() {
        let even = [[0.9, 0.1], [0.1, 0.9]].concat();
        assert_eq!(run(&ctx, &even, 2, 1, &[2], &[1.0]).0.view().to_f32(), [1.0]);
        let skewed = [[0.75, 0.25], [0.75, 0.25]].concat();
        assert_eq!(run(&ctx, &skewed, 2, 1, &[2], &[1.0]).0.view().to_f32(), [1.5]);
        // A tie counts for the lowest index: f = (2, 0), P = (1/2, 1/2), and the gradient moves share to the other.
        let (loss, d) = run(&ctx, &[0.5, 0.5], 2, 1, &[1], &[1.0]);
        assert_eq!((loss.view().to_f32(), d.view().to_f32()), (vec![1.0], vec![1.0, -1.0]));
    }
}

/// Where every token takes every expert nothing can be balanced: f = 1, the loss is 1, its gradient zero but for
/// rounding.
#[test]
fn all_experts_chosen() {
    for ctx in levels() {
        for (experts, tokens) in [(7, 63), (1, 3)] {
            let (loss, d) = run(&ctx, &scores(5, experts * tokens), experts, experts, &[tokens], &[1.0]);
            assert!((loss.view().to_f32()[0] - 1.0).abs() < 1e-6);
            assert!(d.view().to_f32().iter().all(|d| d.abs() < 1e-12));
        }
    }
}

#[test]
fn a_token_without_scores_is_left_out_and_a_broken_one_is_seen() {
    for ctx in levels() {
        let (loss, d) = run(&ctx, &[0.0, 0.0, 0.75, 0.25], 2, 1, &[2], &[1.0]);
        assert_eq!(loss.view().to_f32(), [0.75]);
        assert_eq!(d.view().to_f32()[..2], [0.0, 0.0]);
        let (loss, _) = run(&ctx, &[f32::NAN, 0.0, 0.75, 0.25], 2, 1, &[1, 1], &[1.0; 2]);
        assert!(loss.view().to_f32()[0].is_nan());
        assert_eq!(loss.view().to_f32()[1], 1.5);
    }
}

#[test]
fn same_bits_for_any_thread_count_and_any_neighbours() {
    let (experts, k, lengths) = (32, 4, [70, 200, 1]);
    let s = scores(4, 271 * experts);
    let (loss, d) = run(&ctx(), &s, experts, k, &lengths, &[1.0, 2.0, 3.0]);
    for c in contexts() {
        let (l, g) = run(&c, &s, experts, k, &lengths, &[1.0, 2.0, 3.0]);
        assert_same_bits("loss", &l, &loss);
        assert_same_bits("d_scores", &g, &d);
    }
    let own = 70 * experts..270 * experts;
    for ctx in [ctx()].into_iter().chain(gpu()) {
        let (loss, d) = run(&ctx, &s, experts, k, &lengths, &[1.0, 2.0, 3.0]);
        let (l, g) = run(&ctx, &s[own.clone()], experts, k, &[200], &[2.0]);
        assert_eq!(l.view().to_f32()[0].to_bits(), loss.view().to_f32()[1].to_bits());
        assert_eq!(g.view().to_f32(), d.view().to_f32()[own.clone()]);
    }
}

#[test]
#[should_panic(expected = "offsets 0..2 (ascending: true) for 3 tokens")]
fn tokens_outside_every_sequence_are_refused() {
    run(&ctx(), &[0.5; 6], 2, 1, &[2], &[1.0]);
}
