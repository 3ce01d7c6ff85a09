//! Weights in flat arenas: FP32 masters and what is computed with.

use crate::layout::ALIGN;
use crate::{Kind, Layout, ModelConfig, ParamId, TensorInfo};
use hadal_kernels::{Buf, Ctx, DType, View, ViewMut, Weight};
use hadal_numerics::{Purpose, Rng};
use std::ops::Range;
use std::sync::Arc;

/// Elements one task initialises.
const INIT_BLOCK: usize = 1 << 14;

/// Numbers the model computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Everything f32: for proof.
    Fp32,
    /// BF16 activations and compute weights over FP32 masters.
    Bf16,
}

impl Precision {
    /// dtype of activations and of weights in matrix products.
    pub fn act(self) -> DType {
        match self {
            Self::Fp32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }
}

/// Weights. In training: FP32 masters and, in bf16, the compute copy. For inference in bf16 there are no masters: only
/// the tensors that are read in f32 (norms, gates, biases) are kept in f32.
pub struct Params {
    /// The table.
    pub layout: Arc<Layout>,
    /// What matrix products read.
    pub precision: Precision,
    /// f32 arena of all tensors, or of those that `kept` places.
    pub master: Buf,
    /// bf16 arena; None when the masters are the compute weights.
    pub compute: Option<Buf>,
    /// For inference in bf16: where in `master` each tensor lies that is kept in f32.
    pub(crate) kept: Option<Vec<Option<usize>>>,
}

/// Where each tensor that is read in f32 lies in an arena of such tensors alone, and the arena's length.
fn kept_in_f32(layout: &Layout) -> (Vec<Option<usize>>, usize) {
    let mut len = 0usize;
    let mut place = |t: &TensorInfo| {
        let at = len;
        len = (at + t.len()).next_multiple_of(ALIGN);
        at
    };
    let kept = layout.tensors.iter().map(|t| (!t.compute).then(|| place(t))).collect();
    (kept, len)
}

impl Params {
    /// All zeros; files fill it, then call [`Params::refresh`].
    pub fn zeros(ctx: &Ctx, layout: Arc<Layout>, precision: Precision) -> Self {
        let master = ctx.zeros(DType::F32, layout.len);
        let compute = (precision == Precision::Bf16).then(|| ctx.zeros(DType::Bf16, layout.len));
        Self { layout, precision, master, compute, kept: None }
    }

    /// All zeros, without masters where they are not what is computed with.
    pub fn zeros_for_inference(ctx: &Ctx, layout: Arc<Layout>, precision: Precision) -> Self {
        if precision == Precision::Fp32 {
            return Self::zeros(ctx, layout, precision);
        }
        let (kept, len) = kept_in_f32(&layout);
        let compute = Some(ctx.zeros(DType::Bf16, layout.len));
        Self { master: ctx.zeros(DType::F32, len), layout, precision, compute, kept: Some(kept) }
    }

    /// Bytes that the weights of `layout` take for inference.
    pub fn inference_bytes(layout: &Layout, precision: Precision) -> usize {
        let f32s = if precision == Precision::Fp32 { layout.len } else { kept_in_f32(layout).1 };
        let bf16s = if precision == Precision::Fp32 { 0 } else { layout.len };
        f32s * DType::F32.size() + bf16s * DType::Bf16.size()
    }

    /// True if every tensor has its FP32 master: what training and saving need.
    pub fn has_masters(&self) -> bool {
        self.kept.is_none()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.master.bytes() + self.compute.as_ref().map_or(0, Buf::bytes)
    }

    /// Initial weights: normal with `initializer_range`, each number a function of (seed, published name, index), so
    /// that no split changes it; norms 1, correction bias 0 (V3 report 4.2).
    pub fn init(ctx: &Ctx, config: &ModelConfig, layout: Arc<Layout>, precision: Precision, seed: u64) -> Self {
        let std = config.initializer_range as f32;
        let cpu = ctx.host();
        let mut masters = ctx.on_host().zeros(DType::F32, layout.len);
        let master = masters.view_mut().f32();
        for (_, p) in layout.published().filter(|(t, _)| t.kind != Kind::Buffer) {
            let out = &mut master[p.range()];
            if p.shape.len() == 1 {
                out.fill(1.0);
                continue;
            }
            let rng = Rng::named(seed, Purpose::Init, &p.name);
            cpu.chunks_mut(out, INIT_BLOCK, |b, out| {
                out.iter_mut().enumerate().for_each(|(i, w)| *w = rng.normal((b * INIT_BLOCK + i) as u64) * std);
            });
        }
        Self::of_masters(ctx, layout, precision, masters)
    }

    /// Masters, in host memory or on the device, and their rounded copy.
    pub fn of_masters(ctx: &Ctx, layout: Arc<Layout>, precision: Precision, masters: Buf) -> Self {
        assert_eq!(masters.len(), layout.len, "masters of another layout");
        let compute = (precision == Precision::Bf16).then(|| ctx.zeros(DType::Bf16, layout.len));
        let mut params = Self { layout, precision, master: ctx.here(masters), compute, kept: None };
        params.refresh(ctx);
        params
    }

    /// The same on the context's device.
    pub(crate) fn here(self, ctx: &Ctx) -> Self {
        Self { master: ctx.here(self.master), compute: self.compute.map(|c| ctx.here(c)), ..self }
    }

    /// Rounds the masters into the compute copy. Without masters the compute weights are all there is.
    pub fn refresh(&mut self, ctx: &Ctx) {
        if let (Some(c), true) = (&mut self.compute, self.kept.is_none()) {
            hadal_kernels::ops::add::convert(ctx, self.master.view(), c.view_mut());
        }
    }

    /// A tensor as matrix products read it: the compute dtype, or f32 for gate weights.
    pub fn weight(&self, id: ParamId) -> Weight<'_> {
        let t = self.layout.info(id);
        let data = match (&self.compute, t.compute) {
            (Some(c), true) => c.view().slice(t.range()),
            _ => self.f32(id),
        };
        Weight::stacked(data, t.experts, t.rows, t.cols)
    }

    /// A tensor in f32: norms, gate, correction bias. Panics for one that inference keeps in bf16 alone.
    pub fn f32(&self, id: ParamId) -> View<'_> {
        self.master.view().slice(self.f32_range(id))
    }

    /// As [`Params::f32`], to write (the correction bias is updated outside AdamW).
    pub fn f32_mut(&mut self, id: ParamId) -> ViewMut<'_> {
        let r = self.f32_range(id);
        self.master.view_mut().slice(r)
    }

    fn f32_range(&self, id: ParamId) -> Range<usize> {
        let t = self.layout.info(id);
        match &self.kept {
            None => t.range(),
            Some(kept) => {
                let at = kept[id.0].unwrap_or_else(|| panic!("{} has no f32 form here", t.published[0].name));
                at..at + t.len()
            }
        }
    }
}
