//! One transformer block: the four stages in a row. Pre-norm residuals: h1 = h + attention, y = h1 + feed-forward.

use crate::stages::dispatch::{GateOptions, Gradient};
use crate::stages::{attention, combine, dispatch, mlp};
use crate::weight_grad::{Shared, WeightGrads};
use crate::{BlockIds, Depth, Model, Params};
use hadal_kernels::Ctx;

/// What the stages of one block keep.
#[derive(Debug)]
pub struct Saved {
    attention: attention::Saved,
    /// Public for the routing it holds.
    pub dispatch: dispatch::Saved,
    mlp: mlp::Saved,
    combine: combine::Saved,
}

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        self.attention.bytes() + self.dispatch.bytes() + self.mlp.bytes() + self.combine.bytes()
    }
}

/// h `[n, D]` to y `[n, D]`.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    depth: &Depth,
    h: Shared,
    options: GateOptions<'_>,
) -> (Shared, Saved) {
    let (h1, attention) = attention::forward(ctx, model, params, ids, depth, h);
    let (input, dispatch) = dispatch::forward(ctx, model, params, ids, h1, options);
    let (output, mlp) = mlp::forward(ctx, model, params, ids, input);
    let (y, combine) = combine::forward(ctx, model, &dispatch, output);
    (y, Saved { attention, dispatch, mlp, combine })
}

/// dy `[n, D]` to dh `[n, D]`; weight gradients are queued.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    dy: Shared,
    jobs: &mut WeightGrads,
) -> Shared {
    let (d_rows, d_weights) = combine::backward_input(ctx, model, &saved.dispatch, saved.combine, &dy);
    let (dx, d_rows) = mlp::backward_input(ctx, params, saved.mlp, &dy, d_rows, jobs);
    let gradient = Gradient { dy, dx, d_rows, d_weights };
    let dh1 = dispatch::backward_input(ctx, model, params, saved.dispatch, gradient, jobs);
    attention::backward_input(ctx, model, params, saved.attention, dh1, jobs)
}
