//! `bench gemm`: squares, every product of a preset's layers in its three directions, and few rows.
//!
//! Shapes come from the presets' tables of tensors. A product is counted in operations, few rows in bytes, since the
//! weight must then be read for almost nothing; weights of few rows take turns, so that they come from memory.

use super::case::{Against, Case, Ready, Unit};
use super::inputs;
use hadal_kernels::ops::gemm::{self, Gemm, Mat, MatMut};
use hadal_kernels::{Ctx, DType};
use hadal_model::{FeedForwardIds, Layout, ParamId};
use serde_json::json;

/// Which operand is stored transposed: neither, the second (forward), or the first (weight gradient).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `[m, k] [k, n]`.
    Nn,
    /// `[m, k] [n, k]`.
    Nt,
    /// `[k, m] [k, n]`.
    Tn,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Nn => "nn",
            Self::Nt => "nt",
            Self::Tn => "tn",
        }
    }
}

/// A product.
#[derive(Clone, Copy)]
pub struct Product {
    /// Rows, columns, length of the sums.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// How operands are stored.
    pub form: Form,
    /// Types of both operands and of the result.
    pub dtypes: [DType; 3],
    /// Adds to the result.
    pub accumulate: bool,
}

impl Product {
    /// Operations.
    pub fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// Bytes of the second operand, and of all.
    fn bytes(&self) -> (usize, usize) {
        let [a, b, c] = self.dtypes.map(DType::size);
        let weight = self.k * self.n * b;
        (weight, self.m * self.k * a + weight + self.m * self.n * c)
    }

    /// Does it again and again, on one second operand after the other of `copies`.
    pub fn work(self, ctx: &Ctx, copies: usize) -> super::measure::Work {
        let Self { m, n, k, .. } = self;
        let [da, db, dc] = self.dtypes;
        let a = inputs::floats(ctx, da, m * k, 1);
        let b = inputs::floats(ctx, db, copies * k * n, 2);
        let (mut c, mut next, ctx) = (ctx.zeros(dc, m * n), 0, ctx.clone());
        let (ta, tb) = (self.form == Form::Tn, self.form == Form::Nt);
        Box::new(move || {
            let g = Gemm {
                m,
                n,
                k,
                a: Mat { data: a.view(), ld: if ta { m } else { k } },
                ta,
                b: Mat { data: b.view().slice(next * k * n..(next + 1) * k * n), ld: if tb { k } else { n } },
                tb,
                c: MatMut { data: c.view_mut(), ld: n },
                accumulate: self.accumulate,
            };
            gemm::gemm(&ctx, g);
            next = (next + 1) % copies;
        })
    }
}

/// Bytes that weights of few rows have together: more than caches hold.
const COLD: usize = 256 << 20;
/// Numbers of rows that decoding has.
const FEW: [usize; 5] = [1, 2, 4, 8, 16];
const BF16: [DType; 3] = [DType::Bf16; 3];
const F32: [DType; 3] = [DType::F32; 3];

/// All cases: of a GPU larger ones, and what it costs to give a row the same bits in any company.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    let gpu = ctx.device.as_cuda().is_some();
    let mut all: Vec<Case> = Vec::new();
    for (of, dtypes, forms, n) in [
        ("square", BF16, &[Form::Nn, Form::Nt, Form::Tn][..], if gpu { 8192 } else { 2048 }),
        ("square f32", F32, &[Form::Nn, Form::Nt], if gpu { 4096 } else { 2048 }),
    ] {
        for &form in forms {
            let p = Product { m: n, n, k: n, form, dtypes, accumulate: false };
            all.push(case(&format!("{of}/{}", form.name()), p));
        }
    }
    if gpu {
        all.extend([1, 64, 4096].map(invariant));
    }
    // 8 sequences of the preset's 512 tokens; 512 tokens; 8 of 2048; a few for tests.
    let presets: &[_] = if gpu {
        &[("1b", 16384, true), ("v2-lite", 4096, false), ("nano", 16, true)]
    } else {
        &[("mini", 4096, true), ("v2-lite", 512, false), ("nano", 16, true)]
    };
    for &(preset, tokens, head) in presets {
        let (_, layout) = super::preset(preset);
        all.extend(weights(&layout, head).iter().flat_map(|w| directions(preset, tokens, w)));
    }
    for preset in ["v2-lite", "nano"] {
        let (_, layout) = super::preset(preset);
        let weights = weights(&layout, false);
        let rows = |w: &Weight| FEW.map(|m| few(preset, m, w));
        all.extend(weights.iter().filter(|w| w.dtype == DType::Bf16).flat_map(rows));
    }
    all
}

/// A matrix that activations are multiplied with.
struct Weight {
    name: &'static str,
    out: usize,
    width: usize,
    dtype: DType,
}

/// The matrices of a dense and of an MoE layer, and the head; the routed experts' are grouped and not here.
fn weights(layout: &Layout, head: bool) -> Vec<Weight> {
    let weight = |name, id: ParamId| {
        let t = layout.info(id);
        Weight { name, out: t.rows, width: t.cols, dtype: if t.compute { DType::Bf16 } else { DType::F32 } }
    };
    let a = &layout.blocks[0].attention;
    let mut all = Vec::new();
    all.extend(a.q_proj.map(|id| weight("q_proj", id)));
    all.extend(a.q_lora.iter().flat_map(|&(a, _, b)| [weight("q_a_proj", a), weight("q_b_proj", b)]));
    all.extend([weight("kv_a_proj", a.kv_a), weight("kv_b_proj", a.kv_b), weight("o_proj", a.o_proj)]);
    let (mut dense, mut moe) = (false, false);
    for block in &layout.blocks {
        match block.feed_forward {
            FeedForwardIds::Dense(mlp) if !dense => {
                dense = true;
                all.extend([weight("dense gate_up_proj", mlp.gate_up), weight("dense down_proj", mlp.down)]);
            }
            FeedForwardIds::Moe(ids) if !moe => {
                moe = true;
                let shared = ids.shared.iter();
                all.extend(shared.flat_map(|mlp| {
                    [weight("shared gate_up_proj", mlp.gate_up), weight("shared down_proj", mlp.down)]
                }));
                all.push(weight("router", ids.gate));
            }
            _ => {}
        }
    }
    all.extend(layout.head.filter(|_| head).map(|id| weight("head", id)));
    all
}

/// Forward, gradient of the input, gradient of the weight. The router's logits and their gradient are f32.
fn directions(preset: &str, tokens: usize, w: &Weight) -> [Case; 3] {
    let act = DType::Bf16;
    let p = |[m, n, k]: [usize; 3], form, dtypes, accumulate| Product { m, n, k, form, dtypes, accumulate };
    [
        ("forward", p([tokens, w.out, w.width], Form::Nt, [act, w.dtype, w.dtype], false)),
        ("input gradient", p([tokens, w.width, w.out], Form::Nn, [w.dtype, w.dtype, act], false)),
        ("weight gradient", p([w.out, w.width, tokens], Form::Tn, [w.dtype, act, DType::F32], true)),
    ]
    .map(|(direction, p)| case(&format!("{preset}/{}/{direction}", w.name), p))
}

fn dtype(d: DType) -> &'static str {
    if d == DType::F32 { "f32" } else { "bf16" }
}

fn case(name: &str, p: Product) -> Case {
    let f32 = p.dtypes[..2].contains(&DType::F32);
    Case {
        name: format!("{name} {}x{}x{}", p.m, p.n, p.k),
        sizes: sizes(p, 1),
        unit: Unit::Gflops,
        work: p.flops(),
        against: if f32 { Against::F32 } else { Against::Bf16 },
        setup: Box::new(move |ctx| Ready { ours: p.work(ctx, 1), rival: None }),
    }
}

/// `m` rows through a square weight, batch invariant beside not.
fn invariant(m: usize) -> Case {
    let p = Product { m, n: 4096, k: 4096, form: Form::Nt, dtypes: BF16, accumulate: false };
    let work = move |ctx: &Ctx, on: bool| -> super::measure::Work {
        let (mut work, ctx) = (p.work(ctx, 1), ctx.clone());
        Box::new(move || {
            let set = |on| ctx.device.as_cuda().into_iter().for_each(|cuda| cuda.set_invariant(on));
            set(on);
            work();
            set(false);
        })
    };
    Case {
        name: format!("batch invariant/{}x{}x{}", p.m, p.n, p.k),
        sizes: sizes(p, 1),
        unit: Unit::Gflops,
        work: p.flops(),
        against: Against::Bf16,
        setup: Box::new(move |ctx| Ready { ours: work(ctx, true), rival: Some(("hadal gemm", work(ctx, false))) }),
    }
}

/// `m` rows through a weight.
fn few(preset: &str, m: usize, w: &Weight) -> Case {
    let p = Product { m, n: w.out, k: w.width, form: Form::Nt, dtypes: BF16, accumulate: false };
    let (weight, all) = p.bytes();
    let copies = if preset == super::TESTED { 1 } else { COLD.div_ceil(weight) };
    Case {
        name: format!("{preset}/{}/rows {m}x{}x{}", w.name, p.n, p.k),
        sizes: sizes(p, copies),
        unit: Unit::Gbytes,
        work: all as f64,
        against: Against::Copy,
        setup: Box::new(move |ctx| Ready { ours: p.work(ctx, copies), rival: None }),
    }
}

fn sizes(p: Product, copies: usize) -> serde_json::Value {
    let [a, b, c] = p.dtypes.map(dtype);
    json!({
        "m": p.m, "n": p.n, "k": p.k, "layout": p.form.name(), "a": a, "b": b, "c": c,
        "accumulate": p.accumulate, "copies": copies,
    })
}
