//! The balance loss on a GPU, in three launches. Offsets are read on the device: that they fit the tokens is checked
//! only where they lie in host memory.

use super::SeqBalance;
use crate::DType::{F32, I32};
use crate::cuda::{Cuda, Grid, Source, Value::Int, args, source};
use crate::ops::launch::int;

static SOURCE: Source = source!("seq_balance.cu");
/// Tokens of a block in the first launch.
const TOKENS: usize = 64;
/// Tokens of a block in the last.
const WARPS: usize = 8;

/// Losses and gradient.
pub(super) fn forward_backward(cuda: &Cuda, mut a: SeqBalance<'_>) {
    let (experts, sequences) = (a.experts, a.seq_weights.len());
    let n = a.scores.len() / experts;
    assert!(experts <= 1024, "seq_balance: {experts} experts: at most 1024 on a GPU");
    // No sequence has more blocks than its share of these.
    let blocks = n / TOKENS + sequences;
    let counts = cuda.empty(I32, blocks * experts);
    // Pairs of words that hold one f64.
    let [shares, f] = [blocks, sequences].map(|rows| cuda.empty(F32, 2 * rows * experts));
    let defines = [("EXPERTS", Int(experts as i64)), ("TOP_K", Int(a.top_k as i64))];
    let kernel = |name| cuda.kernel(&SOURCE, name, &defines);
    let grid = |blocks: usize, threads| Grid::new([blocks as u32, 1, 1], threads);
    let (scores, cu) = (a.scores.typed_ptr(F32), a.cu.typed_ptr(I32));
    let (counts, shares, f) = (counts.view().ptr(), shares.view().ptr(), f.view().ptr());
    if n > 0 {
        let args = args![scores, cu, int(sequences), counts, shares];
        cuda.launch(&kernel("seq_tally"), grid(blocks, 256), &args);
    }
    cuda.launch(&kernel("seq_loss"), grid(sequences, 1024), &args![cu, counts, shares, f, a.loss.typed_ptr(F32)]);
    let (weights, d_scores) = (a.seq_weights.typed_ptr(F32), a.d_scores.typed_ptr(F32));
    let args = args![scores, cu, f, weights, d_scores, int(n), int(sequences)];
    cuda.launch(&kernel("seq_gradient"), grid(n.div_ceil(WARPS), 32 * WARPS as u32), &args);
}
