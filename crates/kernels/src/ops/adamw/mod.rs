//! AdamW (decoupled decay) over a whole arena in one call: FP32 masters, moments, gradients, and the compute copy
//! written in the same pass. Clipping by global norm is folded in: g' = g * min(1, clip / (norm + 1e-6)), as PyTorch
//! does. m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2; w -= lr (wd w) for decayed tensors, then w -= lr (m / (1 -
//! b1^t)) / (sqrt(v / (1 - b2^t)) + eps). Every element is on its own: the bits depend on no split of the arena. A norm
//! that is NaN makes every updated element NaN, as in PyTorch, so that a broken step cannot pass unseen; with an
//! infinite clip the norm is not used at all.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::{Ctx, Device, View, ViewMut};
use std::ops::Range;

/// A run of elements treated alike. Elements outside every segment stay as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Elements of the arena.
    pub range: Range<usize>,
    /// Weight decay applies.
    pub decay: bool,
}

/// Arguments of [`step`].
#[derive(Debug)]
pub struct AdamW<'a> {
    /// f32 `[P]`.
    pub master: ViewMut<'a>,
    /// f32 `[P]`.
    pub grad: View<'a>,
    /// f32 `[P]`.
    pub m: ViewMut<'a>,
    /// f32 `[P]`.
    pub v: ViewMut<'a>,
    /// bf16 `[P]`: the masters rounded; absent when the masters are the compute weights.
    pub compute: Option<ViewMut<'a>>,
    /// Which elements to update; they may come in any order but not overlap.
    pub segments: &'a [Segment],
    /// f32 `[1]`, on the device: the gradient's norm.
    pub norm: View<'a>,
    /// Largest norm allowed; infinity for none.
    pub clip: f32,
    /// Learning rate of this step.
    pub lr: f32,
    /// First moment's decay.
    pub beta1: f32,
    /// Second moment's decay.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled decay, times lr.
    pub weight_decay: f32,
    /// 1 for the first update.
    pub t: u64,
}

/// One update.
pub fn step(ctx: &Ctx, a: AdamW<'_>) {
    let _timer = ctx.timer("adamw");
    let p = a.master.len();
    assert!(
        a.grad.len() == p && a.m.len() == p && a.v.len() == p && a.compute.as_ref().is_none_or(|c| c.len() == p),
        "adamw: masters {p}, gradients {}, m {}, v {}, compute {:?}: expected one length",
        a.grad.len(),
        a.m.len(),
        a.v.len(),
        a.compute.as_ref().map(ViewMut::len)
    );
    assert_eq!(a.norm.len(), 1, "adamw: the norm is one number");
    assert!(a.t > 0, "adamw: the first update is t = 1");
    assert!(a.clip > 0.0, "adamw: clip {}", a.clip);
    match &ctx.device {
        Device::Cuda(_) => crate::cuda::missing(),
        Device::Cpu(cpu) => cpu::step(cpu, a),
    }
}
