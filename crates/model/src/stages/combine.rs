//! Expert outputs back to their tokens: y = h1 + sum_k w_k E_k + shared, summed in slot order in f32 and rounded once.

use super::dispatch;
use super::mlp::ExpertOutput;
use crate::Model;
use crate::weight_grad::Shared;
use hadal_kernels::ops::{add, moe_permute};
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// What forward keeps: the experts' outputs on the tokens' side `[n K, D]`, for the gradient of the routing weights.
#[derive(Debug)]
pub struct Saved {
    rows: Option<Buf>,
}

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        self.rows.as_ref().map_or(0, Buf::bytes)
    }
}

/// The block's output `[n, D]`.
pub fn forward(ctx: &Ctx, model: &Model, dispatched: &dispatch::Saved, output: ExpertOutput) -> (Shared, Saved) {
    let d = model.config.hidden_size;
    let h1 = &dispatched.h1;
    let mut y = ctx.zeros(h1.dtype(), h1.len());
    let (Some(gate), Some(rows)) = (&dispatched.gate, output.rows) else {
        let Some(mlp) = output.y else { unreachable!("a dense layer's MLP has an output") };
        add::add(ctx, h1.view(), mlp.view(), y.view_mut());
        return (Arc::new(y), Saved { rows: None });
    };
    let rows = model.exchange.combine(ctx, rows, &gate.route, d);
    let a = moe_permute::Combine {
        rows: rows.view(),
        dim: d,
        top_k: model.config.num_experts_per_tok,
        row_of_slot: gate.row_of_slot.view(),
        weights: gate.weights.view(),
        base: Some(h1.view()),
        extra: output.y.as_ref().map(Buf::view),
        y: y.view_mut(),
    };
    moe_permute::combine(ctx, a);
    (Arc::new(y), Saved { rows: Some(rows) })
}

/// From dy `[n, D]`: the gradient of the experts' outputs on their side and of the routing weights f32 `[n, K]`. The
/// dense or shared output's gradient, and the residual stream's, is dy itself.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    dispatched: &dispatch::Saved,
    saved: Saved,
    dy: &Buf,
) -> (Option<Buf>, Option<Buf>) {
    let (Some(gate), Some(rows)) = (&dispatched.gate, saved.rows) else { return (None, None) };
    let d = model.config.hidden_size;
    let mut d_rows = ctx.zeros(dy.dtype(), rows.len());
    let mut d_weights = ctx.zeros(DType::F32, gate.weights.len());
    moe_permute::combine_backward(
        ctx,
        dy.view(),
        d,
        model.config.num_experts_per_tok,
        gate.slot_of_row.view(),
        gate.weights.view(),
        rows.view(),
        d_rows.view_mut(),
        d_weights.view_mut(),
    );
    (Some(model.exchange.redispatch(ctx, d_rows, &gate.route, d)), Some(d_weights))
}
