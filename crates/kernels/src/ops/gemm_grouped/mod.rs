//! Grouped GEMM over experts without padding and without dropping tokens. Rows are sorted by expert; `offsets`
//! `[E + 1]` (i32, on the device) says where each expert's rows begin. The row buffers have a capacity of at least
//! `offsets[E]` rows; rows beyond it are neither read nor written. Precision and batch invariance as in `gemm`: the
//! bits of a row do not depend on how many rows its expert got. An expert with no rows gets nothing; its dW is
//! unchanged.
//!
//! Rows need not lie sorted: where the device [`gathers`], they may be told as tokens and the plan of
//! [`super::moe_permute`]. Products then read each row from its token's, and their bits are those of sorted rows.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
pub(super) mod sm90;
mod sm90_weight;
#[cfg(test)]
mod tests;

use crate::sizes::{Measured, Size, sizes};
use crate::{Ctx, Device, View, ViewMut, Weight};

/// The rows of an operand, sorted by expert.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// `[cap, D]`, one after the other.
    Sorted(View<'a>),
    /// Row r is that of token `slot_of_row[r] / top_k`, on a device that [`gathers`].
    Tokens {
        /// `[N, D]`.
        x: View<'a>,
        /// i32 `[N top_k]`, of `moe_permute::plan`.
        slot_of_row: View<'a>,
        /// Rows of each token.
        top_k: usize,
    },
}

impl<'a> From<View<'a>> for Rows<'a> {
    fn from(sorted: View<'a>) -> Self {
        Self::Sorted(sorted)
    }
}

impl<'a> Rows<'a> {
    /// What a device reads that does not gather.
    fn sorted(self) -> View<'a> {
        match self {
            Self::Sorted(x) => x,
            Self::Tokens { .. } => panic!("gemm_grouped: rows of tokens on a device that does not gather them"),
        }
    }

    /// A token's rows are `dim` long.
    fn check(&self, dim: usize) {
        if let Self::Tokens { x, slot_of_row, top_k } = self {
            let (tokens, slots) = (x.len(), slot_of_row.len());
            assert!(
                tokens * top_k == slots * dim,
                "{slots} slots of top {top_k}, D {dim}: {tokens} elements of tokens"
            );
        }
    }
}

impl Measured for Rows<'_> {
    fn size(&self) -> Size {
        match self {
            Self::Sorted(x) | Self::Tokens { x, .. } => x.size(),
        }
    }
}

/// Whether a device's products read the rows of tokens, so that nobody has to sort them.
pub fn gathers(device: &Device) -> bool {
    match device {
        Device::Cuda(_) => false,
        Device::Cpu(_) => true,
    }
}

/// `y[row, out]` = `x[row, in]` W_e^T for the rows of each expert e. x `[cap, in]`, y `[cap, out]`, W `[E, out, in]`.
pub fn grouped<'a>(ctx: &Ctx, x: impl Into<Rows<'a>>, offsets: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    let x = x.into();
    let _timer = ctx.timer("gemm_grouped forward", sizes![x, offsets, w, y]);
    assert_eq!(offsets.len(), w.experts + 1, "offsets of {} experts", w.experts);
    x.check(w.cols);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, x.sorted(), offsets, w, y),
        Device::Cpu(cpu) => cpu::forward(cpu, x, offsets.i32(), w, y),
    }
}

/// `dx[row, in]` = `dy[row, out]` W_e (overwrites the rows below `offsets[E]`).
pub fn grouped_backward_input<'a>(
    ctx: &Ctx,
    dy: impl Into<Rows<'a>>,
    offsets: View<'_>,
    w: &Weight<'_>,
    dx: ViewMut<'_>,
) {
    let dy = dy.into();
    let _timer = ctx.timer("gemm_grouped backward input", sizes![dy, offsets, w, dx]);
    assert_eq!(offsets.len(), w.experts + 1, "offsets of {} experts", w.experts);
    dy.check(w.rows);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward_input(cuda, dy.sorted(), offsets, w, dx),
        Device::Cpu(cpu) => cpu::backward_input(cpu, dy, offsets.i32(), w, dx),
    }
}

/// `dW_e[out, in]` (+)= `dy[rows of e]`^T `x[rows of e]`; dW f32 `[E, out, in]`. Without rows an expert's is unchanged,
/// or zero if it is overwritten.
pub fn grouped_backward_weight<'a>(
    ctx: &Ctx,
    x: impl Into<Rows<'a>>,
    dy: impl Into<Rows<'a>>,
    offsets: View<'_>,
    rows: usize,
    cols: usize,
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let (x, dy) = (x.into(), dy.into());
    let _timer = ctx.timer("gemm_grouped backward weight", sizes![x, dy, offsets, rows, cols, dw]);
    assert_eq!(dw.len() + rows * cols, offsets.len() * rows * cols, "dW [{} - 1, {rows}, {cols}]", offsets.len());
    x.check(cols);
    dy.check(rows);
    match &ctx.device {
        Device::Cuda(cuda) => {
            cuda::backward_weight(cuda, x.sorted(), dy.sorted(), offsets, rows, cols, dw, accumulate);
        }
        Device::Cpu(cpu) => cpu::backward_weight(cpu, x, dy, offsets.i32(), rows, cols, dw, accumulate),
    }
}
