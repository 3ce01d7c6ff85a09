//! The output head fused with what losses need of it. Logits exist one slice of the vocabulary at a time, never whole:
//! z = hidden W^T / temperature; logp = z[target] - lse; entropy = lse - sum_j p_j z_j; plus, on request, the
//! log-probabilities at G given ids per token and the K most likely ids. Softmax and sums are f32 (f64 where sums are
//! long), in a fixed order that does not depend on the batch. A target of -1 means none: logp is 0 and gets no gradient.
//!
//! The backward pass takes the gradient of each output, so that a loss is a weighted sum chosen by the caller:
//! dz_j = d_logp (1[j = target] - p_j) - d_entropy p_j (z_j - lse + entropy) + sum_g d_given_g (1[j = given_g] - p_j).

use crate::{Ctx, View, ViewMut, Weight};

/// What both directions read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// [N, D].
    pub hidden: View<'a>,
    /// [V, D].
    pub weight: Weight<'a>,
    /// i32 [N], -1 for none.
    pub targets: View<'a>,
    /// Logits are divided by this (> 0).
    pub temperature: f32,
    /// i32 [N, G] ids in 0..V.
    pub given: Option<View<'a>>,
}

/// What forward writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// f32 [N]: log-sum-exp of z; backward reads it.
    pub lse: ViewMut<'a>,
    /// f32 [N].
    pub logp: ViewMut<'a>,
    /// f32 [N], nats.
    pub entropy: ViewMut<'a>,
    /// f32 [N, G]; required when ids are given.
    pub given_logp: Option<ViewMut<'a>>,
    /// (i32 [N, K], f32 [N, K]): ids and log-probabilities of the K most likely, descending, ties to the lowest id.
    pub top: Option<(ViewMut<'a>, ViewMut<'a>)>,
}

/// Log-probabilities, entropy and top-k without ever forming all logits.
pub fn forward(ctx: &Ctx, x: Inputs<'_>, out: Outputs<'_>) {
    todo!()
}

/// What backward reads and writes. The weight's gradient may be computed later and apart from the input's
/// (deferral): either output may be absent, and the bits of each do not depend on the other's presence.
#[derive(Debug)]
pub struct Backward<'a> {
    /// f32 [N], the forward's.
    pub lse: View<'a>,
    /// f32 [N], the forward's (read only if `d_entropy` is given).
    pub entropy: View<'a>,
    /// f32 [N].
    pub d_logp: View<'a>,
    /// f32 [N].
    pub d_entropy: Option<View<'a>>,
    /// f32 [N, G].
    pub d_given: Option<View<'a>>,
    /// [N, D], overwritten.
    pub d_hidden: Option<ViewMut<'a>>,
    /// f32 [V, D], accumulated into.
    pub d_weight: Option<ViewMut<'a>>,
}

/// Gradients of hidden and weight; logits are recomputed slice by slice.
pub fn backward(ctx: &Ctx, x: Inputs<'_>, b: Backward<'_>) {
    todo!()
}
