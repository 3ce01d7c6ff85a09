//! Tokens to expert order and back. A slot is `n * K + k`: token n's k-th expert. Rows are sorted by expert, and by
//! slot within an expert. An expert without tokens has no rows. Sums over a token's experts are taken in slot order k =
//! 0, 1, ..., in f32, never in arrival order.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::sizes::sizes;
use crate::{Ctx, Device, Elem, View, ViewMut};

/// From the choice i32 `[N, K]`: `offsets` i32 `[E + 1]` (rows of each expert), `row_of_slot` i32 `[N * K]` and its
/// inverse `slot_of_row` i32 `[N * K]`.
pub fn plan(
    ctx: &Ctx,
    indices: View<'_>,
    experts: usize,
    offsets: ViewMut<'_>,
    row_of_slot: ViewMut<'_>,
    slot_of_row: ViewMut<'_>,
) {
    let _timer = ctx.timer("moe_permute plan", sizes![indices, experts, offsets, row_of_slot, slot_of_row]);
    let slots = indices.len();
    assert!(
        offsets.len() == experts + 1 && row_of_slot.len() == slots && slot_of_row.len() == slots,
        "moe_permute: {slots} slots and {experts} experts, but offsets {}, row_of_slot {}, slot_of_row {}",
        offsets.len(),
        row_of_slot.len(),
        slot_of_row.len()
    );
    assert!(i32::try_from(slots).is_ok(), "moe_permute: {slots} slots do not fit an i32");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::plan(cuda, indices, offsets, row_of_slot, slot_of_row),
        Device::Cpu(_) => cpu::plan(indices.i32(), offsets.i32(), row_of_slot.i32(), slot_of_row.i32()),
    }
}

/// `rows[r, D]` = `x[slot_of_row[r] / K]`. Both of the plan's permutations are given: a CPU writes row after row, a GPU
/// reads token after token, each only once.
pub fn permute(
    ctx: &Ctx,
    x: View<'_>,
    dim: usize,
    top_k: usize,
    [row_of_slot, slot_of_row]: [View<'_>; 2],
    rows: ViewMut<'_>,
) {
    let _timer = ctx.timer("moe_permute permute", sizes![x, dim, top_k, row_of_slot, slot_of_row, rows]);
    check(slot_of_row.len(), top_k, dim, rows.len(), x.len());
    assert_eq!(row_of_slot.len(), slot_of_row.len(), "moe_permute: a permutation and its inverse");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::permute(cuda, x, dim, top_k, row_of_slot, rows),
        Device::Cpu(cpu) => by_dtype!(rows.dtype(), T => {
            cpu::permute::<T>(cpu, T::of(x), dim, top_k, slot_of_row.i32(), T::of_mut(rows))
        }),
    }
}

/// `dx[n, D]` (+)= sum over k of `d_rows[row_of_slot[n * K + k]]`.
pub fn permute_backward(
    ctx: &Ctx,
    d_rows: View<'_>,
    dim: usize,
    top_k: usize,
    row_of_slot: View<'_>,
    dx: ViewMut<'_>,
    accumulate: bool,
) {
    let _timer = ctx.timer("moe_permute permute backward", sizes![d_rows, dim, top_k, row_of_slot, dx]);
    check(row_of_slot.len(), top_k, dim, d_rows.len(), dx.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::permute_backward(cuda, d_rows, dim, top_k, row_of_slot, dx, accumulate),
        Device::Cpu(cpu) => by_dtype!(dx.dtype(), T => {
            cpu::permute_backward::<T>(cpu, T::of(d_rows), dim, top_k, row_of_slot.i32(), T::of_mut(dx), accumulate)
        }),
    }
}

/// `y[n, D]` = `base[n]` + sum over k of `weights[n, k]` * `rows[row_of_slot[n * K + k]]` + `extra[n]`, in f32 in that
/// order (extra: the shared experts' output), rounded once. base and extra are optional; weights f32 `[N, K]`.
#[derive(Debug)]
pub struct Combine<'a> {
    /// `[N * K, D]` in expert order.
    pub rows: View<'a>,
    /// D.
    pub dim: usize,
    /// K.
    pub top_k: usize,
    /// i32 `[N * K]`.
    pub row_of_slot: View<'a>,
    /// f32 `[N, K]`.
    pub weights: View<'a>,
    /// `[N, D]`: the residual stream.
    pub base: Option<View<'a>>,
    /// `[N, D]`: the shared experts' output.
    pub extra: Option<View<'a>>,
    /// `[N, D]`.
    pub y: ViewMut<'a>,
}

/// See [`Combine`].
pub fn combine(ctx: &Ctx, a: Combine<'_>) {
    let _timer = ctx
        .timer("moe_permute combine", sizes![a.rows, a.dim, a.top_k, a.row_of_slot, a.weights, a.base, a.extra, a.y]);
    check(a.row_of_slot.len(), a.top_k, a.dim, a.rows.len(), a.y.len());
    let (y, slots) = (a.y.len(), a.row_of_slot.len());
    assert!(
        a.weights.len() == slots && [a.base, a.extra].iter().flatten().all(|v| v.len() == y),
        "moe_permute: y {y}, but base {:?}, extra {:?}; {slots} slots, but {} weights",
        a.base.map(|v| v.len()),
        a.extra.map(|v| v.len()),
        a.weights.len()
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::combine(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.y.dtype(), T => cpu::combine::<T>(cpu, a)),
    }
}

/// `rows` and `tokens` are the elements of a `[N * K, D]` and of a `[N, D]` buffer.
fn check(slots: usize, top_k: usize, dim: usize, rows: usize, tokens: usize) {
    assert!(
        top_k > 0 && dim > 0 && slots.is_multiple_of(top_k) && rows == slots * dim && tokens == slots / top_k * dim,
        "moe_permute: {slots} slots of top {top_k}, D {dim}: {rows} elements in expert order, {tokens} in token order"
    );
}
