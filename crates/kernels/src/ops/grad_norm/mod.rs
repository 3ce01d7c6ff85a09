//! Global L2 norm of the gradient: per tensor, sums of squares over fixed blocks in f64, combined in block order; then
//! the tensors in their global order, so that a split over ranks gives the same bits.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};
use std::ops::Range;

/// `out[0]` (f32 `[1]`) = sqrt(sum of squares over `tensors`, ranges of grad f32 `[P]`).
pub fn norm(ctx: &Ctx, grad: View<'_>, tensors: &[Range<usize>], out: ViewMut<'_>) {
    let _timer = ctx.timer("grad_norm", sizes![grad, tensors, out]);
    assert_eq!(out.len(), 1, "grad_norm: the norm is one number");
    for t in tensors {
        assert!(t.start <= t.end && t.end <= grad.len(), "grad_norm: tensor {t:?} of {} gradients", grad.len());
    }
    match &ctx.device {
        Device::Cuda(cuda) => cuda::norm(cuda, grad, tensors, out),
        Device::Cpu(cpu) => cpu::norm(cpu, grad.f32(), tensors, &mut out.f32()[0]),
    }
}
