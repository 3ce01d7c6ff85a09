//! `bench memory_ops`: operations that compute little, in bytes that they must read and write at least, beside a plain
//! copy of as many bytes in the same process. Buffers are larger than caches.

use super::case::{Against, Case, Ready, Unit};
use super::inputs::{below, choices, floats};
use super::measure::Work;
use super::peaks;
use hadal_kernels::ops::{adamw, add, embedding, grad_norm, moe_permute, rmsnorm, rope, swiglu};
use hadal_kernels::{Buf, Ctx, DType, Weight};
use hadal_model::{Layout, ModelConfig};
use serde_json::json;
use std::collections::HashSet;

const ACT: DType = DType::Bf16;
const F32: DType = DType::F32;
/// Bytes of an activation and of an f32.
const A: usize = 2;
const F: usize = 4;
const RIVAL: &str = "plain copy";

/// All cases; of a GPU, whose caches are larger beside its memory's speed, with more tokens and a larger arena.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    let mut all = Vec::new();
    let large = if ctx.device.as_cuda().is_some() { ("v2-lite", 65536, "1b") } else { ("v2-lite", 16384, "mini") };
    for (preset, n, arena) in [large, ("nano", 48, "nano")] {
        let (config, _) = super::preset(preset);
        all.extend(activations(preset, &config, n));
        let (_, layout) = super::preset(arena);
        all.extend(arenas(arena, layout));
    }
    all
}

fn case(name: String, bytes: usize, setup: impl Fn(&Ctx) -> Work + 'static) -> Case {
    Case {
        name,
        sizes: json!({}),
        unit: Unit::Gbytes,
        work: bytes as f64,
        against: Against::Rival,
        setup: Box::new(move |ctx| Ready { ours: setup(ctx), rival: Some((RIVAL, peaks::copy(ctx, bytes))) }),
    }
}

/// Operations over `n` tokens of a preset.
fn activations(preset: &str, c: &ModelConfig, n: usize) -> Vec<Case> {
    let (d, f, k, e) = (c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok, c.n_routed_experts);
    let (heads, head, r) = (c.num_attention_heads, c.qk_head_dim(), c.qk_rope_head_dim);
    let v = c.vocab_size;
    let name = |op: &str, width: usize| format!("{preset}/{op} {n}x{width}");
    let x = n * d * A;
    // Each of a token's experts, or every fourth token where that would be much memory.
    let m = n / 4;
    let rows = m * k * d * A;
    let of_experts = |op: &str| format!("{preset}/{op} {m}x{d}, {k} of {e}");
    let factor = c.rope_factor();
    let inv_freq = c.inv_freq();
    vec![
        case(name("rmsnorm forward", d), 2 * x, move |ctx| rmsnorm_forward(ctx, n, d)),
        case(name("rmsnorm backward", d), 4 * x, move |ctx| rmsnorm_backward(ctx, n, d, [true, true])),
        case(name("rmsnorm backward input", d), 4 * x, move |ctx| rmsnorm_backward(ctx, n, d, [true, false])),
        case(name("rmsnorm backward weight", d), 2 * x, move |ctx| rmsnorm_backward(ctx, n, d, [false, true])),
        case(name("rope", heads * r), 2 * n * heads * r * A, move |ctx| {
            rotate(ctx, n, [heads, head, r], ctx.from_f32(&inv_freq), factor)
        }),
        case(name("swiglu forward", f), 3 * n * f * A, move |ctx| swiglu_forward(ctx, n, f)),
        case(name("swiglu backward", f), 6 * n * f * A, move |ctx| swiglu_backward(ctx, n, f)),
        case(name("embedding forward", d), 2 * x, move |ctx| embedding_forward(ctx, n, v, d)),
        case(name("embedding backward", d), x + 2 * distinct(v, n) * d * F, move |ctx| {
            embedding_backward(ctx, n, v, d)
        }),
        case(name("add", d), 3 * x, move |ctx| sum(ctx, n * d)),
        case(name("accumulate", d), 3 * x, move |ctx| accumulate(ctx, n * d)),
        case(name("f32 to bf16", d), n * d * (F + A), move |ctx| convert(ctx, n * d, F32, ACT)),
        case(name("bf16 to f32", d), n * d * (F + A), move |ctx| convert(ctx, n * d, ACT, F32)),
        case(of_experts("permute"), m * d * A + rows, move |ctx| Permuted::new(ctx, m, d, k, e).permute(ctx)),
        case(of_experts("permute backward"), rows + m * d * A, move |ctx| {
            Permuted::new(ctx, m, d, k, e).permute_backward(ctx)
        }),
        case(of_experts("combine"), rows + 3 * m * d * A, move |ctx| Permuted::new(ctx, m, d, k, e).combine(ctx)),
    ]
}

/// Operations over a preset's whole arena.
fn arenas(preset: &str, layout: Layout) -> Vec<Case> {
    let p = layout.len;
    let name = |op: &str| format!("{preset}/{op} {p}");
    let (segments, ranges) = (layout.segments(), layout.trained_ranges());
    // Reads masters, gradients and moments; writes all but gradients, and the BF16 copy.
    vec![
        case(name("adamw"), p * (7 * F + A), move |ctx| update(ctx, p, segments.clone())),
        case(name("grad_norm"), p * F, move |ctx| {
            let (grad, mut out, ctx, ranges) = (floats(ctx, F32, p, 1), ctx.zeros(F32, 1), ctx.clone(), ranges.clone());
            Box::new(move || grad_norm::norm(&ctx, grad.view(), &ranges, out.view_mut()))
        }),
    ]
}

fn rmsnorm_forward(ctx: &Ctx, n: usize, d: usize) -> Work {
    let (x, weight) = (floats(ctx, ACT, n * d, 1), floats(ctx, F32, d, 2));
    let (mut y, mut rstd, ctx) = (ctx.zeros(ACT, n * d), ctx.zeros(F32, n), ctx.clone());
    Box::new(move || {
        let (x, weight) = (x.view(), weight.view());
        let a = rmsnorm::Forward { x, x_stride: d, weight, eps: 1e-6, y: y.view_mut(), rstd: rstd.view_mut() };
        rmsnorm::forward(&ctx, a);
    })
}

/// Gradients of the input, to which the residual stream's is added as in a block, and of the weight, or one of them.
fn rmsnorm_backward(ctx: &Ctx, n: usize, d: usize, [input, weight_gradient]: [bool; 2]) -> Work {
    let (dy, x, weight) = (floats(ctx, ACT, n * d, 1), floats(ctx, ACT, n * d, 2), floats(ctx, F32, d, 3));
    let (mut dx, mut dw) = (input.then(|| ctx.zeros(ACT, n * d)), weight_gradient.then(|| ctx.zeros(F32, d)));
    let (rstd, ctx) = (ctx.from_f32(&vec![1.0; n]), ctx.clone());
    Box::new(move || {
        let a = rmsnorm::Backward {
            dy: dy.view(),
            x: x.view(),
            x_stride: d,
            weight: weight.view(),
            rstd: rstd.view(),
            input: dx.as_mut().map(|dx| rmsnorm::InputGradient { dx: dx.view_mut(), dx_stride: d, accumulate: true }),
            weight_gradient: dw.as_mut().map(|dw| rmsnorm::WeightGradient { dw: dw.view_mut(), accumulate: false }),
        };
        rmsnorm::backward(&ctx, a);
    })
}

/// The rotary parts of queries.
fn rotate(ctx: &Ctx, n: usize, [heads, head, r]: [usize; 3], inv_freq: Buf, factor: f32) -> Work {
    let mut x = floats(ctx, ACT, n * heads * head, 1);
    let positions = ctx.from_i32(&(0..n as i32).collect::<Vec<_>>());
    let ctx = ctx.clone();
    Box::new(move || {
        let a = rope::Rope {
            x: x.view_mut(),
            token_stride: heads * head,
            offset: head - r,
            heads,
            head_stride: head,
            positions: positions.view(),
            inv_freq: inv_freq.view(),
            factor,
            interleaved: true,
            inverse: false,
        };
        rope::apply(&ctx, a);
    })
}

fn swiglu_forward(ctx: &Ctx, n: usize, f: usize) -> Work {
    let (gate_up, mut y, ctx) = (floats(ctx, ACT, 2 * n * f, 1), ctx.zeros(ACT, n * f), ctx.clone());
    Box::new(move || swiglu::forward(&ctx, gate_up.view(), f, None, y.view_mut()))
}

fn swiglu_backward(ctx: &Ctx, n: usize, f: usize) -> Work {
    // In place, over and over: of zeros it leaves zeros, of anything else soon numbers that are slow to compute with.
    let (mut dy, mut gate_up, ctx) = (ctx.zeros(ACT, n * f), ctx.zeros(ACT, 2 * n * f), ctx.clone());
    Box::new(move || {
        let (dy, gate_up) = (dy.view_mut(), gate_up.view_mut());
        swiglu::backward(&ctx, swiglu::Backward { dy, gate_up, width: f, rows: None, weights: None });
    })
}

/// The ids of the embedding's cases.
fn ids(ctx: &Ctx, v: usize, n: usize) -> Buf {
    below(ctx, v, n, 1)
}

/// How many different ids there are among them: the rows whose gradient changes.
fn distinct(v: usize, n: usize) -> usize {
    super::inputs::drawn(v, n, 1).collect::<HashSet<i32>>().len()
}

fn embedding_forward(ctx: &Ctx, n: usize, v: usize, d: usize) -> Work {
    let (ids, table) = (ids(ctx, v, n), floats(ctx, ACT, v * d, 2));
    let (mut y, ctx) = (ctx.zeros(ACT, n * d), ctx.clone());
    Box::new(move || embedding::forward(&ctx, ids.view(), &Weight::new(table.view(), v, d), y.view_mut()))
}

fn embedding_backward(ctx: &Ctx, n: usize, v: usize, d: usize) -> Work {
    let (ids, dy) = (ids(ctx, v, n), floats(ctx, ACT, n * d, 2));
    let (mut table, ctx) = (ctx.zeros(F32, v * d), ctx.clone());
    Box::new(move || embedding::backward(&ctx, ids.view(), dy.view(), table.view_mut(), true))
}

fn sum(ctx: &Ctx, len: usize) -> Work {
    let (a, b, mut out) = (floats(ctx, ACT, len, 1), floats(ctx, ACT, len, 2), ctx.zeros(ACT, len));
    let ctx = ctx.clone();
    Box::new(move || add::add(&ctx, a.view(), b.view(), out.view_mut()))
}

fn accumulate(ctx: &Ctx, len: usize) -> Work {
    let (a, mut out, ctx) = (floats(ctx, ACT, len, 1), ctx.zeros(ACT, len), ctx.clone());
    Box::new(move || add::accumulate(&ctx, a.view(), out.view_mut()))
}

fn convert(ctx: &Ctx, len: usize, from: DType, to: DType) -> Work {
    let (a, mut out, ctx) = (floats(ctx, from, len, 1), ctx.zeros(to, len), ctx.clone());
    Box::new(move || add::convert(&ctx, a.view(), out.view_mut()))
}

/// Tokens sorted by expert.
struct Permuted {
    d: usize,
    k: usize,
    row_of_slot: Buf,
    slot_of_row: Buf,
    weights: Buf,
    tokens: Buf,
    rows: Buf,
}

impl Permuted {
    fn new(ctx: &Ctx, n: usize, d: usize, k: usize, experts: usize) -> Self {
        let int = |len| ctx.zeros(DType::I32, len);
        let (mut offsets, mut row_of_slot, mut slot_of_row) = (int(experts + 1), int(n * k), int(n * k));
        let choices = choices(ctx, experts, k, n);
        let (o, r, s) = (offsets.view_mut(), row_of_slot.view_mut(), slot_of_row.view_mut());
        moe_permute::plan(ctx, choices.view(), experts, o, r, s);
        let weights = ctx.from_f32(&vec![1.0 / k as f32; n * k]);
        let (tokens, rows) = (floats(ctx, ACT, n * d, 1), floats(ctx, ACT, n * k * d, 2));
        Self { d, k, row_of_slot, slot_of_row, weights, tokens, rows }
    }

    fn permute(self, ctx: &Ctx) -> Work {
        let Self { d, k, row_of_slot, slot_of_row, tokens, mut rows, .. } = self;
        let ctx = ctx.clone();
        Box::new(move || {
            let plan = [row_of_slot.view(), slot_of_row.view()];
            moe_permute::permute(&ctx, tokens.view(), d, k, plan, rows.view_mut());
        })
    }

    fn permute_backward(self, ctx: &Ctx) -> Work {
        let Self { d, k, row_of_slot, mut tokens, rows, .. } = self;
        let ctx = ctx.clone();
        Box::new(move || {
            let (rows, slots) = (rows.view(), row_of_slot.view());
            moe_permute::permute_backward(&ctx, rows, d, k, slots, tokens.view_mut(), false);
        })
    }

    /// With the residual stream and the shared experts' output.
    fn combine(self, ctx: &Ctx) -> Work {
        let Self { d, k, row_of_slot, weights, tokens, rows, .. } = self;
        let (extra, mut y, ctx) = (floats(ctx, ACT, tokens.len(), 3), ctx.zeros(ACT, tokens.len()), ctx.clone());
        Box::new(move || {
            let a = moe_permute::Combine {
                rows: rows.view(),
                dim: d,
                top_k: k,
                row_of_slot: row_of_slot.view(),
                weights: weights.view(),
                base: Some(tokens.view()),
                extra: Some(extra.view()),
                y: y.view_mut(),
            };
            moe_permute::combine(&ctx, a);
        })
    }
}

/// AdamW as a BF16 run has it: with clipping, decay and the compute copy.
fn update(ctx: &Ctx, p: usize, segments: Vec<adamw::Segment>) -> Work {
    let (mut master, grad) = (floats(ctx, F32, p, 1), floats(ctx, F32, p, 2));
    let (mut m, mut v, mut compute) = (ctx.zeros(F32, p), ctx.zeros(F32, p), ctx.zeros(ACT, p));
    let schedule = ctx.from_f32(&adamw::schedule(1e-4, 0.9, 0.95, 0.1, 100));
    let (norm, ctx) = (ctx.from_f32(&[2.0]), ctx.clone());
    Box::new(move || {
        let a = adamw::AdamW {
            master: master.view_mut(),
            grad: grad.view(),
            m: m.view_mut(),
            v: v.view_mut(),
            compute: Some(compute.view_mut()),
            segments: &segments,
            norm: norm.view(),
            clip: 1.0,
            schedule: schedule.view(),
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
        };
        adamw::step(&ctx, a);
    })
}
