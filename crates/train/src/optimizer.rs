//! AdamW over the arenas, and the auxiliary-loss-free update of the gates' biases.

use hadal_kernels::ops::{adamw, grad_norm};
use hadal_kernels::{Buf, Ctx, DType, ViewMut};
use hadal_model::{FeedForwardIds, Grads, LayerTrace, Layout, Model, ParamId, Params};
use std::collections::BTreeMap;

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
    /// Updates made.
    t: u64,
}

impl Optimizer {
    /// Zero moments for a layout.
    pub fn new(ctx: &Ctx, layout: &Layout, constants: AdamW) -> Self {
        let [m, v] = [(), ()].map(|()| ctx.zeros(DType::F32, layout.len));
        Self { constants, segments: layout.segments(), m, v, schedule: ctx.zeros(DType::F32, 3), t: 0 }
    }

    /// Both moments, as arenas of the layout.
    pub(crate) fn moments(&self) -> [&Buf; 2] {
        [&self.m, &self.v]
    }

    /// Updates made.
    pub(crate) fn updates(&self) -> u64 {
        self.t
    }

    /// Goes on after so many updates, with the moments that they left.
    pub(crate) fn restore(&mut self, m: Buf, v: Buf, updates: u64) {
        assert!(m.len() == self.m.len() && v.len() == self.v.len(), "moments of another layout");
        (self.m, self.v, self.t) = (m, v, updates);
    }

    /// One update from the gradients (shared tables already folded); returns the norm before clipping.
    pub fn update(&mut self, ctx: &Ctx, params: &mut Params, grads: &Grads, lr: f64) -> f32 {
        let mut norm = ctx.zeros(DType::F32, 1);
        self.advance(lr);
        self.apply(ctx, params, grads, norm.view_mut());
        norm.view().to_f32()[0]
    }

    /// Counts an update and tells the device its learning rate: the part of an update that differs from step to step.
    fn advance(&mut self, lr: f64) {
        self.t += 1;
        let c = self.constants;
        self.schedule.view_mut().write(&adamw::schedule(lr as f32, c.beta1, c.beta2, c.weight_decay, self.t));
    }

    /// The update itself, which is the same launches every step; writes the norm before clipping (f32 `[1]`).
    fn apply(&mut self, ctx: &Ctx, params: &mut Params, grads: &Grads, mut norm: ViewMut<'_>) {
        grad_norm::norm(ctx, grads.arena.view(), &params.layout.trained_ranges(), norm.reborrow());
        let c = self.constants;
        let a = adamw::AdamW {
            master: params.master.view_mut(),
            grad: grads.arena.view(),
            m: self.m.view_mut(),
            v: self.v.view_mut(),
            compute: params.compute.as_mut().map(Buf::view_mut),
            segments: &self.segments,
            norm: norm.as_view(),
            clip: c.clip,
            schedule: self.schedule.view(),
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
        };
        adamw::step(ctx, a);
    }
}

/// Tokens that chose each expert, by MoE layer, over a global batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    layers: BTreeMap<usize, Vec<i64>>,
}

impl Load {
    /// Adds one micro-batch's routing.
    pub fn add(&mut self, traces: &[LayerTrace]) {
        for t in traces {
            let load = t.load();
            let sum = self.layers.entry(t.layer).or_insert_with(|| vec![0; load.len()]);
            sum.iter_mut().zip(load).for_each(|(a, b)| *a += b);
        }
    }

    /// Sums over ranks.
    pub fn reduce(&mut self, model: &Model) {
        self.layers.values_mut().for_each(|l| model.exchange.sum_counts(l));
    }

    /// max_i load_i / mean - 1, the worst layer (MaxVio of arXiv 2408.15664); 0 without experts.
    pub fn max_violation(&self) -> f64 {
        let violation = |l: &Vec<i64>| {
            let mean = l.iter().sum::<i64>() as f64 / l.len() as f64;
            if mean == 0.0 { 0.0 } else { *l.iter().max().unwrap_or(&0) as f64 / mean - 1.0 }
        };
        self.layers.values().map(violation).fold(0.0, f64::max)
    }

    /// Load of each MoE layer by global index.
    pub fn layers(&self) -> &BTreeMap<usize, Vec<i64>> {
        &self.layers
    }

    /// b_i -= gamma where the load is above the layer's mean, += gamma where below, unchanged where equal.
    pub fn update_biases(&self, params: &mut Params, gamma: f32) {
        for (layer, id) in biases(&params.layout.clone()) {
            let Some(load) = self.layers.get(&layer) else { continue };
            let total: i64 = load.iter().sum();
            let n = load.len() as i64;
            for (b, &l) in params.f32_mut(id).f32().iter_mut().zip(load) {
                // Integers: l against total / n without rounding.
                *b -= gamma * (l * n - total).signum() as f32;
            }
        }
    }
}

/// The correction bias of every MoE layer held, MTP layers included.
fn biases(layout: &Layout) -> Vec<(usize, ParamId)> {
    let blocks = layout.blocks.iter().chain(layout.mtp.iter().map(|m| &m.block));
    blocks
        .filter_map(|b| match b.feed_forward {
            FeedForwardIds::Moe(m) => Some((b.layer, m.bias?)),
            FeedForwardIds::Dense(_) => None,
        })
        .collect()
}
