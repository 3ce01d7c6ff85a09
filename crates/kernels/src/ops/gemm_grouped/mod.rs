//! Grouped GEMM over experts without padding and without dropping tokens. Rows are sorted by expert; `offsets`
//! `[E + 1]` (i32, on the device) says where each expert's rows begin. The row buffers have a capacity of at least
//! `offsets[E]` rows; rows beyond it are neither read nor written. Precision and batch invariance as in `gemm`: the
//! bits of a row do not depend on how many rows its expert got. An expert with no rows gets nothing; its dW is
//! unchanged.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
pub(super) mod sm90;
mod sm90_weight;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, Weight};

/// `y[row, out]` = `x[row, in]` W_e^T for the rows of each expert e. x `[cap, in]`, y `[cap, out]`, W `[E, out, in]`.
pub fn grouped(ctx: &Ctx, x: View<'_>, offsets: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    let _timer = ctx.timer("gemm_grouped forward", sizes![x, offsets, w, y]);
    assert_eq!(offsets.len(), w.experts + 1, "offsets of {} experts", w.experts);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, x, offsets, w, y),
        Device::Cpu(cpu) => cpu::forward(cpu, x, offsets.i32(), w, y),
    }
}

/// `dx[row, in]` = `dy[row, out]` W_e (overwrites the rows below `offsets[E]`).
pub fn grouped_backward_input(ctx: &Ctx, dy: View<'_>, offsets: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>) {
    let _timer = ctx.timer("gemm_grouped backward input", sizes![dy, offsets, w, dx]);
    assert_eq!(offsets.len(), w.experts + 1, "offsets of {} experts", w.experts);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward_input(cuda, dy, offsets, w, dx),
        Device::Cpu(cpu) => cpu::backward_input(cpu, dy, offsets.i32(), w, dx),
    }
}

/// `dW_e[out, in]` (+)= `dy[rows of e]`^T `x[rows of e]`; dW f32 `[E, out, in]`. Without rows an expert's is unchanged,
/// or zero if it is overwritten.
pub fn grouped_backward_weight(
    ctx: &Ctx,
    x: View<'_>,
    dy: View<'_>,
    offsets: View<'_>,
    rows: usize,
    cols: usize,
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let _timer = ctx.timer("gemm_grouped backward weight", sizes![x, dy, offsets, rows, cols, dw]);
    assert_eq!(dw.len() + rows * cols, offsets.len() * rows * cols, "dW [{} - 1, {rows}, {cols}]", offsets.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward_weight(cuda, x, dy, offsets, rows, cols, dw, accumulate),
        Device::Cpu(cpu) => cpu::backward_weight(cpu, x, dy, offsets.i32(), rows, cols, dw, accumulate),
    }
}
