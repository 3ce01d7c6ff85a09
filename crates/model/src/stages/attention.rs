//! Multi-head Latent Attention (V2 report 2.1, V3 report 2.1.1): h1 = h + o_proj(attention(RMSNorm(h))).

use super::{Norm, linear, linear_backward};
use crate::config::LATENT_NORM_EPS;
use crate::weight_grad::{Shared, WeightGrads};
use crate::{AttentionIds, BlockIds, Depth, Model, ModelConfig, Params};
use hadal_kernels::ops::{add, mla_prefill, rope};
use hadal_kernels::{Buf, Ctx, DType, ViewMut};
use std::sync::Arc;

/// What forward keeps. Optional is what it may leave to be computed again.
#[derive(Debug)]
pub struct Saved {
    ids: AttentionIds,
    places: Places,
    /// Its input is h.
    norm: Norm,
    /// Of q_a's output; None without a query latent.
    q_norm: Option<Norm>,
    /// Its input is `[n, C + R]`: raw c_kv, then rotated k_pe.
    kv_norm: Norm,
    normed: Option<Shared>,
    q_latent: Option<Shared>,
    q: Option<Shared>,
    c_kv: Option<Shared>,
    kv_up: Option<Shared>,
    out: Shared,
    lse: Shared,
}

/// Where the tokens of a batch are.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// i32 `[S + 1]`.
    pub cu: Shared,
    /// i32 `[n]`.
    pub positions: Shared,
}

impl Places {
    pub(crate) fn of(depth: &Depth) -> Self {
        Self { cu: depth.cu.clone(), positions: depth.positions.clone() }
    }
}

/// Queries and latents of n tokens, and what their backward needs.
#[derive(Debug)]
pub(crate) struct Projected {
    pub n: usize,
    norm: Norm,
    normed: Shared,
    /// q_a's output norm and its normed latent.
    q_latent: Option<(Norm, Shared)>,
    /// `[n, H, P + R]`, rotated.
    pub q: Shared,
    kv_norm: Norm,
    /// `[n, C + R]`: raw c_kv, then rotated k_pe.
    pub kv_a: Shared,
    /// `[n, C]`, normalised.
    pub c_kv: Shared,
}

impl Saved {
    fn new(model: &Model, ids: &AttentionIds, places: Places, p: Projected, kv_up: Buf, [out, lse]: [Buf; 2]) -> Self {
        let all = model.recompute.stages_keep();
        let keep = |x: Shared| all.then_some(x);
        let (q_norm, q_latent) = p.q_latent.unzip();
        Self {
            ids: ids.clone(),
            places,
            norm: p.norm,
            kv_norm: p.kv_norm,
            normed: keep(p.normed),
            q_latent: q_latent.and_then(keep),
            // Without a latent, the query is no up-projection but a product as large as any.
            q: (all || q_norm.is_none()).then_some(p.q),
            q_norm,
            c_kv: keep(p.c_kv),
            kv_up: keep(Arc::new(kv_up)),
            out: Arc::new(out),
            lse: Arc::new(lse),
        }
    }

    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        let norms = [Some(&self.norm), self.q_norm.as_ref(), Some(&self.kv_norm)];
        let optional = [&self.normed, &self.q_latent, &self.q, &self.c_kv, &self.kv_up];
        norms.into_iter().flatten().map(Norm::bytes_with_input).sum::<usize>()
            + optional.into_iter().flatten().map(|b| b.bytes()).sum::<usize>()
            + self.out.bytes()
            + self.lse.bytes()
    }
}

/// The op's sizes under this model.
pub(crate) fn shape(c: &ModelConfig) -> mla_prefill::Shape {
    mla_prefill::Shape {
        heads: c.num_attention_heads,
        nope: c.qk_nope_head_dim,
        rope: c.qk_rope_head_dim,
        v: c.v_head_dim,
        k_pe_stride: c.cache_width(),
        scale: c.softmax_scale(),
    }
}

/// Rotates the rotary parts of q `[n, H, P + R]` in place; back if `inverse`.
fn rotate_queries(ctx: &Ctx, model: &Model, positions: &Buf, q: ViewMut<'_>, inverse: bool) {
    let c = &model.config;
    let (heads, head) = (c.num_attention_heads, c.qk_head_dim());
    rotate(ctx, model, positions, inverse, (q, heads * head, c.qk_nope_head_dim, heads, head));
}

/// Rotates the rotary part of kv_a `[n, C + R]` in place; back if `inverse`.
fn rotate_keys(ctx: &Ctx, model: &Model, positions: &Buf, kv_a: ViewMut<'_>, inverse: bool) {
    let c = &model.config;
    rotate(ctx, model, positions, inverse, (kv_a, c.cache_width(), c.kv_lora_rank, 1, c.qk_rope_head_dim));
}

/// Rotates within x: elements from token to token, where the first head's part is, heads, elements from head to head.
fn rotate(
    ctx: &Ctx,
    model: &Model,
    positions: &Buf,
    inverse: bool,
    (x, token_stride, offset, heads, head_stride): (ViewMut<'_>, usize, usize, usize, usize),
) {
    let c = &model.config;
    let a = rope::Rope {
        x,
        token_stride,
        offset,
        heads,
        head_stride,
        positions: positions.view(),
        inv_freq: model.inv_freq.view(),
        factor: c.rope_factor(),
        interleaved: c.rope.interleaved,
        inverse,
    };
    rope::apply(ctx, a);
}

/// RMSNorm, query and latent projections, RoPE.
pub(crate) fn project(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    positions: &Buf,
    h: &Shared,
) -> Projected {
    let c = &model.config;
    let n = positions.len();
    let a = &ids.attention;
    let eps = c.rms_norm_eps as f32;
    let (normed, norm) = Norm::forward(ctx, params, ids.input_norm, (h, c.hidden_size), n, eps);
    let (mut q, q_latent) = match (a.q_proj, a.q_lora) {
        (Some(q_proj), _) => (linear(ctx, params, q_proj, &normed, n), None),
        (None, Some((q_a, q_norm, q_b))) => {
            let latent = Arc::new(linear(ctx, params, q_a, &normed, n));
            let rank = params.layout.info(q_a).rows;
            let (y, norm) = Norm::forward(ctx, params, q_norm, (&latent, rank), n, LATENT_NORM_EPS);
            (linear(ctx, params, q_b, &y, n), Some((norm, y)))
        }
        (None, None) => unreachable!("a layout has q_proj or q_lora"),
    };
    let mut kv_a = linear(ctx, params, a.kv_a, &normed, n);
    rotate_queries(ctx, model, positions, q.view_mut(), false);
    rotate_keys(ctx, model, positions, kv_a.view_mut(), false);
    let kv_a = Arc::new(kv_a);
    let (c_kv, kv_norm) = Norm::forward(ctx, params, a.kv_a_norm, (&kv_a, c.cache_width()), n, LATENT_NORM_EPS);
    Projected { n, norm, normed, q_latent, q: Arc::new(q), kv_norm, kv_a, c_kv }
}

/// h + o_proj(out).
pub(crate) fn output(ctx: &Ctx, params: &Params, ids: &BlockIds, h: &Buf, out: &Buf, n: usize) -> Shared {
    let mut h1 = linear(ctx, params, ids.attention.o_proj, out, n);
    add::accumulate(ctx, h.view(), h1.view_mut());
    Arc::new(h1)
}

/// h `[n, D]` to h1 `[n, D]`.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, depth: &Depth, h: Shared) -> (Shared, Saved) {
    forward_at(ctx, model, params, ids, Places::of(depth), h)
}

/// As [`forward`], of tokens that are at these places.
pub(crate) fn forward_at(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    places: Places,
    h: Shared,
) -> (Shared, Saved) {
    let c = &model.config;
    let p = project(ctx, model, params, ids, &places.positions, &h);
    let kv_up = linear(ctx, params, ids.attention.kv_b, &p.c_kv, p.n);
    let mut out = ctx.empty(h.dtype(), p.n * c.num_attention_heads * c.v_head_dim);
    let mut lse = ctx.empty(DType::F32, p.n * c.num_attention_heads);
    let x = inputs(model, &p.q, &p.kv_a, &kv_up, &places.cu);
    mla_prefill::forward(ctx, shape(&model.config), x, out.view_mut(), lse.view_mut());
    let h1 = output(ctx, params, ids, &h, &out, p.n);
    (h1, Saved::new(model, &ids.attention, places, p, kv_up, [out, lse]))
}

fn inputs<'a>(model: &Model, q: &'a Buf, kv_a: &'a Buf, kv_up: &'a Buf, cu: &'a Buf) -> mla_prefill::Inputs<'a> {
    let tail = model.config.kv_lora_rank.min(kv_a.len())..kv_a.len();
    mla_prefill::Inputs {
        q: q.view(),
        kv_up: kv_up.view(),
        k_pe: kv_a.view().slice(tail),
        cu_q: cu.view(),
        cu_k: cu.view(),
    }
}

/// q from its normed latent.
fn queries(ctx: &Ctx, model: &Model, params: &Params, ids: &AttentionIds, latent: &Buf, positions: &Buf) -> Shared {
    let Some((_, _, q_b)) = ids.q_lora else { unreachable!("a query without a latent is kept") };
    let mut q = linear(ctx, params, q_b, latent, positions.len());
    rotate_queries(ctx, model, positions, q.view_mut(), false);
    Arc::new(q)
}

/// What the softmax's backward reads, dropped behind it.
struct Scores {
    q: Shared,
    kv_up: Shared,
    out: Shared,
    lse: Shared,
    d_out: Buf,
}

/// Gradients of q and kv_up, and of kv_a whose first C columns are left to the norm.
fn scores_backward(ctx: &Ctx, model: &Model, places: &Places, kv_a: &Buf, s: Scores) -> [Buf; 3] {
    let act = kv_a.dtype();
    let [mut dq, mut dkv_up, mut dkv_a] = [&s.q, &s.kv_up, kv_a].map(|x| ctx.empty(act, x.len()));
    let tail = model.config.kv_lora_rank.min(dkv_a.len())..dkv_a.len();
    let b = mla_prefill::Backward {
        out: s.out.view(),
        lse: s.lse.view(),
        dout: s.d_out.view(),
        dq: dq.view_mut(),
        dkv_up: dkv_up.view_mut(),
        dk_pe: dkv_a.view_mut().slice(tail),
        dk_pe_stride: model.config.cache_width(),
    };
    mla_prefill::backward(ctx, shape(&model.config), inputs(model, &s.q, kv_a, &s.kv_up, &places.cu), b);
    rotate_queries(ctx, model, &places.positions, dq.view_mut(), true);
    rotate_keys(ctx, model, &places.positions, dkv_a.view_mut(), true);
    [dq, dkv_up, dkv_a]
}

/// dh1 `[n, D]` to dh `[n, D]`; weight gradients go to `jobs`.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    dh1: Shared,
    jobs: &mut WeightGrads<'_>,
) -> Shared {
    let Saved { ids, places, norm, q_norm, kv_norm, normed, q_latent, q, c_kv, kv_up, out, lse } = saved;
    let (act, n) = (dh1.dtype(), places.positions.len());
    let mut d_out = ctx.empty(act, out.len());
    linear_backward(ctx, params, ids.o_proj, &dh1, &mut d_out, false);
    jobs.linear(ids.o_proj, params.layout.info(ids.o_proj).cols, &out, &dh1);

    let c_kv = c_kv.unwrap_or_else(|| kv_norm.again(ctx, params));
    let q_latent = q_norm.as_ref().map(|norm| q_latent.unwrap_or_else(|| norm.again(ctx, params)));
    let kv_up = kv_up.unwrap_or_else(|| Arc::new(linear(ctx, params, ids.kv_b, &c_kv, n)));
    let q = q.or_else(|| Some(queries(ctx, model, params, &ids, q_latent.as_ref()?, &places.positions)));
    let Some(q) = q else { unreachable!("a query without a latent is kept") };
    let scores = Scores { q, kv_up, out, lse, d_out };
    let [dq, dkv_up, mut dkv_a] = scores_backward(ctx, model, &places, kv_norm.x(), scores);

    // The latent's path: kv_b, the norm (into the first C columns of dkv_a), kv_a.
    let dkv_up = Arc::new(dkv_up);
    let mut d_c = ctx.empty(act, c_kv.len());
    linear_backward(ctx, params, ids.kv_b, &dkv_up, &mut d_c, false);
    jobs.linear(ids.kv_b, params.layout.info(ids.kv_b).cols, &c_kv, &dkv_up);
    drop((c_kv, dkv_up));
    kv_norm.backward(ctx, params, &Arc::new(d_c), &mut dkv_a, false, jobs);
    drop(kv_norm);
    let normed = normed.unwrap_or_else(|| norm.again(ctx, params));
    let dkv_a = Arc::new(dkv_a);
    let mut d_normed = ctx.empty(act, normed.len());
    linear_backward(ctx, params, ids.kv_a, &dkv_a, &mut d_normed, false);
    jobs.linear(ids.kv_a, model.config.hidden_size, &normed, &dkv_a);
    drop(dkv_a);

    // The query's path joins the same normed input.
    let latent = q_norm.zip(q_latent);
    query_backward(ctx, params, &ids, latent, &Arc::new(dq), (&normed, &mut d_normed), jobs);
    drop(normed);
    let mut dh = Arc::unwrap_or_clone(dh1);
    norm.backward(ctx, params, &Arc::new(d_normed), &mut dh, true, jobs);
    Arc::new(dh)
}

/// Adds the queries' share to the gradient of the normed input.
fn query_backward(
    ctx: &Ctx,
    params: &Params,
    ids: &AttentionIds,
    latent: Option<(Norm, Shared)>,
    dq: &Shared,
    (normed, d_normed): (&Shared, &mut Buf),
    jobs: &mut WeightGrads<'_>,
) {
    let cols = |id| params.layout.info(id).cols;
    if let (Some((q_a, _, q_b)), Some((norm, latent))) = (ids.q_lora, latent) {
        let mut d_latent = ctx.empty(dq.dtype(), latent.len());
        linear_backward(ctx, params, q_b, dq, &mut d_latent, false);
        jobs.linear(q_b, cols(q_b), &latent, dq);
        let mut d_q_a = ctx.empty(dq.dtype(), latent.len());
        norm.backward(ctx, params, &Arc::new(d_latent), &mut d_q_a, false, jobs);
        let d_q_a = Arc::new(d_q_a);
        linear_backward(ctx, params, q_a, &d_q_a, d_normed, true);
        jobs.linear(q_a, cols(q_a), normed, &d_q_a);
    } else if let Some(q_proj) = ids.q_proj {
        linear_backward(ctx, params, q_proj, dq, d_normed, true);
        jobs.linear(q_proj, cols(q_proj), normed, dq);
    }
}
