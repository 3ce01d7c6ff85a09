//! Decoupled rotary embedding, in place, in f32, rounded once. Pair i is (2i, 2i + 1) when interleaved (published
//! V2 and V3 checkpoints) and (i, i + R/2) otherwise. Pairs stay where they are: dumps agree with DeepSeek's and V2's
//! order, and scores do not care. Angles, cosines and sines are taken in f64, so that long contexts lose nothing.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use cpu::Turns;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, ops::by_dtype};

/// Arguments of [`apply`]. Token n's head h begins at `n * token_stride + offset + h * head_stride`.
#[derive(Debug)]
pub struct Rope<'a> {
    /// Activations, rotated in place.
    pub x: ViewMut<'a>,
    /// Elements from one token to the next.
    pub token_stride: usize,
    /// Where the first head's rotary part begins within a token.
    pub offset: usize,
    /// Heads per token.
    pub heads: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
    /// i32 `[N]`.
    pub positions: View<'a>,
    /// f32 `[R/2]`, radians per position (YaRN already applied).
    pub inv_freq: View<'a>,
    /// Factor on cos and sin (YaRN's attention factor; 1 without).
    pub factor: f32,
    /// Pairs are (2i, 2i + 1); otherwise (i, i + R/2).
    pub interleaved: bool,
    /// Rotate by minus the angle: the backward pass (same factor).
    pub inverse: bool,
}

/// Rotates x by position. The backward pass is the same call with `inverse` on the gradient.
pub fn apply(ctx: &Ctx, a: Rope<'_>) {
    let _timer =
        ctx.timer("rope", sizes![a.x, a.token_stride, a.offset, a.heads, a.head_stride, a.positions, a.inv_freq]);
    let (n, width) = (a.positions.len(), 2 * a.inv_freq.len());
    if n > 0 && a.heads > 0 {
        let end = a.offset + (a.heads - 1) * a.head_stride + width;
        let (heads, stride) = (a.heads, a.head_stride);
        assert!(heads == 1 || stride >= width, "{heads} heads of {width} overlap: {stride} apart");
        assert!(end <= a.token_stride, "a token's heads end at {end}, the next token begins at {}", a.token_stride);
        let need = (n - 1) * a.token_stride + end;
        assert!(a.x.len() >= need, "x holds {} elements, {n} tokens need {need}", a.x.len());
    }
    match &ctx.device {
        Device::Cuda(cuda) => cuda::apply(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.x.dtype(), T => cpu::apply::<T>(cpu, a)),
    }
}
