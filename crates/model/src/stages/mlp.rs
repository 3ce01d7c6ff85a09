//! SwiGLU networks: a dense layer's one, or the routed experts' (rows sorted by expert, grouped products) and the
//! shared experts' (one network of their joint width, V2 report 2.2).

use super::combine::ExpertGradient;
use super::dispatch::{self, ExpertInput};
use super::{linear, linear_backward};
use crate::weight_grad::{ExpertRows, Shared, WeightGrads};
use crate::{BlockIds, FeedForwardIds, MlpIds, Model, Params};
use hadal_kernels::ops::{gemm_grouped, swiglu};
use hadal_kernels::{Buf, Ctx, DType, View};
use std::sync::Arc;

/// What the combine stage reads.
#[derive(Debug)]
pub struct ExpertOutput {
    /// `[n, D]`: of the dense or shared network; None without one.
    pub y: Option<Buf>,
    /// `[cap, D]`: of the routed experts, on their side.
    pub rows: Option<Buf>,
}

/// What forward keeps; the dense or shared network's input is the dispatch stage's.
#[derive(Debug)]
pub struct Saved {
    /// SwiGLU's input `[n, 2F]`.
    every: Option<(MlpIds, Buf)>,
    routed: Option<Routed>,
}

#[derive(Debug)]
struct Routed {
    ids: MlpIds,
    /// `[cap, D]`, or left to be gathered again.
    x: Option<Shared>,
    /// SwiGLU's input `[cap, 2F]`.
    gate_up: Buf,
    /// i32 `[local + 1]`.
    offsets: Shared,
}

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        let every = self.every.as_ref().map_or(0, |(_, gate_up)| gate_up.bytes());
        let routed = |r: &Routed| r.x.as_ref().map_or(0, |x| x.bytes()) + r.gate_up.bytes() + r.offsets.bytes();
        every + self.routed.as_ref().map_or(0, routed)
    }
}

/// The networks of a block over their inputs.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, input: ExpertInput) -> (ExpertOutput, Saved) {
    let saved = inner(ctx, model, params, ids, input);
    let y = saved.every.as_ref().map(|(ids, gate_up)| {
        let width = params.layout.info(ids.down).cols;
        let act = activate(ctx, gate_up, width, None);
        linear(ctx, params, ids.down, &act, act.len() / width)
    });
    let rows = saved.routed.as_ref().map(|r| {
        let down = params.weight(r.ids.down);
        let act = activate(ctx, &r.gate_up, down.cols, Some(live(&r.offsets)));
        let mut y = ctx.empty(act.dtype(), act.len() / down.cols * down.rows);
        gemm_grouped::grouped(ctx, act.view(), r.offsets.view(), &down, y.view_mut());
        y
    });
    (ExpertOutput { y, rows }, saved)
}

/// The part of [`forward`] that backward needs: up to SwiGLU's input.
pub(crate) fn inner(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, input: ExpertInput) -> Saved {
    let n = input.x.len() / model.config.hidden_size;
    let every = match ids.feed_forward {
        FeedForwardIds::Dense(mlp) => Some(mlp),
        FeedForwardIds::Moe(moe) => moe.shared,
    };
    let every = every.map(|ids| (ids, linear(ctx, params, ids.gate_up, &input.x, n)));
    let routed = match (ids.feed_forward, input.rows) {
        (FeedForwardIds::Moe(moe), Some((x, offsets))) => {
            let w = params.weight(moe.experts.gate_up);
            let (dtype, len) = x.shape();
            let mut gate_up = ctx.empty(dtype, len / w.cols * w.rows);
            gemm_grouped::grouped(ctx, x.view(), offsets.view(), &w, gate_up.view_mut());
            let keep = model.recompute.stages_keep() || !model.alone();
            // What the dispatch stage keeps is enough for rows of tokens.
            let x = match x {
                ExpertRows::Sorted(x) if keep => Some(x),
                _ => None,
            };
            Some(Routed { ids: moe.experts, x, gate_up, offsets })
        }
        _ => None,
    };
    Saved { every, routed }
}

fn activate(ctx: &Ctx, gate_up: &Buf, width: usize, rows: Option<View<'_>>) -> Buf {
    let mut act = ctx.empty(gate_up.dtype(), gate_up.len() / 2);
    swiglu::forward(ctx, gate_up.view(), width, rows, act.view_mut());
    act
}

/// i32 `[1]`: how many rows the experts have together.
fn live(offsets: &Buf) -> View<'_> {
    offsets.view().slice(offsets.len() - 1..offsets.len())
}

/// Of the experts' inputs and of the routing weights, on the experts' side, by row.
#[derive(Debug)]
pub struct InputGradient {
    /// `[cap, D]`.
    pub rows: Buf,
    /// f32 `[cap]`.
    pub weights: Buf,
}

/// From the gradients of both outputs to those of both inputs: dx `[n, D]`, and by row of the experts that of their
/// inputs and of the routing weights; weight gradients go to `jobs`.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    dispatched: &mut dispatch::Saved,
    saved: Saved,
    dy: &Shared,
    experts: Option<ExpertGradient>,
    jobs: &mut WeightGrads<'_>,
) -> (Option<Buf>, Option<InputGradient>) {
    let dx = saved.every.map(|(ids, gate_up)| {
        let x = dispatched.x(ctx, params);
        every_backward(ctx, params, ids, gate_up, &x, dy, jobs)
    });
    let experts = saved.routed.zip(experts).map(|(r, g)| {
        let Routed { ids, x, gate_up, offsets } = r;
        let (d_gate_up, weights) = experts_backward(ctx, params, ids, gate_up, &offsets, g, jobs);
        let x = x.map_or_else(|| dispatched.rows(ctx, model, params), ExpertRows::Sorted);
        let (dtype, len) = x.shape();
        jobs.grouped(ids.gate_up, &offsets, x, ExpertRows::Sorted(d_gate_up.clone()));
        let mut rows = ctx.empty(dtype, len);
        let w = params.weight(ids.gate_up);
        gemm_grouped::grouped_backward_input(ctx, d_gate_up.view(), offsets.view(), &w, rows.view_mut());
        InputGradient { rows, weights }
    });
    (dx, experts)
}

/// A dense or shared network: dx.
fn every_backward(
    ctx: &Ctx,
    params: &Params,
    ids: MlpIds,
    mut gate_up: Buf,
    x: &Shared,
    dy: &Shared,
    jobs: &mut WeightGrads<'_>,
) -> Buf {
    let width = params.layout.info(ids.down).cols;
    let mut d_act = ctx.empty(dy.dtype(), gate_up.len() / 2);
    linear_backward(ctx, params, ids.down, dy, &mut d_act, false);
    let b = swiglu::Backward { dy: d_act.view_mut(), gate_up: gate_up.view_mut(), width, rows: None, weights: None };
    swiglu::backward(ctx, b);
    // In place: what was d_act is SwiGLU's output again, what was gate_up is its gradient.
    let (act, d_gate_up) = (Arc::new(d_act), Arc::new(gate_up));
    jobs.linear(ids.down, width, &act, dy);
    drop(act);
    let mut dx = ctx.empty(dy.dtype(), x.len());
    linear_backward(ctx, params, ids.gate_up, &d_gate_up, &mut dx, false);
    jobs.linear(ids.gate_up, params.layout.info(ids.gate_up).cols, x, &d_gate_up);
    dx
}

/// The routed experts down to SwiGLU's input: its gradient, and that of the routing weights.
fn experts_backward(
    ctx: &Ctx,
    params: &Params,
    ids: MlpIds,
    mut gate_up: Buf,
    offsets: &Shared,
    g: ExpertGradient,
    jobs: &mut WeightGrads<'_>,
) -> (Shared, Buf) {
    let down = params.weight(ids.down);
    let mut d_act = ctx.empty(gate_up.dtype(), gate_up.len() / 2);
    gemm_grouped::grouped_backward_input(ctx, g.rows.view(), offsets.view(), &down, d_act.view_mut());
    let mut d_weights = ctx.empty(DType::F32, g.weights.len());
    let b = swiglu::Backward {
        dy: d_act.view_mut(),
        gate_up: gate_up.view_mut(),
        width: down.cols,
        rows: Some(live(offsets)),
        weights: Some((g.weights.view(), d_weights.view_mut())),
    };
    swiglu::backward(ctx, b);
    // The outputs' gradients are not weighted; the activations that they meet in the weights' gradient now are.
    jobs.grouped(ids.down, offsets, ExpertRows::Sorted(Arc::new(d_act)), g.rows);
    (Arc::new(gate_up), d_weights)
}
