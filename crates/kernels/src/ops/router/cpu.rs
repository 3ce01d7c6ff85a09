//! The gate on the cores, in fixed blocks of tokens; a token's result depends on its own row alone.

use super::select::{Rule, select};
use super::{Backward, Config, Forward, Scoring};
use crate::Cpu;
use crate::isa::{Isa, vectorised};
use crate::math::{exp, sigmoid};

/// Tokens of one task.
const BLOCK: usize = 64;
/// Tokens whose scores are summed at once.
const SUMS: usize = 8;
/// Independent maxima over a token's experts.
const LANES: usize = 16;
/// Added to the chosen scores' sum, as the published models do.
const NORM_EPS: f32 = 1e-20;

/// Scores, choice and weights.
pub fn forward(cpu: &Cpu, c: &Config, a: Forward<'_>) {
    let (experts, k) = (c.experts, c.top_k);
    let (logits, bias, given) = (a.logits.f32(), a.bias.map(|b| b.f32()), a.given.map(|g| g.i32()));
    if let Some(given) = given {
        check_indices("given", given, c);
    }
    let mut blocks: Vec<_> = (a.scores.f32().chunks_mut(BLOCK * experts))
        .zip(a.indices.i32().chunks_mut(BLOCK * k))
        .zip(a.weights.f32().chunks_mut(BLOCK * k))
        .collect();
    cpu.chunks_mut(&mut blocks, 1, |b, block| {
        let ((scores, chosen), weights) = &mut block[0];
        score(cpu.isa(), c, &logits[b * BLOCK * experts..][..scores.len()], scores);
        match given {
            Some(given) => chosen.copy_from_slice(&given[b * BLOCK * k..][..chosen.len()]),
            None => select(cpu.isa(), &Rule::from(c), scores, bias, chosen),
        }
        weigh(cpu.isa(), c, scores, chosen, weights);
    });
}

fn check_indices(name: &str, indices: &[i32], c: &Config) {
    for (slot, &e) in indices.iter().enumerate() {
        assert!(
            e >= 0 && (e as usize) < c.experts,
            "router: {name} index [{}, {}] is {e}, expected one of {} experts",
            slot / c.top_k,
            slot % c.top_k,
            c.experts
        );
    }
}

vectorised! {
    fn score(isa: Isa, c: &Config, logits: &[f32], scores: &mut [f32]) {
        if c.scoring == Scoring::Sigmoid {
            return scores.iter_mut().zip(logits).for_each(|(s, &x)| *s = sigmoid(x));
        }
        let whole = logits.len() - logits.len() % (SUMS * c.experts);
        let ((scores, rest), (logits, last)) = (scores.split_at_mut(whole), logits.split_at(whole));
        for (scores, logits) in scores.chunks_exact_mut(SUMS * c.experts).zip(logits.chunks_exact(SUMS * c.experts)) {
            softmax::<SUMS>(c.experts, logits, scores);
        }
        for (scores, logits) in rest.chunks_exact_mut(c.experts).zip(last.chunks_exact(c.experts)) {
            softmax::<1>(c.experts, logits, scores);
        }
    }
}

/// Of N tokens. In a sum in the order of its experts each addition waits for the one before: sums are taken side by side.
#[inline(always)]
fn softmax<const N: usize>(experts: usize, logits: &[f32], scores: &mut [f32]) {
    for (scores, logits) in scores.chunks_exact_mut(experts).zip(logits.chunks_exact(experts)) {
        let largest = largest(logits);
        scores.iter_mut().zip(logits).for_each(|(s, &x)| *s = exp(x - largest));
    }
    let rows: [_; N] = std::array::from_fn(|r| &scores[r * experts..][..experts]);
    let mut sums = [0.0; N];
    for e in 0..experts {
        (0..N).for_each(|r| sums[r] += rows[r][e]);
    }
    for (scores, sum) in scores.chunks_exact_mut(experts).zip(sums) {
        scores.iter_mut().for_each(|s| *s /= sum);
    }
}

/// The largest element but for NaN.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let larger = |a, b| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        (0..LANES).for_each(|l| lanes[l] = larger(lanes[l], chunk[l]));
    }
    lanes.into_iter().chain(tail.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// What the chosen scores are divided by.
#[inline(always)]
fn normaliser(c: &Config, chosen: impl Iterator<Item = f32>) -> f32 {
    if c.norm_topk_prob { chosen.sum::<f32>() + NORM_EPS } else { 1.0 }
}

vectorised! {
    fn weigh(isa: Isa, c: &Config, scores: &[f32], chosen: &[i32], weights: &mut [f32]) {
        // What each is divided by. Division waits until all are there, and is then of vectors.
        let mut by = vec![0.0; weights.len()];
        let tokens = scores.chunks_exact(c.experts).zip(chosen.chunks_exact(c.top_k));
        let places = weights.chunks_exact_mut(c.top_k).zip(by.chunks_exact_mut(c.top_k));
        for ((scores, chosen), (weights, by)) in tokens.zip(places) {
            weights.iter_mut().zip(chosen).for_each(|(w, &e)| *w = scores[e as usize]);
            by.fill(normaliser(c, weights.iter().copied()));
        }
        weights.iter_mut().zip(by).for_each(|(w, by)| *w = *w / by * c.scale);
    }
}

/// Gradient of the logits.
pub fn backward(cpu: &Cpu, c: &Config, a: Backward<'_>) {
    let (experts, k) = (c.experts, c.top_k);
    let (scores, indices, d_weights) = (a.scores.f32(), a.indices.i32(), a.d_weights.f32());
    let d_scores = a.d_scores.map(|d| d.f32());
    check_indices("forward's", indices, c);
    cpu.chunks_mut(a.d_logits.f32(), BLOCK * experts, |b, block| {
        for (r, d) in block.chunks_exact_mut(experts).enumerate() {
            let n = b * BLOCK + r;
            match d_scores {
                Some(d_scores) => d.copy_from_slice(&d_scores[n * experts..][..experts]),
                None => d.fill(0.0),
            }
            let scores = &scores[n * experts..][..experts];
            add_weight_gradient(c, scores, &indices[n * k..][..k], &d_weights[n * k..][..k], d);
            score_backward(cpu.isa(), c.scoring, scores, d);
        }
    });
}

/// d_scores += the gradient through the weights. With w_k = scale s_k / Z and Z the sum of the chosen scores:
/// ds_k = scale / Z (dw_k - sum_j dw_j s_j / Z).
fn add_weight_gradient(c: &Config, scores: &[f32], chosen: &[i32], d_weights: &[f32], d_scores: &mut [f32]) {
    let z = normaliser(c, chosen.iter().map(|&e| scores[e as usize]));
    let through_z = if c.norm_topk_prob {
        chosen.iter().zip(d_weights).map(|(&e, dw)| dw * (scores[e as usize] / z)).sum()
    } else {
        0.0
    };
    for (&e, dw) in chosen.iter().zip(d_weights) {
        d_scores[e as usize] += c.scale / z * (dw - through_z);
    }
}

vectorised! {
    /// Turns d_scores into d_logits, in place.
    fn score_backward(isa: Isa, by: Scoring, scores: &[f32], d: &mut [f32]) {
        match by {
            Scoring::Sigmoid => d.iter_mut().zip(scores).for_each(|(d, s)| *d *= s * (1.0 - s)),
            Scoring::Softmax => {
                let mean: f32 = d.iter().zip(scores).map(|(d, s)| d * s).sum();
                d.iter_mut().zip(scores).for_each(|(d, s)| *d = s * (*d - mean));
            }
        }
    }
}
