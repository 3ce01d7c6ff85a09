//! Multi-token prediction (V3 report 2.2): at depth k, h'_i = M_k `[RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i)]`, one block,
//! its own final norm, the shared head. Files hold the embedding's half of M_k first (the paper writes the hidden
//! first).

use crate::stages::Norm;
use crate::weight_grad::{Shared, WeightGrads};
use crate::{Depth, Model, MtpHidden, MtpIds, Options, Params, block, heads, trunk};
use hadal_kernels::ops::gemm::{Gemm, Mat, MatMut, gemm};
use hadal_kernels::ops::{add, rows};
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// What one depth keeps.
pub struct Saved {
    ids: MtpIds,
    enorm: Norm,
    hnorm: Norm,
    /// Normed embedding and hidden state `[n, D]`; None where they are computed again.
    halves: Option<[Shared; 2]>,
    block: block::Saved,
    pub(crate) norm: Norm,
    tokens: Shared,
    from: Shared,
    /// Elements of the previous depth's hidden states.
    previous: usize,
}

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        let halves: usize = self.halves.iter().flatten().map(|h| h.bytes()).sum();
        let norms = [&self.enorm, &self.hnorm, &self.norm];
        halves + self.block.bytes() + norms.iter().map(|n| n.bytes_with_input()).sum::<usize>()
    }
}

/// Output of one depth.
pub struct Output {
    /// `[n, D]` after this depth's norm: what the head reads.
    pub normed: Shared,
    /// `[n, D]`: what the next depth continues.
    pub feed: Shared,
    /// What backward needs.
    pub saved: Saved,
    /// The block's routing.
    pub trace: Option<trunk::LayerTrace>,
}

/// Depth k (1-based) over `previous` `[n_{k-1}, D]`, the hidden states that the depth before fed on.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    k: usize,
    depth: &Depth,
    previous: &Shared,
    options: Options<'_>,
) -> Output {
    let ids = &model.layout.mtp[k - 1];
    let (d, n) = (model.config.hidden_size, depth.n);
    let mut h = ctx.empty(previous.dtype(), n * d);
    rows::gather(ctx, previous.view(), d, depth.from.view(), h.view_mut());
    let e = trunk::embed(ctx, model, params, &depth.tokens);
    let (e, enorm) = heads::norm(ctx, model, params, ids.enorm, &e);
    let (h, hnorm) = heads::norm(ctx, model, params, ids.hnorm, &Arc::new(h));
    let halves = [e, h];
    let x = project(ctx, params, ids, &halves, d, n);
    let halves = model.recompute.keeps_norms().then_some(halves);
    let gate = options.gate(ids.block.layer, depth);
    let (y, block, trace) = block::forward(ctx, model, params, &ids.block, depth, x, gate);
    let (normed, norm) = heads::norm(ctx, model, params, ids.norm, &y);
    let feed = match model.config.mtp_hidden {
        MtpHidden::PostNorm => normed.clone(),
        MtpHidden::PreNorm => y,
    };
    let (tokens, from) = (depth.tokens.clone(), depth.from.clone());
    let saved = Saved { ids: ids.clone(), enorm, hnorm, halves, block, norm, tokens, from, previous: previous.len() };
    Output { normed, feed, saved, trace }
}

/// eh_proj over `[embedding ; hidden]` without forming the concatenation: both halves summed in f32, rounded once.
fn project(ctx: &Ctx, params: &Params, ids: &MtpIds, halves: &[Shared; 2], d: usize, n: usize) -> Shared {
    let w = params.weight(ids.eh_proj);
    let mut sum = ctx.empty(DType::F32, n * d);
    for (i, x) in halves.iter().enumerate() {
        gemm(
            ctx,
            Gemm {
                m: n,
                n: d,
                k: d,
                a: Mat { data: x.view(), ld: d },
                ta: false,
                b: Mat { data: w.data.slice(i * d..w.data.len()), ld: 2 * d },
                tb: true,
                c: MatMut { data: sum.view_mut(), ld: d },
                accumulate: i > 0,
            },
        );
    }
    if halves[0].dtype() == DType::F32 {
        return Arc::new(sum);
    }
    let mut x = ctx.empty(halves[0].dtype(), n * d);
    add::convert(ctx, sum.view(), x.view_mut());
    Arc::new(x)
}

/// From the gradients of what the head read and of what the next depth continued (if there was one) to that of
/// `previous` `[n_{k-1}, D]`; weight gradients go to `jobs`, the embedding's as use k.
pub fn backward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    k: usize,
    saved: Saved,
    d_normed: Buf,
    d_feed: Option<Buf>,
    jobs: &mut WeightGrads<'_>,
) -> Buf {
    let d = model.config.hidden_size;
    let dy = norm_backward(ctx, model, params, saved.norm, d_normed, d_feed, jobs);
    let dx = block::backward_input(ctx, model, params, saved.block, dy, jobs);
    let w = params.weight(saved.ids.eh_proj);
    let mut out = ctx.empty(dx.dtype(), saved.previous);
    out.clear();
    let mut halves = saved.halves.map(|halves| halves.into_iter());
    for (i, norm) in [saved.enorm, saved.hnorm].into_iter().enumerate() {
        let half = halves.as_mut().and_then(Iterator::next).unwrap_or_else(|| norm.again(ctx, params));
        let mut d_half = ctx.empty(dx.dtype(), half.len());
        gemm(
            ctx,
            Gemm {
                m: half.len() / d,
                n: d,
                k: d,
                a: Mat { data: dx.view(), ld: d },
                ta: false,
                b: Mat { data: w.data.slice(i * d..w.data.len()), ld: 2 * d },
                tb: false,
                c: MatMut { data: d_half.view_mut(), ld: d },
                accumulate: false,
            },
        );
        jobs.columns(saved.ids.eh_proj, i * d, d, &half, &dx);
        let mut d_in = ctx.empty(dx.dtype(), half.len());
        drop(half);
        norm.backward(ctx, params, &Arc::new(d_half), &mut d_in, false, jobs);
        match (i, model.layout.embedding) {
            (0, Some(id)) => jobs.embedding(id, k, &saved.tokens, &Arc::new(d_in)),
            (0, None) => unreachable!("MTP forward embedded its tokens"),
            _ => rows::scatter_add(ctx, d_in.view(), d, saved.from.view(), out.view_mut()),
        }
    }
    out
}

/// Backward of a final norm whose normed output went to a head and whose feed (normed or not) went to an MTP depth.
pub(crate) fn norm_backward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    norm: Norm,
    mut d_normed: Buf,
    d_feed: Option<Buf>,
    jobs: &mut WeightGrads<'_>,
) -> Shared {
    let post = model.config.mtp_hidden == MtpHidden::PostNorm;
    if let (true, Some(g)) = (post, &d_feed) {
        add::accumulate(ctx, g.view(), d_normed.view_mut());
    }
    let mut dh = ctx.empty(d_normed.dtype(), d_normed.len());
    norm.backward(ctx, params, &Arc::new(d_normed), &mut dh, false, jobs);
    if let (false, Some(g)) = (post, &d_feed) {
        add::accumulate(ctx, g.view(), dh.view_mut());
    }
    Arc::new(dh)
}
