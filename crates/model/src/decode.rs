//! The trunk over the paged latent cache: absorbed attention (V2 report 2.1.2). kv_b's key part is folded into the
//! query and its value part into the output, so that a token costs C + R cached numbers a layer, whatever the heads.

use crate::stages::dispatch::GateOptions;
use crate::stages::{attention, combine, dispatch, mlp};
use crate::weight_grad::Shared;
use crate::{BlockIds, Model, Params, heads, trunk};
use hadal_kernels::ops::gemm::{Gemm, Mat, MatMut, gemm};
use hadal_kernels::ops::{kv_store, mla_decode, rows};
use hadal_kernels::{Buf, Ctx, DType, View};

/// New tokens of several sequences, and where their cache is.
#[derive(Clone, Debug)]
pub struct Step {
    /// i32 `[n]`.
    pub tokens: Shared,
    /// i32 `[n]`: position within its own sequence.
    pub positions: Shared,
    /// i32 `[n]`: cache slot of each token.
    pub slots: Shared,
    /// i32 `[S + 1]`: new tokens of each sequence.
    pub cu: Shared,
    /// i32 `[S]`: tokens of each sequence, the new ones included.
    pub lengths: Shared,
    /// i32 `[S, blocks]`.
    pub block_table: Shared,
}

/// Hidden states `[n, D]` after the final norm; each layer's cache gains the new tokens. `cache` holds one buffer
/// `[blocks][64][C + R]` of the activation dtype per layer.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, step: &Step, cache: &mut [Buf]) -> Shared {
    assert_eq!(cache.len(), model.layout.blocks.len(), "one cache per layer");
    let mut h = trunk::embed(ctx, model, params, &step.tokens);
    for (ids, cache) in model.layout.blocks.iter().zip(cache) {
        let h1 = attend(ctx, model, params, ids, step, h, cache);
        let (input, dispatched) = dispatch::forward(ctx, model, params, ids, h1, GateOptions::default());
        let (output, _) = mlp::forward(ctx, model, params, ids, input);
        h = combine::forward(ctx, model, &dispatched, output).0;
    }
    heads::final_norm(ctx, model, params, &h).0
}

fn attend(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    step: &Step,
    h: Shared,
    cache: &mut Buf,
) -> Shared {
    let c = &model.config;
    let (latent, rope, heads) = (c.kv_lora_rank, c.qk_rope_head_dim, c.num_attention_heads);
    let p = attention::project(ctx, model, params, ids, &step.positions, &h);
    let store = kv_store::Store {
        c_kv: p.c_kv.view(),
        k_pe: p.kv_a.view().slice(latent.min(p.kv_a.len())..p.kv_a.len()),
        k_pe_stride: c.cache_width(),
        latent,
        rope,
        slots: step.slots.view(),
        cache: cache.view_mut(),
    };
    kv_store::store(ctx, store);
    let q = absorb(ctx, model, params, ids, &p.q, p.n);
    let mut out = ctx.zeros(h.dtype(), p.n * heads * latent);
    let mut lse = ctx.zeros(DType::F32, p.n * heads);
    let a = mla_decode::Decode {
        heads,
        latent,
        rope,
        scale: c.softmax_scale(),
        q: q.view(),
        cache: cache.view(),
        block_table: step.block_table.view(),
        cu_q: step.cu.view(),
        lengths: step.lengths.view(),
        out: out.view_mut(),
        lse: lse.view_mut(),
    };
    mla_decode::forward(ctx, a);
    let out = unabsorb(ctx, model, params, ids, &out, p.n);
    attention::output(ctx, params, ids, &h, &out, p.n)
}

/// `[n, H, P + R]` to `[n, H, C + R]`: q_nope times kv_b's key part, q_rope as it is.
fn absorb(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, q: &Buf, n: usize) -> Buf {
    let c = &model.config;
    let (nope, rope, latent) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank);
    let (from, to) = (nope + rope, latent + rope);
    let mut out = ctx.zeros(q.dtype(), n * c.num_attention_heads * to);
    let keys = HeadProduct { first: 0, transposed: false, k: nope, n: latent, from, to };
    per_head(ctx, model, params, ids, keys, q, &mut out, n);
    let end = out.len();
    if n > 0 {
        rows::copy_strided(
            ctx,
            (q.view().slice(nope..q.len()), from),
            (out.view_mut().slice(latent..end), to),
            n * c.num_attention_heads,
            rope,
        );
    }
    out
}

/// `[n, H, C]` to `[n, H, W]`: times kv_b's value part.
fn unabsorb(ctx: &Ctx, model: &Model, params: &Params, ids: &BlockIds, x: &Buf, n: usize) -> Buf {
    let c = &model.config;
    let (v, latent) = (c.v_head_dim, c.kv_lora_rank);
    let mut out = ctx.zeros(x.dtype(), n * c.num_attention_heads * v);
    let first = c.qk_nope_head_dim;
    let values = HeadProduct { first, transposed: true, k: latent, n: v, from: latent, to: v };
    per_head(ctx, model, params, ids, values, x, &mut out, n);
    out
}

/// A product of each head's part of every token with the head's own rows of kv_b.
#[derive(Clone, Copy)]
struct HeadProduct {
    /// First of the head's rows in kv_b.
    first: usize,
    /// Those rows are output features.
    transposed: bool,
    /// Elements of a head that are read, and written.
    k: usize,
    n: usize,
    /// Elements from one head to the next, on either side.
    from: usize,
    to: usize,
}

fn per_head(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    p: HeadProduct,
    x: &Buf,
    out: &mut Buf,
    tokens: usize,
) {
    let heads = model.config.num_attention_heads;
    let end = out.len();
    if tokens == 0 {
        return;
    }
    for head in 0..heads {
        gemm(
            ctx,
            Gemm {
                m: tokens,
                n: p.n,
                k: p.k,
                a: Mat { data: x.view().slice(head * p.from..x.len()), ld: heads * p.from },
                ta: false,
                b: Mat { data: kv_b(model, params, ids, head, p.first), ld: model.config.kv_lora_rank },
                tb: p.transposed,
                c: MatMut { data: out.view_mut().slice(head * p.to..end), ld: heads * p.to },
                accumulate: false,
            },
        );
    }
}

/// Rows of kv_b_proj from row `first` of a head: its P key rows, then its W value rows, each `[C]`.
fn kv_b<'a>(model: &Model, params: &'a Params, ids: &BlockIds, head: usize, first: usize) -> View<'a> {
    let c = &model.config;
    let w = params.weight(ids.attention.kv_b);
    let row = head * (c.qk_nope_head_dim + c.v_head_dim) + first;
    w.data.slice(row * c.kv_lora_rank..w.data.len())
}
