//! AdamW over the arenas.

use hadal_kernels::ops::{adamw, grad_norm};
use hadal_kernels::{Buf, Ctx, DType, View};
use hadal_model::{Grads, Layout, Params};

/// AdamW's constants (V3 report 4.2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// First moment's decay.
    pub beta1: f32,
    /// Second moment's decay.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decoupled decay of matrices; norms are not decayed.
    pub weight_decay: f32,
    /// Largest global gradient norm.
    pub clip: f32,
}

/// Moments beside the masters.
pub struct Optimizer {
    constants: AdamW,
    segments: Vec<adamw::Segment>,
    m: Buf,
    v: Buf,
    /// f32 `[3]`: what changes from one update to the next, where the device reads it.
    schedule: Buf,
    /// f32 `[1]`: the last gradient's norm before clipping.
    norm: Buf,
    /// Updates made.
    t: u64,
}

impl Optimizer {
    /// Zero moments for a layout.
    pub fn new(ctx: &Ctx, layout: &Layout, constants: AdamW) -> Self {
        let [m, v] = [(), ()].map(|()| ctx.zeros(DType::F32, layout.len));
        let [schedule, norm] = [3, 1].map(|n| ctx.zeros(DType::F32, n));
        Self { constants, segments: layout.segments(), m, v, schedule, norm, t: 0 }
    }

    /// Both moments, as arenas of the layout.
    pub(crate) fn moments(&self) -> [&Buf; 2] {
        [&self.m, &self.v]
    }

    /// f32 `[1]`: the norm of the gradient of the last update, before clipping.
    pub(crate) fn norm(&self) -> View<'_> {
        self.norm.view()
    }

    /// Updates made.
    pub(crate) fn updates(&self) -> u64 {
        self.t
    }

    /// Goes on after so many updates, with the moments that they left, arenas in host memory.
    pub(crate) fn restore(&mut self, m: &Buf, v: &Buf, updates: u64) {
        self.m.view_mut().write(m.view().f32());
        self.v.view_mut().write(v.view().f32());
        self.t = updates;
    }

    /// Counts an update and tells the device its learning rate: the part of an update that differs from step to step.
    pub fn advance(&mut self, lr: f64) {
        self.t += 1;
        let c = self.constants;
        self.schedule.view_mut().write(&adamw::schedule(lr as f32, c.beta1, c.beta2, c.weight_decay, self.t));
    }

    /// The update itself from the gradients (shared tables already folded), the same launches every step; the norm before
    /// clipping is then in `Optimizer::norm`.
    pub fn apply(&mut self, ctx: &Ctx, params: &mut Params, grads: &Grads) {
        grad_norm::norm(ctx, grads.arena.view(), &params.layout.trained_ranges(), self.norm.view_mut());
        let c = self.constants;
        let a = adamw::AdamW {
            master: params.master.view_mut(),
            grad: grads.arena.view(),
            m: self.m.view_mut(),
            v: self.v.view_mut(),
            compute: params.compute.as_mut().map(Buf::view_mut),
            segments: &self.segments,
            norm: self.norm.view(),
            clip: c.clip,
            schedule: self.schedule.view(),
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
        };
        adamw::step(ctx, a);
    }
}
