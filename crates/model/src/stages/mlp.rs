//! SwiGLU networks: a dense layer's one, or the routed experts' (rows sorted by expert, grouped products) and the
//! shared experts' (one network of their joint width, V2 report 2.2).

use super::dispatch::ExpertInput;
use super::{linear, linear_backward};
use crate::weight_grad::{Shared, WeightGrads};
use crate::{BlockIds, FeedForwardIds, MlpIds, Model, Params};
use hadal_kernels::ops::{gemm_grouped, swiglu};
use hadal_kernels::{Buf, Ctx};
use std::sync::Arc;

/// What the combine stage reads.
#[derive(Debug)]
pub struct ExpertOutput {
    /// `[n, D]`: of the dense or shared network; None without one.
    pub y: Option<Buf>,
    /// `[cap, D]`: of the routed experts, on their side.
    pub rows: Option<Buf>,
}

/// What forward keeps.
#[derive(Debug)]
pub struct Saved {
    every: Option<(MlpIds, Network)>,
    routed: Option<(MlpIds, Network, Shared)>,
}

#[derive(Debug)]
struct Network {
    x: Shared,
    gate_up: Buf,
    act: Shared,
}

impl Saved {
    /// Bytes kept until backward; x of the dense or shared network is counted by the dispatch stage.
    pub fn bytes(&self) -> usize {
        let every = self.every.as_ref().map_or(0, |(_, n)| n.gate_up.bytes() + n.act.bytes());
        let routed = self.routed.as_ref();
        every + routed.map_or(0, |(_, n, o)| n.x.bytes() + n.gate_up.bytes() + n.act.bytes() + o.bytes())
    }
}

/// The networks of a block over their inputs.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, input: ExpertInput) -> (ExpertOutput, Saved) {
    let n = input.x.len() / model.config.hidden_size;
    let every = match ids.feed_forward {
        FeedForwardIds::Dense(mlp) => Some(mlp),
        FeedForwardIds::Moe(moe) => moe.shared,
    };
    let (y, every) = every
        .map(|mlp| {
            let gate_up = linear(ctx, params, mlp.gate_up, &input.x, n);
            let width = params.layout.info(mlp.down).cols;
            let mut act = ctx.zeros(gate_up.dtype(), n * width);
            swiglu::forward(ctx, gate_up.view(), width, None, act.view_mut());
            let y = linear(ctx, params, mlp.down, &act, n);
            (y, (mlp, Network { x: input.x, gate_up, act: Arc::new(act) }))
        })
        .unzip();
    let (rows, routed) = match (ids.feed_forward, input.rows) {
        (FeedForwardIds::Moe(moe), Some((x, offsets))) => {
            let (y, network) = experts(ctx, params, moe.experts, x, &offsets);
            (Some(y), Some((moe.experts, network, offsets)))
        }
        _ => (None, None),
    };
    (ExpertOutput { y, rows }, Saved { every, routed })
}

fn experts(ctx: &Ctx, params: &Params, ids: MlpIds, x: Shared, offsets: &Buf) -> (Buf, Network) {
    let (gate_up_w, down_w) = (params.weight(ids.gate_up), params.weight(ids.down));
    let capacity = x.len() / gate_up_w.cols;
    let mut gate_up = ctx.zeros(x.dtype(), capacity * gate_up_w.rows);
    gemm_grouped::grouped(ctx, x.view(), offsets.view(), &gate_up_w, gate_up.view_mut());
    let mut act = ctx.zeros(x.dtype(), capacity * down_w.cols);
    let rows = offsets.view().slice(offsets.len() - 1..offsets.len());
    swiglu::forward(ctx, gate_up.view(), down_w.cols, Some(rows), act.view_mut());
    let mut y = ctx.zeros(x.dtype(), capacity * down_w.rows);
    gemm_grouped::grouped(ctx, act.view(), offsets.view(), &down_w, y.view_mut());
    (y, Network { x, gate_up, act: Arc::new(act) })
}

/// From the gradients of both outputs to those of both inputs (dx `[n, D]`, d_rows `[cap, D]`); weight gradients are
/// queued.
pub fn backward_input(
    ctx: &Ctx,
    params: &Params,
    saved: Saved,
    dy: &Shared,
    d_rows: Option<Buf>,
    jobs: &mut WeightGrads,
) -> (Option<Buf>, Option<Buf>) {
    let dx = saved.every.map(|(ids, net)| {
        let width = params.layout.info(ids.down).cols;
        let mut d_act = ctx.zeros(dy.dtype(), net.act.len());
        linear_backward(ctx, params, ids.down, dy, &mut d_act, false);
        jobs.linear(ids.down, width, &net.act, dy);
        let mut d_gate_up = ctx.zeros(dy.dtype(), net.gate_up.len());
        swiglu::backward(ctx, d_act.view(), net.gate_up.view(), width, None, d_gate_up.view_mut());
        let d_gate_up = Arc::new(d_gate_up);
        let mut dx = ctx.zeros(dy.dtype(), net.x.len());
        linear_backward(ctx, params, ids.gate_up, &d_gate_up, &mut dx, false);
        jobs.linear(ids.gate_up, params.layout.info(ids.gate_up).cols, &net.x, &d_gate_up);
        dx
    });
    let d_rows = saved.routed.zip(d_rows).map(|((ids, net, offsets), d_rows)| {
        let (gate_up_w, down_w) = (params.weight(ids.gate_up), params.weight(ids.down));
        let d_rows = Arc::new(d_rows);
        let mut d_act = ctx.zeros(dy.dtype(), net.act.len());
        gemm_grouped::grouped_backward_input(ctx, d_rows.view(), offsets.view(), &down_w, d_act.view_mut());
        jobs.grouped(ids.down, &offsets, &net.act, &d_rows);
        let mut d_gate_up = ctx.zeros(dy.dtype(), net.gate_up.len());
        let rows = offsets.view().slice(offsets.len() - 1..offsets.len());
        swiglu::backward(ctx, d_act.view(), net.gate_up.view(), down_w.cols, Some(rows), d_gate_up.view_mut());
        let d_gate_up = Arc::new(d_gate_up);
        let mut dx = ctx.zeros(dy.dtype(), net.x.len());
        gemm_grouped::grouped_backward_input(ctx, d_gate_up.view(), offsets.view(), &gate_up_w, dx.view_mut());
        jobs.grouped(ids.gate_up, &offsets, &net.x, &d_gate_up);
        dx
    });
    (dx, d_rows)
}
