//! Multi-head Latent Attention (V2 report 2.1, V3 report 2.1.1): h1 = h + o_proj(attention(RMSNorm(h))).
//!
//! Forward keeps everything that backward reads; what to recompute instead is a later choice, made here.

use super::{Norm, linear, linear_backward};
use crate::config::LATENT_NORM_EPS;
use crate::weight_grad::{Shared, WeightGrads};
use crate::{BlockIds, Depth, Model, Params};
use hadal_kernels::ops::{add, mla_prefill, rope};
use hadal_kernels::{Buf, Ctx, DType, ViewMut};
use std::sync::Arc;

/// What forward keeps.
#[derive(Debug)]
pub struct Saved {
    ids: BlockIds,
    h: Shared,
    projected: Projected,
    kv_up: Shared,
    out: Shared,
    lse: Shared,
    cu: Shared,
    positions: Shared,
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
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        let p = &self.projected;
        let latent = p.q_latent.as_ref().map_or(0, |(n, q)| n.x.bytes() + n.bytes() + q.bytes());
        let buffers = [&self.h, &p.normed, &p.q, &p.kv_a, &p.c_kv, &self.kv_up, &self.out, &self.lse];
        buffers.iter().map(|b| b.bytes()).sum::<usize>() + latent + p.norm.bytes() + p.kv_norm.bytes()
    }
}

/// The op's sizes under this model.
fn shape(model: &Model) -> mla_prefill::Shape {
    let c = &model.config;
    mla_prefill::Shape {
        heads: c.num_attention_heads,
        nope: c.qk_nope_head_dim,
        rope: c.qk_rope_head_dim,
        v: c.v_head_dim,
        k_pe_stride: c.cache_width(),
        scale: c.softmax_scale(),
    }
}

/// Rotates the rotary parts of q `[n, H, P + R]` and of kv_a `[n, C + R]`, in place; back if `inverse`.
fn rotate(ctx: &Ctx, model: &Model, positions: &Buf, q: ViewMut<'_>, kv_a: ViewMut<'_>, inverse: bool) {
    let c = &model.config;
    let (heads, head) = (c.num_attention_heads, c.qk_head_dim());
    let parts = [
        (q, heads * head, c.qk_nope_head_dim, heads, head),
        (kv_a, c.cache_width(), c.kv_lora_rank, 1, c.qk_rope_head_dim),
    ];
    for (x, token_stride, offset, heads, head_stride) in parts {
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
    rotate(ctx, model, positions, q.view_mut(), kv_a.view_mut(), false);
    let kv_a = Arc::new(kv_a);
    let (c_kv, kv_norm) = Norm::forward(ctx, params, a.kv_a_norm, (&kv_a, c.cache_width()), n, LATENT_NORM_EPS);
    Projected { n, norm, normed, q_latent, q: Arc::new(q), kv_norm, kv_a, c_kv }
}

/// h + o_proj(out).
pub(crate) fn output(ctx: &Ctx, params: &Params, ids: &BlockIds, h: &Buf, out: &Buf, n: usize) -> Shared {
    let y = linear(ctx, params, ids.attention.o_proj, out, n);
    let mut h1 = ctx.zeros(h.dtype(), h.len());
    add::add(ctx, h.view(), y.view(), h1.view_mut());
    Arc::new(h1)
}

/// h `[n, D]` to h1 `[n, D]`.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, depth: &Depth, h: Shared) -> (Shared, Saved) {
    let c = &model.config;
    let p = project(ctx, model, params, ids, &depth.positions, &h);
    let kv_up = linear(ctx, params, ids.attention.kv_b, &p.c_kv, p.n);
    let mut out = ctx.zeros(h.dtype(), p.n * c.num_attention_heads * c.v_head_dim);
    let mut lse = ctx.zeros(DType::F32, p.n * c.num_attention_heads);
    let x = inputs(model, &p, &kv_up, &depth.cu);
    mla_prefill::forward(ctx, shape(model), x, out.view_mut(), lse.view_mut());
    let h1 = output(ctx, params, ids, &h, &out, p.n);
    let saved = Saved {
        ids: ids.clone(),
        h,
        projected: p,
        kv_up: Arc::new(kv_up),
        out: Arc::new(out),
        lse: Arc::new(lse),
        cu: depth.cu.clone(),
        positions: depth.positions.clone(),
    };
    (h1, saved)
}

fn inputs<'a>(model: &Model, p: &'a Projected, kv_up: &'a Buf, cu: &'a Buf) -> mla_prefill::Inputs<'a> {
    let tail = model.config.kv_lora_rank.min(p.kv_a.len())..p.kv_a.len();
    mla_prefill::Inputs {
        q: p.q.view(),
        kv_up: kv_up.view(),
        k_pe: p.kv_a.view().slice(tail),
        cu_q: cu.view(),
        cu_k: cu.view(),
    }
}

/// dh1 `[n, D]` to dh `[n, D]`; weight gradients are queued.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    dh1: Shared,
    jobs: &mut WeightGrads,
) -> Shared {
    let c = &model.config;
    let ids = &saved.ids.attention;
    let p = &saved.projected;
    let act = saved.h.dtype();
    let v_width = c.num_attention_heads * c.v_head_dim;
    let mut d_out = ctx.zeros(act, saved.out.len());
    linear_backward(ctx, params, ids.o_proj, &dh1, &mut d_out, false);
    jobs.linear(ids.o_proj, v_width, &saved.out, &dh1);

    let (mut dq, mut dkv_up, mut dkv_a) =
        (ctx.zeros(act, p.q.len()), ctx.zeros(act, saved.kv_up.len()), ctx.zeros(act, p.kv_a.len()));
    let tail = c.kv_lora_rank.min(dkv_a.len())..dkv_a.len();
    let b = mla_prefill::Backward {
        out: saved.out.view(),
        lse: saved.lse.view(),
        dout: d_out.view(),
        dq: dq.view_mut(),
        dkv_up: dkv_up.view_mut(),
        dk_pe: dkv_a.view_mut().slice(tail),
        dk_pe_stride: c.cache_width(),
    };
    mla_prefill::backward(ctx, shape(model), inputs(model, p, &saved.kv_up, &saved.cu), b);
    rotate(ctx, model, &saved.positions, dq.view_mut(), dkv_a.view_mut(), true);

    // The latent's path: kv_b, the norm (into the first C columns of dkv_a), kv_a.
    let dkv_up = Arc::new(dkv_up);
    let mut d_c = ctx.zeros(act, p.c_kv.len());
    linear_backward(ctx, params, ids.kv_b, &dkv_up, &mut d_c, false);
    jobs.linear(ids.kv_b, c.kv_lora_rank, &p.c_kv, &dkv_up);
    p.kv_norm.backward(ctx, params, &Arc::new(d_c), &mut dkv_a, false, jobs);
    let dkv_a = Arc::new(dkv_a);
    let mut d_normed = ctx.zeros(act, p.normed.len());
    linear_backward(ctx, params, ids.kv_a, &dkv_a, &mut d_normed, false);
    jobs.linear(ids.kv_a, c.hidden_size, &p.normed, &dkv_a);

    // The query's path joins the same normed input.
    let dq = Arc::new(dq);
    if let (Some((q_a, _, q_b)), Some((norm, latent))) = (ids.q_lora, &p.q_latent) {
        let mut d_latent = ctx.zeros(act, latent.len());
        linear_backward(ctx, params, q_b, &dq, &mut d_latent, false);
        jobs.linear(q_b, params.layout.info(q_b).cols, latent, &dq);
        let mut d_q_a = ctx.zeros(act, latent.len());
        norm.backward(ctx, params, &Arc::new(d_latent), &mut d_q_a, false, jobs);
        let d_q_a = Arc::new(d_q_a);
        linear_backward(ctx, params, q_a, &d_q_a, &mut d_normed, true);
        jobs.linear(q_a, c.hidden_size, &p.normed, &d_q_a);
    } else if let Some(q_proj) = ids.q_proj {
        linear_backward(ctx, params, q_proj, &dq, &mut d_normed, true);
        jobs.linear(q_proj, c.hidden_size, &p.normed, &dq);
    }
    let mut dh = Buf::clone(&dh1);
    p.norm.backward(ctx, params, &Arc::new(d_normed), &mut dh, true, jobs);
    Arc::new(dh)
}
