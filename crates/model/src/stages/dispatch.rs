//! From h1 to the experts' inputs: x = RMSNorm(h1), the gate, rows sorted by expert, and the exchange that carries them
//! to the ranks that hold their experts. Where all stay, and products read rows by the plan, they are not sorted. A dense
//! layer has only the norm.

use super::Norm;
use super::mlp::InputGradient;
use crate::weight_grad::{ExpertRows, Shared, WeightGrads};
use crate::{BlockIds, FeedForwardIds, Model, MoeIds, Params};
use hadal_comm::Route;
use hadal_kernels::ops::{gemm, gemm_grouped, moe_permute, router, rows, seq_balance};
use hadal_kernels::{Buf, Ctx, DType, View};
use std::sync::Arc;

/// What the MLP stage reads.
#[derive(Debug)]
pub struct ExpertInput {
    /// `[n, D]`: the normed stream, for dense and shared MLPs.
    pub x: Shared,
    /// Rows `[cap, D]` of the local experts and their offsets (i32 `[local + 1]`); None in a dense layer.
    pub rows: Option<(ExpertRows, Shared)>,
}

/// What forward keeps.
#[derive(Debug)]
pub struct Saved {
    /// Its input is the residual stream h1 `[n, D]`.
    norm: Norm,
    /// `[n, D]`; None until backward needs it where it is computed again.
    x: Option<Shared>,
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
    pub slot_of_row: Shared,
    /// The experts' products read the rows of tokens: nobody sorts them.
    gathered: bool,
    /// i32 `[E + 1]`: rows of each global expert on the tokens' side; their differences are the load.
    pub offsets: Shared,
    /// How the rows went.
    pub route: Route,
    d_scores: Option<Buf>,
    /// f32 `[S]`: the balance loss of each sequence, without alpha.
    pub balance: Option<Shared>,
}

impl Saved {
    /// The residual stream `[n, D]`.
    pub(crate) fn h1(&self) -> &Shared {
        self.norm.x()
    }

    /// The normed stream `[n, D]`, kept or computed again, and from now on kept.
    pub(crate) fn x(&mut self, ctx: &Ctx, params: &Params) -> Shared {
        self.x.get_or_insert_with(|| self.norm.again(ctx, params)).clone()
    }

    /// The local experts' rows `[cap, D]`, gathered and sent again.
    pub(crate) fn rows(&mut self, ctx: &Ctx, model: &Model, params: &Params) -> ExpertRows {
        let x = self.x(ctx, params);
        let Some(gate) = &self.gate else { unreachable!("a dense layer has no experts") };
        gate.rows_of(ctx, model, &x)
    }

    /// Bytes kept until backward (h1 included, the expert rows not: the MLP stage keeps them).
    pub fn bytes(&self) -> usize {
        let gate = self.gate.as_ref().map_or(0, |g| {
            let extra = g.d_scores.as_ref().map_or(0, Buf::bytes) + g.balance.as_ref().map_or(0, |b| b.bytes());
            g.scores.bytes()
                + g.indices.bytes()
                + g.weights.bytes()
                + g.row_of_slot.bytes()
                + g.slot_of_row.bytes()
                + g.offsets.bytes()
                + g.route.bytes()
                + extra
        });
        self.norm.bytes_with_input() + self.x.as_ref().map_or(0, |x| x.bytes()) + gate
    }
}

impl Gate {
    /// Rows `[cap, D]` of the local experts, from those of the tokens, `[n, D]`.
    pub(super) fn rows_of(&self, ctx: &Ctx, model: &Model, x: &Shared) -> ExpertRows {
        if self.gathered {
            return tokens(model, x, &self.slot_of_row);
        }
        let rows = gather(ctx, model, x, [&self.row_of_slot, &self.slot_of_row]);
        ExpertRows::Sorted(Arc::new(model.exchange.redispatch(ctx, rows, &self.route, model.config.hidden_size)))
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
    let keep = |x: Shared| model.recompute.stages_keep().then_some(x);
    let FeedForwardIds::Moe(moe) = ids.feed_forward else {
        return (ExpertInput { x: x.clone(), rows: None }, Saved { norm, x: keep(x), gate: None });
    };
    let (gate, rows) = route(ctx, model, params, moe, &x, n, options);
    let offsets = Arc::new(gate.route.offsets.clone());
    let input = ExpertInput { x: x.clone(), rows: Some((rows, offsets)) };
    (input, Saved { norm, x: keep(x), gate: Some(gate) })
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
) -> (Gate, ExpertRows) {
    let c = model.config.router();
    let (e, k, d) = (c.experts, c.top_k, model.config.hidden_size);
    let mut logits = ctx.empty(DType::F32, n * e);
    gemm::linear(ctx, x.view(), &params.weight(ids.gate), logits.view_mut());
    let (mut scores, mut weights) = (ctx.empty(DType::F32, n * e), ctx.empty(DType::F32, n * k));
    let mut indices = ctx.empty(DType::I32, n * k);
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

    let mut offsets = ctx.empty(DType::I32, e + 1);
    let (mut row_of_slot, mut slot_of_row) = (ctx.empty(DType::I32, n * k), ctx.empty(DType::I32, n * k));
    moe_permute::plan(ctx, indices.view(), e, offsets.view_mut(), row_of_slot.view_mut(), slot_of_row.view_mut());
    let slot_of_row = Arc::new(slot_of_row);
    let stay = if gemm_grouped::gathers(&ctx.device) { model.exchange.stay(&offsets) } else { None };
    let gathered = stay.is_some();
    let (rows, route) = match stay {
        Some(route) => (tokens(model, x, &slot_of_row), route),
        None => {
            let rows = gather(ctx, model, x, [&row_of_slot, &slot_of_row]);
            let (rows, route) = model.exchange.dispatch(ctx, rows, &offsets, d);
            (ExpertRows::Sorted(Arc::new(rows)), route)
        }
    };
    let gate = Gate {
        ids,
        scores,
        indices: Arc::new(indices),
        weights,
        row_of_slot,
        slot_of_row,
        gathered,
        offsets: Arc::new(offsets),
        route,
        d_scores,
        balance: balance.map(Arc::new),
    };
    (gate, rows)
}

/// Rows that products read from x `[n, D]`.
fn tokens(model: &Model, x: &Shared, slot_of_row: &Shared) -> ExpertRows {
    let (x, slot_of_row) = (x.clone(), slot_of_row.clone());
    ExpertRows::Tokens { x, slot_of_row, top_k: model.config.num_experts_per_tok }
}

/// x `[n, D]` to rows `[n K, D]` sorted by expert; `plan` is row_of_slot and slot_of_row.
fn gather(ctx: &Ctx, model: &Model, x: &Buf, plan: [&Buf; 2]) -> Buf {
    let d = model.config.hidden_size;
    let mut rows = ctx.empty(x.dtype(), plan[0].len() * d);
    let k = model.config.num_experts_per_tok;
    moe_permute::permute(ctx, x.view(), d, k, plan.map(Buf::view), rows.view_mut());
    rows
}

/// (gradient of the scores, loss of each sequence).
fn balance(ctx: &Ctx, c: &router::Config, scores: &Buf, (cu, seq_weights): (View<'_>, View<'_>)) -> (Buf, Buf) {
    let mut loss = ctx.empty(DType::F32, seq_weights.len());
    let mut d_scores = ctx.empty(DType::F32, scores.len());
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
    /// Of the expert rows and their weights, on the experts' side.
    pub experts: Option<InputGradient>,
}

/// To dh1 `[n, D]`; weight gradients go to `jobs`.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    mut saved: Saved,
    g: Gradient,
    jobs: &mut WeightGrads<'_>,
) -> Shared {
    let d = model.config.hidden_size;
    let accumulate = g.dx.is_some();
    let mut dx = g.dx.unwrap_or_else(|| ctx.empty(saved.h1().dtype(), saved.h1().len()));
    let x = saved.gate.is_some().then(|| saved.x(ctx, params));
    if let (Some(gate), Some(x), Some(g)) = (saved.gate, x, g.experts) {
        let c = model.config.router();
        let row_of_slot = gate.row_of_slot.view();
        let d_rows = model.exchange.combine(ctx, g.rows, &gate.route, d);
        moe_permute::permute_backward(ctx, d_rows.view(), d, c.top_k, row_of_slot, dx.view_mut(), accumulate);
        drop(d_rows);
        let by_row = model.exchange.combine(ctx, g.weights, &gate.route, 1);
        let mut d_weights = ctx.empty(DType::F32, by_row.len());
        rows::gather(ctx, by_row.view(), 1, row_of_slot, d_weights.view_mut());
        let mut d_logits = ctx.empty(DType::F32, gate.scores.len());
        let b = router::Backward {
            scores: gate.scores.view(),
            indices: gate.indices.view(),
            d_weights: d_weights.view(),
            d_scores: gate.d_scores.as_ref().map(Buf::view),
            d_logits: d_logits.view_mut(),
        };
        router::backward(ctx, &c, b);
        super::linear_backward(ctx, params, gate.ids.gate, &d_logits, &mut dx, true);
        jobs.linear(gate.ids.gate, d, &x, &Arc::new(d_logits));
    }
    drop(saved.x);
    let mut dh1 = Arc::unwrap_or_clone(g.dy);
    saved.norm.backward(ctx, params, &Arc::new(dx), &mut dh1, true, jobs);
    Arc::new(dh1)
}
