//! `bench attention`: latent attention in multi-head form, causal. Operations are those of the scores that causality
//! leaves: two products forward, five backward (the scores once more).

use super::case::{Against, Case, Ready, Unit};
use super::inputs;
use super::measure::Work;
use hadal_kernels::ops::mla_prefill::{self, Backward, Inputs, Shape};
use hadal_kernels::{Buf, Ctx, DType};
use serde_json::json;
use std::cell::RefCell;
use std::rc::Rc;

/// All cases; larger ones of a GPU.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    let mut all = Vec::new();
    let on_cpu = [
        ("v2-lite", "1x2048", vec![2048]),
        ("mini", "8x512", vec![512; 8]),
        ("v2-lite", "varlen 2048", vec![17, 600, 1, 240, 1000, 190]),
        ("nano", "2x24", vec![24; 2]),
    ];
    let on_gpu = [
        ("v2-lite", "4x4096", vec![4096; 4]),
        ("v3", "1x4096", vec![4096]),
        ("v2-lite", "varlen 16384", vec![6000, 17, 4096, 632, 2, 2400, 190, 3047]),
        ("nano", "2x24", vec![24; 2]),
    ];
    for (preset, name, lengths) in if ctx.device.as_cuda().is_some() { on_gpu } else { on_cpu } {
        let (c, _) = super::preset(preset);
        let shape = Shape {
            heads: c.num_attention_heads,
            nope: c.qk_nope_head_dim,
            rope: c.qk_rope_head_dim,
            v: c.v_head_dim,
            k_pe_stride: c.qk_rope_head_dim,
            scale: c.softmax_scale(),
        };
        for (direction, parts) in
            [("forward", (true, false)), ("backward", (false, true)), ("forward and backward", (true, true))]
        {
            let sizes = format!("{} heads, {}/{}", shape.heads, shape.nope + shape.rope, shape.v);
            all.push(case(format!("{preset}/{name}/{direction} {sizes}"), direction, shape, &lengths, parts));
        }
    }
    all
}

fn case(name: String, direction: &str, shape: Shape, lengths: &[usize], parts: (bool, bool)) -> Case {
    let pairs: usize = lengths.iter().map(|t| t * (t + 1) / 2).sum();
    let (qk, v) = (shape.nope + shape.rope, shape.v);
    let of = |run: bool, width: usize| if run { 2.0 * (pairs * shape.heads * width) as f64 } else { 0.0 };
    let lengths = lengths.to_vec();
    Case {
        name,
        sizes: json!({ "lengths": lengths, "heads": shape.heads, "qk": qk, "v": v, "direction": direction }),
        unit: Unit::Gflops,
        work: of(parts.0, qk + v) + of(parts.1, 3 * qk + 2 * v),
        against: Against::Bf16,
        setup: Box::new(move |ctx| {
            let state = Rc::new(RefCell::new(State::new(ctx, shape, &lengths)));
            // Backward reads what forward has written.
            state.borrow_mut().forward(ctx);
            let held = ctx.clone();
            let ours: Work = Box::new(move || {
                let mut state = state.borrow_mut();
                if parts.0 {
                    state.forward(&held);
                }
                if parts.1 {
                    state.backward(&held);
                }
            });
            Ready { ours, rival: None }
        }),
    }
}

/// All buffers of one attention.
struct State {
    shape: Shape,
    cu: Buf,
    q: Buf,
    kv_up: Buf,
    k_pe: Buf,
    out: Buf,
    lse: Buf,
    dout: Buf,
    dq: Buf,
    dkv_up: Buf,
    dk_pe: Buf,
}

impl State {
    fn new(ctx: &Ctx, shape: Shape, lengths: &[usize]) -> Self {
        let n: usize = lengths.iter().sum();
        let Shape { heads: h, nope: p, rope: r, v: w, .. } = shape;
        let act = DType::Bf16;
        let floats = |width: usize, stream| inputs::floats(ctx, act, n * width, stream);
        let zeros = |width: usize| ctx.zeros(act, n * width);
        Self {
            shape,
            cu: inputs::offsets(ctx, lengths),
            q: floats(h * (p + r), 1),
            kv_up: floats(h * (p + w), 2),
            k_pe: floats(r, 3),
            out: zeros(h * w),
            lse: ctx.zeros(DType::F32, n * h),
            dout: floats(h * w, 4),
            dq: zeros(h * (p + r)),
            dkv_up: zeros(h * (p + w)),
            dk_pe: zeros(r),
        }
    }

    fn forward(&mut self, ctx: &Ctx) {
        let x = inputs_of(&self.q, &self.kv_up, &self.k_pe, &self.cu);
        mla_prefill::forward(ctx, self.shape, x, self.out.view_mut(), self.lse.view_mut());
    }

    fn backward(&mut self, ctx: &Ctx) {
        let x = inputs_of(&self.q, &self.kv_up, &self.k_pe, &self.cu);
        let b = Backward {
            out: self.out.view(),
            lse: self.lse.view(),
            dout: self.dout.view(),
            dq: self.dq.view_mut(),
            dkv_up: self.dkv_up.view_mut(),
            dk_pe: self.dk_pe.view_mut(),
            dk_pe_stride: self.shape.rope,
        };
        mla_prefill::backward(ctx, self.shape, x, b);
    }
}

fn inputs_of<'a>(q: &'a Buf, kv_up: &'a Buf, k_pe: &'a Buf, cu: &'a Buf) -> Inputs<'a> {
    Inputs { q: q.view(), kv_up: kv_up.view(), k_pe: k_pe.view(), cu_q: cu.view(), cu_k: cu.view() }
}
