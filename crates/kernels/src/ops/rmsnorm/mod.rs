//! RMSNorm in f32, rounded once (as DeepSeek's code; transformers rounds before the weight): y = x * rstd * w,
//! rstd = (mean(x^2) + eps)^-1/2, eps inside the root. Rows of x lie `x_stride` apart, so that a norm can read part of
//! a wider projection (the latent of kv_a_proj_with_mqa).

use crate::{Ctx, View, ViewMut};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// [N, D] with rows `x_stride` apart.
    pub x: View<'a>,
    /// Elements from one row of x to the next (>= D).
    pub x_stride: usize,
    /// f32 [D].
    pub weight: View<'a>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// [N, D], dense, x's dtype.
    pub y: ViewMut<'a>,
    /// f32 [N], kept for backward.
    pub rstd: ViewMut<'a>,
}

/// y = RMSNorm(x) * w. N = rstd.len().
pub fn forward(ctx: &Ctx, a: Forward<'_>) {
    todo!()
}

/// Arguments of [`backward_input`].
#[derive(Debug)]
pub struct BackwardInput<'a> {
    /// [N, D], dense.
    pub dy: View<'a>,
    /// As in forward.
    pub x: View<'a>,
    /// As in forward.
    pub x_stride: usize,
    /// f32 [D].
    pub weight: View<'a>,
    /// f32 [N].
    pub rstd: View<'a>,
    /// [N, D] with rows `dx_stride` apart.
    pub dx: ViewMut<'a>,
    /// Elements from one row of dx to the next (>= D).
    pub dx_stride: usize,
    /// dx += instead of dx = (the residual stream's gradient passes through); summed in f32, rounded once.
    pub accumulate: bool,
}

/// dx (+)= gradient of the norm's input.
pub fn backward_input(ctx: &Ctx, a: BackwardInput<'_>) {
    todo!()
}

/// dw[D] (f32) += sum over n of dy[n] * x[n] * rstd[n], in a fixed order.
pub fn backward_weight(ctx: &Ctx, dy: View<'_>, x: View<'_>, x_stride: usize, rstd: View<'_>, dw: ViewMut<'_>) {
    todo!()
}
