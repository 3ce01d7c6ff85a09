//! Attention of MLA in its multi-head form, for training and prefill: tiled (no T x T buffer), varlen, causal,
//! unequal head dims. Query head = [P nope | R rope], key head = [P from kv_up | R shared k_pe], value head = W.
//! score = (q . k) * scale in f32, softmax in f32; probabilities and products are summed in f32, outputs rounded once.
//! How keys are split into tiles depends on that sequence's length alone: one sequence alone equals the same among
//! others, to the bit.

use crate::{Ctx, View, ViewMut};

/// Sizes shared by forward and backward.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// H.
    pub heads: usize,
    /// P, qk_nope_head_dim.
    pub nope: usize,
    /// R, qk_rope_head_dim.
    pub rope: usize,
    /// W, v_head_dim.
    pub v: usize,
    /// Elements from one token's k_pe to the next (>= R): k_pe may be the tail of kv_a's rows.
    pub k_pe_stride: usize,
    /// Softmax scale (YaRN's m^2 included).
    pub scale: f32,
}

/// Inputs of both directions. Sequence s has queries cu_q[s]..cu_q[s+1] and keys cu_k[s]..cu_k[s+1]; causal, aligned
/// at the end: query i of q_len sees keys 0 ..= k_len - q_len + i.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// [Nq, H, P + R], rotated.
    pub q: View<'a>,
    /// [Nk, H, P + W]: per head k_nope then v (kv_b_proj's output).
    pub kv_up: View<'a>,
    /// [Nk, R] with rows `k_pe_stride` apart, rotated.
    pub k_pe: View<'a>,
    /// i32 [S + 1].
    pub cu_q: View<'a>,
    /// i32 [S + 1].
    pub cu_k: View<'a>,
}

/// out [Nq, H, W] and lse f32 [Nq, H] (natural log of the sum of exp of the scaled scores). A query that sees no key
/// gets zeros and -inf.
pub fn forward(ctx: &Ctx, shape: Shape, x: Inputs<'_>, out: ViewMut<'_>, lse: ViewMut<'_>) {
    todo!()
}

/// What backward reads beside the inputs, and what it writes.
#[derive(Debug)]
pub struct Backward<'a> {
    /// [Nq, H, W], the forward's.
    pub out: View<'a>,
    /// f32 [Nq, H], the forward's.
    pub lse: View<'a>,
    /// [Nq, H, W].
    pub dout: View<'a>,
    /// [Nq, H, P + R], overwritten.
    pub dq: ViewMut<'a>,
    /// [Nk, H, P + W], overwritten.
    pub dkv_up: ViewMut<'a>,
    /// [Nk, R] with rows `dk_pe_stride` apart, overwritten: heads are summed in order.
    pub dk_pe: ViewMut<'a>,
    /// Elements from one row of dk_pe to the next (>= R).
    pub dk_pe_stride: usize,
}

/// Gradients of q, kv_up and k_pe; deterministic.
pub fn backward(ctx: &Ctx, shape: Shape, x: Inputs<'_>, b: Backward<'_>) {
    todo!()
}
