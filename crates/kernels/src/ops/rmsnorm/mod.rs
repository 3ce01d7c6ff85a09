//! RMSNorm in f32, rounded once (as DeepSeek's code; transformers rounds before the weight): y = x * rstd * w,
//! rstd = (mean(x^2) + eps)^-1/2, eps inside the root. Rows of x lie `x_stride` apart, so that a norm can read part of
//! a wider projection (the latent of kv_a_proj_with_mqa).

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::sizes::{Measured, Size, sizes};
use crate::{Ctx, Device, View, ViewMut};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// `[N, D]` with rows `x_stride` apart.
    pub x: View<'a>,
    /// Elements from one row of x to the next (>= D).
    pub x_stride: usize,
    /// f32 `[D]`.
    pub weight: View<'a>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `[N, D]`, dense, x's dtype.
    pub y: ViewMut<'a>,
    /// f32 `[N]`, kept for backward.
    pub rstd: ViewMut<'a>,
}

/// y = RMSNorm(x) * w. N = rstd.len().
pub fn forward(ctx: &Ctx, a: Forward<'_>) {
    let _timer = ctx.timer("rmsnorm forward", sizes![a.x, a.x_stride, a.weight, a.y, a.rstd]);
    let (n, d) = (a.rstd.len(), a.weight.len());
    assert_rows("x", n, d, a.x_stride, a.x.len());
    assert_eq!(a.y.len(), n * d, "y [{n}, {d}]");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.x.dtype(), T => cpu::forward::<T>(cpu, a)),
    }
}

/// Arguments of [`backward`]. Either gradient may be absent, and the bits of each do not depend on the other's presence.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[N, D]`, dense.
    pub dy: View<'a>,
    /// As in forward.
    pub x: View<'a>,
    /// As in forward.
    pub x_stride: usize,
    /// f32 `[D]`.
    pub weight: View<'a>,
    /// f32 `[N]`.
    pub rstd: View<'a>,
    /// The input's.
    pub input: Option<InputGradient<'a>>,
    /// The weight's.
    pub weight_gradient: Option<WeightGradient<'a>>,
}

/// Where the input's gradient goes.
#[derive(Debug)]
pub struct InputGradient<'a> {
    /// `[N, D]` with rows `dx_stride` apart.
    pub dx: ViewMut<'a>,
    /// Elements from one row of dx to the next (>= D).
    pub dx_stride: usize,
    /// dx += instead of dx = (the residual stream's gradient passes through); summed in f32, rounded once.
    pub accumulate: bool,
}

/// Where the weight's gradient goes: the sum over n of `dy[n]` * `x[n]` * `rstd[n]`, in a fixed order.
#[derive(Debug)]
pub struct WeightGradient<'a> {
    /// f32 `[D]`.
    pub dw: ViewMut<'a>,
    /// dw += instead of dw =; the sum is complete before it is added.
    pub accumulate: bool,
}

impl Measured for InputGradient<'_> {
    fn size(&self) -> Size {
        self.dx.size()
    }
}

impl Measured for WeightGradient<'_> {
    fn size(&self) -> Size {
        self.dw.size()
    }
}

/// Gradients of the norm.
pub fn backward(ctx: &Ctx, a: Backward<'_>) {
    let sizes = sizes![a.dy, a.x, a.x_stride, a.weight, a.rstd, a.input, a.weight_gradient];
    let _timer = ctx.timer("rmsnorm backward", sizes);
    let (n, d) = (a.rstd.len(), a.weight.len());
    assert_rows("x", n, d, a.x_stride, a.x.len());
    assert_eq!(a.dy.len(), n * d, "dy [{n}, {d}]");
    if let Some(i) = &a.input {
        assert_rows("dx", n, d, i.dx_stride, i.dx.len());
    }
    if let Some(w) = &a.weight_gradient {
        assert_eq!(w.dw.len(), d, "dw [{d}]");
    }
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.x.dtype(), T => cpu::backward::<T>(cpu, a)),
    }
}

/// Rows of `d` elements `stride` apart fit in `len`.
fn assert_rows(name: &str, n: usize, d: usize, stride: usize, len: usize) {
    assert!(d > 0 && stride >= d, "{name}: rows of {d} elements, {stride} apart");
    assert!(n == 0 || len >= (n - 1) * stride + d, "{name}: {n} rows of {d}, {stride} apart, in {len}");
}
