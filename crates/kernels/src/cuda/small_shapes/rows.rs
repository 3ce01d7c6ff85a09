//! What works on rows or single elements.

use super::{cumulative, floats, integers, numbers};
use crate::ops::router::{GroupScore, Scoring};
use crate::ops::{
    self, adamw as adam, bias_update as bias, expert_load as load, grad_norm as norm, kv_store as kv,
    moe_permute as moe, router as gate, sample as draw,
};
use crate::{Buf, Ctx, DType, Weight};

pub(in crate::cuda) fn adamw(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let p = 2100;
    let segments = [(3..700, true), (700..1029, false), (1040..2100, true)];
    let segments = segments.map(|(range, decay)| adam::Segment { range, decay });
    let mut out = Vec::new();
    // From an address that wide loads take, and from one that they do not.
    for skip in [0, 1] {
        let [mut master, grad, mut m] = [1, 2, 3].map(|stream| floats(ctx, stream, p + skip));
        let mut v = ctx.filled(p + skip, 0.5);
        let mut compute = (dtype == DType::Bf16).then(|| ctx.zeros(DType::Bf16, p + skip));
        let schedule = ctx.from_f32(&adam::schedule(1e-2, 0.9, 0.95, 0.1, 3));
        let norm = ctx.filled(1, 2.0);
        let all = skip..p + skip;
        adam::step(
            ctx,
            adam::AdamW {
                master: master.view_mut().slice(all.clone()),
                grad: grad.view().slice(all.clone()),
                m: m.view_mut().slice(all.clone()),
                v: v.view_mut().slice(all.clone()),
                compute: compute.as_mut().map(|c| c.view_mut().slice(all.clone())),
                segments: &segments,
                norm: norm.view(),
                clip: 1.0,
                schedule: schedule.view(),
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
            },
        );
        out.extend([master, m, v]);
        out.extend(compute);
    }
    out
}

pub(in crate::cuda) fn add(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let n = 1029;
    let mut out = Vec::new();
    for (skip, other) in [(0, dtype), (1, dtype), (0, DType::F32)] {
        let (a, b) = (numbers(ctx, dtype, 1, n + skip), numbers(ctx, other, 2, n + skip));
        let (a, b) = (a.view().slice(skip..n + skip), b.view().slice(skip..n + skip));
        let (mut sum, mut narrow) = (ctx.empty(other, n), ctx.empty(DType::Bf16, n));
        ops::add::add(ctx, a, b, sum.view_mut());
        ops::add::accumulate(ctx, a, sum.view_mut());
        ops::add::blend(ctx, 0.25, a, sum.view_mut());
        ops::add::convert(ctx, sum.view(), narrow.view_mut());
        out.extend([sum, narrow]);
    }
    out
}

pub(in crate::cuda) fn bias_update(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let (load, mut biases) = (integers(ctx, 70, 50), floats(ctx, 1, 70));
    bias::step(ctx, load.view(), 1e-3, biases.view_mut());
    vec![biases]
}

pub(in crate::cuda) fn embedding(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // More ids than one pass of the sort takes; few ids, so that each has many positions.
    for (n, v, d, table) in [(70, 600, 24, dtype), (1100, 3, 8, dtype), (33, 50, 7, DType::F32)] {
        let (ids, table) = (integers(ctx, n, v), numbers(ctx, table, 1, v * d));
        let mut y = ctx.empty(dtype, n * d);
        ops::embedding::forward(ctx, ids.view(), &Weight::new(table.view(), v, d), y.view_mut());
        let mut d_table = floats(ctx, 2, v * d);
        ops::embedding::backward(ctx, ids.view(), y.view(), d_table.view_mut(), true);
        out.extend([y, d_table]);
    }
    out
}

pub(in crate::cuda) fn expert_load(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let (offsets, mut counts) = (cumulative(ctx, &[3, 0, 7, 1, 12]), integers(ctx, 5, 9));
    load::add(ctx, offsets.view(), counts.view_mut());
    vec![counts]
}

pub(in crate::cuda) fn grad_norm(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let grad = floats(ctx, 1, 33_000);
    let mut out = ctx.empty(DType::F32, 1);
    norm::norm(ctx, grad.view(), &[1..40, 40..40, 64..32_999], out.view_mut());
    vec![out]
}

pub(in crate::cuda) fn kv_store(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let slots = ctx.from_i32(&[5, -1, 64, 127, 0]);
    let mut out = Vec::new();
    for (latent, rope, stride) in [(16, 8, 24), (10, 6, 7)] {
        let (c_kv, k_pe) = (numbers(ctx, dtype, 1, 5 * latent), numbers(ctx, dtype, 2, 5 * stride));
        let mut cache = ctx.zeros(dtype, 2 * 64 * (latent + rope));
        let (c_kv, k_pe, slots) = (c_kv.view(), k_pe.view(), slots.view());
        kv::store(ctx, kv::Store { c_kv, k_pe, k_pe_stride: stride, latent, rope, slots, cache: cache.view_mut() });
        out.push(cache);
    }
    out
}

pub(in crate::cuda) fn moe_permute(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // Wide rows and narrow ones; more slots than a block of the plan takes.
    for (tokens, experts, k, dim) in [(37, 12, 4, 56), (11, 5, 2, 33), (600, 40, 2, 1)] {
        let choice: Vec<i32> = (0..tokens * k).map(|i| ((i / k * 3 + i % k) % experts) as i32).collect();
        let choice = ctx.from_i32(&choice);
        let slots = tokens * k;
        let [mut offsets, mut row_of_slot, mut slot_of_row] =
            [experts + 1, slots, slots].map(|n| ctx.empty(DType::I32, n));
        let places = (offsets.view_mut(), row_of_slot.view_mut(), slot_of_row.view_mut());
        moe::plan(ctx, choice.view(), experts, places.0, places.1, places.2);
        let x = numbers(ctx, dtype, 1, tokens * dim);
        let mut rows = ctx.empty(dtype, slots * dim);
        moe::permute(ctx, x.view(), dim, k, [row_of_slot.view(), slot_of_row.view()], rows.view_mut());
        let mut dx = ctx.empty(dtype, tokens * dim);
        for accumulate in [false, true] {
            moe::permute_backward(ctx, rows.view(), dim, k, row_of_slot.view(), dx.view_mut(), accumulate);
        }
        let (weights, extra) = (floats(ctx, 2, slots), numbers(ctx, dtype, 3, tokens * dim));
        let mut combined = |base, extra| {
            let mut y = ctx.empty(dtype, tokens * dim);
            let a = moe::Combine {
                rows: rows.view(),
                dim,
                top_k: k,
                row_of_slot: row_of_slot.view(),
                weights: weights.view(),
                base,
                extra,
                y: y.view_mut(),
            };
            moe::combine(ctx, a);
            out.push(y);
        };
        combined(None, None);
        combined(Some(x.view()), Some(extra.view()));
        out.extend([offsets, row_of_slot, slot_of_row, rows, dx]);
    }
    out
}

pub(in crate::cuda) fn rmsnorm(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    use ops::rmsnorm::{Backward, Forward, InputGradient, WeightGradient, backward, forward};
    let mut out = Vec::new();
    // Wide and not; a row longer than a warp takes; more rows than one block sums.
    for (n, d, stride) in [(5, 24, 32), (3, 33, 40), (2, 1100, 1100), (70, 16, 16)] {
        let (x, weight, dy) = (numbers(ctx, dtype, 1, n * stride), floats(ctx, 2, d), numbers(ctx, dtype, 3, n * d));
        let (mut y, mut rstd) = (ctx.empty(dtype, n * d), ctx.empty(DType::F32, n));
        let a = Forward {
            x: x.view(),
            x_stride: stride,
            weight: weight.view(),
            eps: 1e-6,
            y: y.view_mut(),
            rstd: rstd.view_mut(),
        };
        forward(ctx, a);
        let (mut dx, mut dw) = (ctx.zeros(dtype, n * stride), floats(ctx, 4, d));
        for accumulate in [false, true] {
            let b = Backward {
                dy: dy.view(),
                x: x.view(),
                x_stride: stride,
                weight: weight.view(),
                rstd: rstd.view(),
                input: Some(InputGradient { dx: dx.view_mut(), dx_stride: stride, accumulate }),
                weight_gradient: Some(WeightGradient { dw: dw.view_mut(), accumulate }),
            };
            backward(ctx, b);
        }
        out.extend([y, rstd, dx, dw]);
    }
    out
}

pub(in crate::cuda) fn rope(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let positions = ctx.from_i32(&[0, 1, 70, 4000, 163_839]);
    let mut out = Vec::new();
    for (half, heads, head_stride, offset, interleaved) in
        [(8, 3, 24, 8, true), (8, 3, 24, 8, false), (3, 2, 7, 1, true)]
    {
        let inv_freq: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
        let inv_freq = ctx.from_f32(&inv_freq);
        let token_stride = offset + heads * head_stride;
        let mut x = numbers(ctx, dtype, 1, positions.len() * token_stride);
        for inverse in [false, true] {
            let a = ops::rope::Rope {
                x: x.view_mut(),
                token_stride,
                offset,
                heads,
                head_stride,
                positions: positions.view(),
                inv_freq: inv_freq.view(),
                factor: 1.1,
                interleaved,
                inverse,
            };
            ops::rope::apply(ctx, a);
        }
        out.push(x);
    }
    out
}

/// V3's gate and V2's, scaled down.
fn gates() -> [gate::Config; 2] {
    let v3 = gate::Config {
        experts: 40,
        top_k: 4,
        scoring: Scoring::Sigmoid,
        n_group: 8,
        topk_group: 4,
        group_score: GroupScore::TopTwo,
        norm_topk_prob: true,
        scale: 2.5,
    };
    let v2 = gate::Config {
        experts: 9,
        top_k: 2,
        scoring: Scoring::Softmax,
        n_group: 3,
        topk_group: 2,
        group_score: GroupScore::Max,
        norm_topk_prob: false,
        scale: 1.0,
    };
    [v3, v2]
}

pub(in crate::cuda) fn router(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let (n, mut out) = (21, Vec::new());
    for c in gates() {
        let (logits, bias) = (floats(ctx, 1, n * c.experts), floats(ctx, 2, c.experts));
        let mut scores = ctx.empty(DType::F32, n * c.experts);
        let (mut indices, mut weights) = (ctx.empty(DType::I32, n * c.top_k), ctx.empty(DType::F32, n * c.top_k));
        let mut given: Option<Buf> = None;
        for bias in [Some(bias.view()), None] {
            let a = gate::Forward {
                logits: logits.view(),
                bias,
                given: given.as_ref().map(Buf::view),
                scores: scores.view_mut(),
                indices: indices.view_mut(),
                weights: weights.view_mut(),
            };
            gate::forward(ctx, &c, a);
            given = Some(indices.clone());
        }
        for d_scores in [None, Some(logits.view())] {
            let mut d_logits = ctx.empty(DType::F32, n * c.experts);
            let b = gate::Backward {
                scores: scores.view(),
                indices: indices.view(),
                d_weights: weights.view(),
                d_scores,
                d_logits: d_logits.view_mut(),
            };
            gate::backward(ctx, &c, b);
            out.push(d_logits);
        }
        out.extend([scores, indices, weights]);
    }
    out
}

pub(in crate::cuda) fn rows(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let index = ctx.from_i32(&[6, 0, 3, 2]);
    let mut out = Vec::new();
    for dim in [16, 5] {
        let mut x = numbers(ctx, dtype, 1, 7 * dim);
        let mut some = ctx.empty(dtype, 4 * dim);
        ops::rows::gather(ctx, x.view(), dim, index.view(), some.view_mut());
        ops::rows::scatter_add(ctx, some.view(), dim, index.view(), x.view_mut());
        let mut copy = ctx.zeros(dtype, 7 * (dim + 8));
        ops::rows::copy_strided(ctx, (x.view(), dim), (copy.view_mut(), dim + 8), 7, dim);
        ops::rows::copy_strided(ctx, (x.view(), dim), (copy.view_mut(), dim + 8), 7, dim - 3);
        out.extend([x, some, copy]);
    }
    out
}

pub(in crate::cuda) fn sample(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let v = 1030;
    let plain = draw::Params { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1, request: 2, position: 3 };
    let greedy = draw::Params { temperature: 0.0, ..plain };
    let params = [plain, greedy, draw::Params { top_k: 40, ..plain }, draw::Params { top_p: 0.9, top_k: 100, ..plain }];
    let logits = floats(ctx, 1, params.len() * v);
    let (mut tokens, mut logp) = (ctx.empty(DType::I32, params.len()), ctx.empty(DType::F32, params.len()));
    let mut finite = ctx.empty(DType::I32, params.len());
    draw::finite(ctx, logits.view(), finite.view_mut());
    draw::sample(ctx, logits.view(), &params, tokens.view_mut(), logp.view_mut());
    vec![finite, tokens, logp]
}

pub(in crate::cuda) fn seq_balance(ctx: &Ctx, _: DType) -> Vec<Buf> {
    let (n, experts, sequences) = (107, 40, 4);
    let scores: Vec<f32> = (0..n * experts).map(|i| (i * 37 % 101) as f32 / 101.0 + 0.001).collect();
    let (scores, cu) = (ctx.from_f32(&scores), cumulative(ctx, &[70, 0, 1, 36]));
    let weights = floats(ctx, 1, sequences);
    let (mut loss, mut d_scores) = (ctx.empty(DType::F32, sequences), ctx.empty(DType::F32, n * experts));
    let a = ops::seq_balance::SeqBalance {
        scores: scores.view(),
        experts,
        top_k: 3,
        cu: cu.view(),
        seq_weights: weights.view(),
        loss: loss.view_mut(),
        d_scores: d_scores.view_mut(),
    };
    ops::seq_balance::forward_backward(ctx, a);
    vec![loss, d_scores]
}

pub(in crate::cuda) fn swiglu(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    use ops::swiglu::{Backward, backward, forward};
    let n = 11;
    let count = ctx.from_i32(&[7]);
    let mut out = Vec::new();
    // Wide and not; a row that a block shares.
    for width in [24, 35, 1100] {
        for rows in [None, Some(count.view())] {
            let mut gate_up = numbers(ctx, dtype, 1, n * 2 * width);
            let mut y = ctx.zeros(dtype, n * width);
            forward(ctx, gate_up.view(), width, rows, y.view_mut());
            let (weights, mut d_weights) = (floats(ctx, 2, n), ctx.zeros(DType::F32, n));
            let mut dy = numbers(ctx, dtype, 3, n * width);
            let weights = rows.map(|_| (weights.view(), d_weights.view_mut()));
            backward(ctx, Backward { dy: dy.view_mut(), gate_up: gate_up.view_mut(), width, rows, weights });
            out.extend([y, dy, gate_up, d_weights]);
        }
    }
    out
}
