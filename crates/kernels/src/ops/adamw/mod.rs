//! AdamW (decoupled decay) over a whole arena in one call: FP32 masters, moments, gradients, and the compute copy
//! written in the same pass. Clipping by global norm is folded in: g' = g * min(1, clip / (norm + 1e-6)), as PyTorch
//! does. m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2; w -= lr (wd w) for decayed tensors, then w -= lr (m / (1 -
//! b1^t)) / (sqrt(v / (1 - b2^t)) + eps). Every element is on its own: the bits depend on no split of the arena. A norm
//! that is NaN makes every updated element NaN, as in PyTorch, so that a broken step cannot pass unseen; with an
//! infinite clip the norm is not used at all.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
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
    /// f32 `[3]`, on the device: what [`schedule`] says of this step.
    pub schedule: View<'a>,
    /// First moment's decay.
    pub beta1: f32,
    /// Second moment's decay.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
}

/// What changes from step to step, taken in f64 and rounded once: lr / (1 - b1^t), 1 / sqrt(1 - b2^t) and 1 - lr wd,
/// which decayed weights are multiplied by. It is read on the device, so that a step can be recorded once and replayed
/// with other numbers. `t` is 1 for the first update.
pub fn schedule(lr: f32, beta1: f32, beta2: f32, weight_decay: f32, t: u64) -> [f32; 3] {
    assert!(t > 0, "adamw: the first update is t = 1");
    let (lr, beta1, beta2, t) = (f64::from(lr), f64::from(beta1), f64::from(beta2), t as f64);
    [
        (lr / (1.0 - beta1.powf(t))) as f32,
        (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
        (1.0 - lr * f64::from(weight_decay)) as f32,
    ]
}

/// The segments that hold anything, in the arena's order.
fn in_order(segments: &[Segment], p: usize) -> Vec<&Segment> {
    let mut order: Vec<&Segment> = segments.iter().filter(|s| !s.range.is_empty()).collect();
    order.sort_by_key(|s| s.range.start);
    let mut at = 0;
    for Segment { range, .. } in &order {
        assert!(range.start >= at && range.end <= p, "adamw: segment {range:?} overlaps {at} or passes {p}");
        at = range.end;
    }
    order
}

/// One update.
pub fn step(ctx: &Ctx, a: AdamW<'_>) {
    let _timer = ctx.timer("adamw", sizes![a.master, a.grad, a.m, a.v, a.compute, a.segments, a.norm, a.schedule]);
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
    assert_eq!(a.schedule.len(), 3, "adamw: the schedule is three numbers");
    assert!(a.clip > 0.0, "adamw: clip {}", a.clip);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::step(cuda, a),
        Device::Cpu(cpu) => cpu::step(cpu, a),
    }
}
