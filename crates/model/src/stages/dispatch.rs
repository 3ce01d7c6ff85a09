//! From h1 to the experts' inputs: x = RMSNorm(h1), the gate, rows sorted by expert, and the exchange that carries them
//! to the ranks that hold their experts. A dense layer has only the norm.

use super::Norm;
use crate::weight_grad::{Shared, WeightGrads};
use crate::{BlockIds, FeedForwardIds, Model, MoeIds, Params};
use hadal_comm::Route;
use hadal_kernels::ops::{gemm, moe_permute, router, seq_balance};
use hadal_kernels::{Buf, Ctx, DType, View};
use std::sync::Arc;

/// What the MLP stage reads.
#[derive(Debug)]
pub struct ExpertInput {
    /// `[n, D]`: the normed stream, for dense and shared MLPs.
    pub x: Shared,
    /// Rows `[cap, D]` of the local experts and their offsets (i32 `[local + 1]`); None in a dense layer.
    pub rows: Option<(Shared, Shared)>,
}

/// What forward keeps.
#[derive(Debug)]
pub struct Saved {
    /// The residual stream `[n, D]`.
    pub h1: Shared,
    norm: Norm,
    x: Shared,
    /// The gate; None in a dense layer.
    pub gate: Option<Gate>,
}

/// One layer's routing.
#[derive(Debug)]
pub struct Gate {
    ids: MoeIds,
    scores: Buf,
    /// i32 `[n, K]`.
    pub indices: Shared,
    /// f32 `[n, K]`.
    pub weights: Buf,
    /// i32 `[n K]`.
    pub row_of_slot: Buf,
    /// i32 `[n K]`.
    pub slot_of_row: Buf,
    /// i32 `[E + 1]`: rows of each global expert on the tokens' side; their differences are the load.
    pub offsets: Shared,
    /// How the rows went.
    pub route: Route,
    d_scores: Option<Buf>,
    /// f32 `[S]`: the balance loss of each sequence, without alpha.
    pub balance: Option<Buf>,
}

impl Saved {
    /// Bytes kept until backward (h1 included, the expert rows not: the MLP stage keeps them).
    pub fn bytes(&self) -> usize {
        let gate = self.gate.as_ref().map_or(0, |g| {
            let extra = g.d_scores.as_ref().map_or(0, Buf::bytes) + g.balance.as_ref().map_or(0, Buf::bytes);
            g.scores.bytes()
                + g.indices.bytes()
                + g.weights.bytes()
                + g.row_of_slot.bytes()
                + g.slot_of_row.bytes()
                + g.offsets.bytes()
                + g.route.bytes()
                + extra
        });
        self.h1.bytes() + self.x.bytes() + self.norm.bytes() + gate
    }
}

/// What the gate may be told.
#[derive(Clone, Copy, Debug, Default)]
pub struct GateOptions<'a> {
    /// i32 `[n, K]`: replay this choice.
    pub given: Option<View<'a>>,
    /// (i32 `[S + 1]`, f32 `[S]`): sequences and the weight of each one's balance loss; None leaves the loss out.
    pub balance: Option<(View<'a>, View<'a>)>,
}

/// h1 `[n, D]` to the experts' inputs.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    h1: Shared,
    options: GateOptions<'_>,
) -> (ExpertInput, Saved) {
    let d = model.config.hidden_size;
    let n = h1.len() / d;
    let eps = model.config.rms_norm_eps as f32;
    let (x, norm) = Norm::forward(ctx, params, ids.post_attention_norm, (&h1, d), n, eps);
    let FeedForwardIds::Moe(moe) = ids.feed_forward else {
        return (ExpertInput { x: x.clone(), rows: None }, Saved { h1, norm, x, gate: None });
    };
    let (gate, rows) = route(ctx, model, params, moe, &x, n, options);
    let offsets = Arc::new(gate.route.offsets.clone());
    let input = ExpertInput { x: x.clone(), rows: Some((Arc::new(rows), offsets)) };
    (input, Saved { h1, norm, x, gate: Some(gate) })
}

/// The gate's logits are a product in f32 whatever the activation dtype (V3 report 3.3.1 keeps the gate in high
/// precision).
fn route(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: MoeIds,
    x: &Shared,
    n: usize,
    options: GateOptions<'_>,
) -> (Gate, Buf) {
    let c = model.config.router();
    let (e, k, d) = (c.experts, c.top_k, model.config.hidden_size);
    let mut logits = ctx.zeros(DType::F32, n * e);
    gemm::linear(ctx, x.view(), &params.weight(ids.gate), logits.view_mut());
    let (mut scores, mut weights) = (ctx.zeros(DType::F32, n * e), ctx.zeros(DType::F32, n * k));
    let mut indices = ctx.zeros(DType::I32, n * k);
    let a = router::Forward {
        logits: logits.view(),
        bias: ids.bias.map(|b| params.f32(b)),
        given: options.given,
        scores: scores.view_mut(),
        indices: indices.view_mut(),
        weights: weights.view_mut(),
    };
    router::forward(ctx, &c, a);
    let (d_scores, balance) = options.balance.map(|b| balance(ctx, &c, &scores, b)).unzip();

    let mut offsets = ctx.zeros(DType::I32, e + 1);
    let (mut row_of_slot, mut slot_of_row) = (ctx.zeros(DType::I32, n * k), ctx.zeros(DType::I32, n * k));
    moe_permute::plan(ctx, indices.view(), e, offsets.view_mut(), row_of_slot.view_mut(), slot_of_row.view_mut());
    let mut rows = ctx.zeros(x.dtype(), n * k * d);
    moe_permute::permute(ctx, x.view(), d, k, slot_of_row.view(), rows.view_mut());
    let (rows, route) = model.exchange.dispatch(ctx, rows, &offsets, d);
    let gate = Gate {
        ids,
        scores,
        indices: Arc::new(indices),
        weights,
        row_of_slot,
        slot_of_row,
        offsets: Arc::new(offsets),
        route,
        d_scores,
        balance,
    };
    (gate, rows)
}

/// (gradient of the scores, loss of each sequence).
fn balance(ctx: &Ctx, c: &router::Config, scores: &Buf, (cu, seq_weights): (View<'_>, View<'_>)) -> (Buf, Buf) {
    let mut loss = ctx.zeros(DType::F32, seq_weights.len());
    let mut d_scores = ctx.zeros(DType::F32, scores.len());
    let a = seq_balance::SeqBalance {
        scores: scores.view(),
        experts: c.experts,
        top_k: c.top_k,
        cu,
        seq_weights,
        loss: loss.view_mut(),
        d_scores: d_scores.view_mut(),
    };
    seq_balance::forward_backward(ctx, a);
    (d_scores, loss)
}

/// What the later stages' backward hands to this one.
#[derive(Debug)]
pub struct Gradient {
    /// `[n, D]`: of the residual stream beyond this block.
    pub dy: Shared,
    /// `[n, D]`: of the normed stream through dense or shared MLP; None without shared experts.
    pub dx: Option<Buf>,
    /// `[cap, D]`: of the expert rows, on the experts' side.
    pub d_rows: Option<Buf>,
    /// f32 `[n, K]`.
    pub d_weights: Option<Buf>,
}

/// To dh1 `[n, D]`; weight gradients are queued.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    g: Gradient,
    jobs: &mut WeightGrads,
) -> Shared {
    let d = model.config.hidden_size;
    let accumulate = g.dx.is_some();
    let mut dx = g.dx.unwrap_or_else(|| ctx.zeros(saved.x.dtype(), saved.x.len()));
    if let Some(gate) = &saved.gate {
        let (Some(d_rows), Some(d_weights)) = (g.d_rows, g.d_weights) else {
            unreachable!("a MoE layer's combine and MLP stages return gradients of rows and weights");
        };
        let c = model.config.router();
        let d_rows = model.exchange.combine(ctx, d_rows, &gate.route, d);
        moe_permute::permute_backward(
            ctx,
            d_rows.view(),
            d,
            c.top_k,
            gate.row_of_slot.view(),
            dx.view_mut(),
            accumulate,
        );
        let mut d_logits = ctx.zeros(DType::F32, gate.scores.len());
        let b = router::Backward {
            scores: gate.scores.view(),
            indices: gate.indices.view(),
            d_weights: d_weights.view(),
            d_scores: gate.d_scores.as_ref().map(Buf::view),
            d_logits: d_logits.view_mut(),
        };
        router::backward(ctx, &c, b);
        super::linear_backward(ctx, params, gate.ids.gate, &d_logits, &mut dx, true);
        jobs.linear(gate.ids.gate, d, &saved.x, &Arc::new(d_logits));
    }
    let mut dh1 = Buf::clone(&g.dy);
    saved.norm.backward(ctx, params, &Arc::new(dx), &mut dh1, true, jobs);
    Arc::new(dh1)
}
