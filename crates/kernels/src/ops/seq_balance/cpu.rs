//! The balance loss on the cores: counts and shares per block of tokens, blocks combined in order, then the gradient
//! block by block. Blocks are counted from each sequence's start, so that its bits do not depend on its neighbours.

use super::SeqBalance;
use crate::Cpu;
use crate::isa::{Isa, vectorised};
use crate::ops::router::{Rule, select};
use std::ops::Range;

/// Tokens of one task.
const BLOCK: usize = 64;
/// Independent sums over a token's experts.
const LANES: usize = 8;

/// Some tokens of one sequence.
struct Block {
    sequence: usize,
    tokens: Range<usize>,
}

/// Losses and gradient.
pub fn forward_backward(cpu: &Cpu, a: SeqBalance<'_>) {
    let (scores, experts, seq_weights) = (a.scores.f32(), a.experts, a.seq_weights.f32());
    let cu = offsets(a.cu.i32(), scores.len() / experts);
    let blocks = cut(&cu);
    let (counts, shares) = tally(cpu, scores, experts, a.top_k, &blocks);
    let f = loads(&cu, &blocks, &counts, experts, a.top_k);
    sum_losses(&cu, &blocks, &shares, &f, experts, a.loss.f32());
    let mut rest = a.d_scores.f32();
    let mut parts = Vec::with_capacity(blocks.len());
    for block in &blocks {
        let (part, tail) = rest.split_at_mut(block.tokens.len() * experts);
        parts.push((block, part));
        rest = tail;
    }
    cpu.chunks_mut(&mut parts, 1, |_, part| {
        let (block, d) = &mut part[0];
        let s = block.sequence;
        let factor = f64::from(seq_weights[s]) / (cu[s + 1] - cu[s]) as f64;
        let rows = &scores[block.tokens.start * experts..][..d.len()];
        gradient(cpu.isa(), rows, &f[s * experts..][..experts], factor, d);
    });
}

fn offsets(cu: &[i32], tokens: usize) -> Vec<usize> {
    let ordered = cu.windows(2).all(|w| w[0] <= w[1]);
    let (first, last) = (cu[0], cu[cu.len() - 1]);
    assert!(
        ordered && first == 0 && last as usize == tokens,
        "seq_balance: offsets {first}..{last} (ascending: {ordered}) for {tokens} tokens"
    );
    cu.iter().map(|&x| x as usize).collect()
}

fn cut(cu: &[usize]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (sequence, w) in cu.windows(2).enumerate() {
        for start in (w[0]..w[1]).step_by(BLOCK) {
            blocks.push(Block { sequence, tokens: start..w[1].min(start + BLOCK) });
        }
    }
    blocks
}

/// Per block and expert: how often it is chosen, and the sum of its share of each token's scores.
fn tally(cpu: &Cpu, scores: &[f32], experts: usize, k: usize, blocks: &[Block]) -> (Vec<u32>, Vec<f64>) {
    let mut counts = vec![0u32; blocks.len() * experts];
    let mut shares = vec![0.0f64; blocks.len() * experts];
    let rule = Rule::of_all(experts, k);
    cpu.chunks2_mut((&mut counts, experts), (&mut shares, experts), |b, counts, shares| {
        let tokens = &blocks[b].tokens;
        let rows = &scores[tokens.start * experts..tokens.end * experts];
        let mut chosen = vec![0i32; tokens.len() * k];
        select(cpu.isa(), &rule, rows, None, &mut chosen);
        chosen.iter().for_each(|&e| counts[e as usize] += 1);
        add_shares(cpu.isa(), rows, shares);
    });
    (counts, shares)
}

vectorised! {
    fn add_shares(isa: Isa, rows: &[f32], shares: &mut [f64]) {
        for row in rows.chunks_exact(shares.len()) {
            let inverse = inverse_sum(row);
            shares.iter_mut().zip(row).for_each(|(share, &s)| *share += f64::from(s) * inverse);
        }
    }
}

/// 1 / the sum of a token's scores; 0 where all are zero.
#[inline(always)]
fn inverse_sum(row: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f64::from(chunk[i]);
        }
    }
    lanes.iter_mut().zip(tail).for_each(|(lane, &x)| *lane += f64::from(x));
    let z: f64 = lanes.iter().sum();
    if z == 0.0 { 0.0 } else { 1.0 / z }
}

#[inline(always)]
fn dot(f: &[f64], row: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((f, f_tail), (row, row_tail)) = (f.as_chunks::<LANES>(), row.as_chunks::<LANES>());
    for (f, row) in f.iter().zip(row) {
        for i in 0..LANES {
            lanes[i] += f[i] * f64::from(row[i]);
        }
    }
    lanes.iter_mut().zip(f_tail.iter().zip(row_tail)).for_each(|(lane, (f, &x))| *lane += f * f64::from(x));
    lanes.iter().sum()
}

/// f `[S, E]`.
fn loads(cu: &[usize], blocks: &[Block], counts: &[u32], experts: usize, k: usize) -> Vec<f64> {
    let mut total = vec![0u64; (cu.len() - 1) * experts];
    for (block, counts) in blocks.iter().zip(counts.chunks_exact(experts)) {
        let of_sequence = &mut total[block.sequence * experts..][..experts];
        of_sequence.iter_mut().zip(counts).for_each(|(t, &c)| *t += u64::from(c));
    }
    let mut f = Vec::with_capacity(total.len());
    for (s, total) in total.chunks_exact(experts).enumerate() {
        // An empty sequence has only zeros, which stay so.
        let tokens = (cu[s + 1] - cu[s]).max(1);
        f.extend(total.iter().map(|&t| experts as f64 / (k * tokens) as f64 * t as f64));
    }
    f
}

/// L_s = sum over its blocks, in order, of f . shares / T.
fn sum_losses(cu: &[usize], blocks: &[Block], shares: &[f64], f: &[f64], experts: usize, loss: &mut [f32]) {
    let mut sums = vec![0.0f64; loss.len()];
    for (block, shares) in blocks.iter().zip(shares.chunks_exact(experts)) {
        let f = &f[block.sequence * experts..][..experts];
        sums[block.sequence] += f.iter().zip(shares).map(|(f, p)| f * p).sum::<f64>();
    }
    for (s, (loss, sum)) in loss.iter_mut().zip(sums).enumerate() {
        *loss = (sum / (cu[s + 1] - cu[s]).max(1) as f64) as f32;
    }
}

vectorised! {
    /// Each token's d_scores = factor (f_j / Z - sum_i f_i s_i / Z^2).
    fn gradient(isa: Isa, rows: &[f32], f: &[f64], factor: f64, d: &mut [f32]) {
        for (d, row) in d.chunks_exact_mut(f.len()).zip(rows.chunks_exact(f.len())) {
            let inverse = inverse_sum(row);
            let mean = dot(f, row) * inverse;
            let factor = factor * inverse;
            d.iter_mut().zip(f).for_each(|(d, f)| *d = (factor * (f - mean)) as f32);
        }
    }
}
