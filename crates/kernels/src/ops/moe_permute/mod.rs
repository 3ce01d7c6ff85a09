//! Tokens to expert order and back. A slot is `n * K + k`: token n's k-th expert. Rows are sorted by expert, and by slot
//! within an expert. Sums over a token's experts are taken in slot order k = 0, 1, ..., in f32, never in arrival order.

use crate::{Ctx, View, ViewMut};

/// From the choice i32 [N, K]: `offsets` i32 [E + 1] (rows of each expert), `row_of_slot` i32 [N * K] and its inverse
/// `slot_of_row` i32 [N * K].
pub fn plan(
    ctx: &Ctx,
    indices: View<'_>,
    experts: usize,
    offsets: ViewMut<'_>,
    row_of_slot: ViewMut<'_>,
    slot_of_row: ViewMut<'_>,
) {
    todo!()
}

/// rows[r, D] = x[slot_of_row[r] / K].
pub fn permute(ctx: &Ctx, x: View<'_>, dim: usize, top_k: usize, slot_of_row: View<'_>, rows: ViewMut<'_>) {
    todo!()
}

/// dx[n, D] (+)= sum over k of d_rows[row_of_slot[n * K + k]].
pub fn permute_backward(
    ctx: &Ctx,
    d_rows: View<'_>,
    dim: usize,
    top_k: usize,
    row_of_slot: View<'_>,
    dx: ViewMut<'_>,
    accumulate: bool,
) {
    todo!()
}

/// y[n, D] = base[n] + sum over k of weights[n, k] * rows[row_of_slot[n * K + k]] + extra[n], in f32 in that order
/// (extra: the shared experts' output), rounded once. base and extra are optional; weights f32 [N, K].
#[derive(Debug)]
pub struct Combine<'a> {
    /// [N * K, D] in expert order.
    pub rows: View<'a>,
    /// D.
    pub dim: usize,
    /// K.
    pub top_k: usize,
    /// i32 [N * K].
    pub row_of_slot: View<'a>,
    /// f32 [N, K].
    pub weights: View<'a>,
    /// [N, D]: the residual stream.
    pub base: Option<View<'a>>,
    /// [N, D]: the shared experts' output.
    pub extra: Option<View<'a>>,
    /// [N, D].
    pub y: ViewMut<'a>,
}

/// See [`Combine`].
pub fn combine(ctx: &Ctx, a: Combine<'_>) {
    todo!()
}

/// d_rows[r] = weights[slot] * dy[n] and d_weights[slot] = dy[n] . rows[r] with slot = slot_of_row[r], n = slot / K.
pub fn combine_backward(
    ctx: &Ctx,
    dy: View<'_>,
    dim: usize,
    top_k: usize,
    slot_of_row: View<'_>,
    weights: View<'_>,
    rows: View<'_>,
    d_rows: ViewMut<'_>,
    d_weights: ViewMut<'_>,
) {
    todo!()
}
