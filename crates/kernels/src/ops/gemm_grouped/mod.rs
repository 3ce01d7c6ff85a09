//! Grouped GEMM over experts without padding and without dropping tokens. Rows are sorted by expert; `offsets`
//! [E + 1] (i32, on the device) says where each expert's rows begin. The row buffers have a capacity of at least
//! offsets[E] rows; rows beyond it are neither read nor written. Precision and batch invariance as in `gemm`: the bits
//! of a row do not depend on how many rows its expert got. An expert with no rows gets nothing; its dW is unchanged.

use crate::{Ctx, View, ViewMut, Weight};

/// y[row, out] = x[row, in] W_e^T for the rows of each expert e. x [cap, in], y [cap, out], W [E, out, in].
pub fn grouped(ctx: &Ctx, x: View<'_>, offsets: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    todo!()
}

/// dx[row, in] = dy[row, out] W_e (overwrites the rows below offsets[E]).
pub fn grouped_backward_input(ctx: &Ctx, dy: View<'_>, offsets: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>) {
    todo!()
}

/// dW_e[out, in] += dy[rows of e]^T x[rows of e]; dW f32 [E, out, in].
pub fn grouped_backward_weight(
    ctx: &Ctx,
    x: View<'_>,
    dy: View<'_>,
    offsets: View<'_>,
    rows: usize,
    cols: usize,
    dw: ViewMut<'_>,
) {
    todo!()
}
