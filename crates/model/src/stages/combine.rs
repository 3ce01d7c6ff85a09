//! Expert outputs back to their tokens: y = h1 + sum_k w_k E_k + shared, summed in slot order in f32 and rounded once.
//!
//! The gradient of a routing weight, dy . E_k, would need the experts' outputs. E_k is a product of the expert's down
//! matrix and its inner activation a, so that it is also (down^T dy) . a: the left side is on the way of backward
//! anyway, a comes with SwiGLU's backward, and outputs need not be kept. So the weights travel to the experts with dy,
//! and their gradients travel back (`dispatch`).

use super::dispatch;
use super::mlp::ExpertOutput;
use crate::Model;
use crate::weight_grad::{ExpertRows, Shared};
use hadal_kernels::ops::{add, moe_permute, rows};
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// What forward keeps: nothing.
#[derive(Debug)]
pub struct Saved;

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        0
    }
}

/// The block's output `[n, D]`.
pub fn forward(ctx: &Ctx, model: &Model, dispatched: &dispatch::Saved, output: ExpertOutput) -> (Shared, Saved) {
    let d = model.config.hidden_size;
    let h1 = dispatched.h1();
    let (Some(gate), Some(rows)) = (&dispatched.gate, output.rows) else {
        let Some(mut y) = output.y else { unreachable!("a dense layer's MLP has an output") };
        add::accumulate(ctx, h1.view(), y.view_mut());
        return (Arc::new(y), Saved);
    };
    let rows = model.exchange.combine(ctx, rows, &gate.route, d);
    let mut y = ctx.empty(h1.dtype(), h1.len());
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
    (Arc::new(y), Saved)
}

/// Of the experts' outputs and the weights they are summed with, on the experts' side, by row.
#[derive(Debug)]
pub struct ExpertGradient {
    /// `[cap, D]`.
    pub rows: ExpertRows,
    /// f32 `[cap]`.
    pub weights: Buf,
}

/// From dy `[n, D]` to what the experts' backward reads: each row's dy, not yet times its weight, and the weights. The
/// dense or shared output's gradient, and the residual stream's, is dy itself.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    dispatched: &dispatch::Saved,
    _: Saved,
    dy: &Shared,
) -> Option<ExpertGradient> {
    let gate = dispatched.gate.as_ref()?;
    let rows = gate.rows_of(ctx, model, dy);
    let mut weights = ctx.empty(DType::F32, gate.weights.len());
    rows::gather(ctx, gate.weights.view(), 1, gate.slot_of_row.view(), weights.view_mut());
    Some(ExpertGradient { rows, weights: model.exchange.redispatch(ctx, weights, &gate.route, 1) })
}
