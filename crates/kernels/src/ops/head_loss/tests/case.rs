//! Inputs of all shapes, and both directions over them.

use super::super::{
    Backward, Gradients, Inputs, Outputs, backward, cpu::SLICE, cuda::SLICE as WIDE, forward, forward_backward,
};
use crate::testing::{buf_on, normals};
use crate::{Buf, Ctx, DType, Weight};
use hadal_numerics::{Purpose, Rng};

/// One set of inputs and output gradients.
pub struct Case {
    pub n: usize,
    pub d: usize,
    pub v: usize,
    pub g: usize,
    pub temperature: f32,
    pub hidden: Buf,
    pub weight: Buf,
    pub targets: Buf,
    pub given: Buf,
    pub d_logp: Buf,
    pub d_entropy: Buf,
    pub d_given: Buf,
}

impl Case {
    pub fn new(ctx: &Ctx, dtype: DType, [n, d, v, g]: [usize; 4], temperature: f32) -> Self {
        let ids = Rng::new(1, Purpose::Test, 90);
        let id = |i: usize| ids.below(i as u64, v as u64) as i32;
        // One row in four has no target.
        let targets: Vec<i32> = (0..n).map(|r| if r % 4 == 2 { -1 } else { id(r) }).collect();
        let given: Vec<i32> = (0..n * g).map(|i| id(1000 + i)).collect();
        let f32s = |stream, len| buf_on(ctx, DType::F32, &normals(stream, len, 1.0));
        Self {
            n,
            d,
            v,
            g,
            temperature,
            hidden: buf_on(ctx, dtype, &normals(10, n * d, 1.0)),
            weight: buf_on(ctx, dtype, &normals(11, v * d, 2.0 / (d as f32).sqrt())),
            targets: ctx.from_i32(&targets),
            given: ctx.from_i32(&given),
            d_logp: f32s(12, n),
            d_entropy: f32s(13, n),
            d_given: f32s(14, n * g),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            hidden: self.hidden.view(),
            weight: Weight::new(self.weight.view(), self.v, self.d),
            targets: self.targets.view(),
            temperature: self.temperature,
            given: (self.g > 0).then(|| self.given.view()),
        }
    }

    /// lse, logp, entropy, given_logp, top ids, top logp.
    pub fn forward(&self, ctx: &Ctx, k: usize) -> [Buf; 6] {
        let mut out = self.outputs(ctx, k);
        forward(ctx, self.inputs(), self.views(&mut out, k));
        out
    }

    fn outputs(&self, ctx: &Ctx, k: usize) -> [Buf; 6] {
        let f = |len| ctx.zeros(DType::F32, len);
        let n = self.n;
        [f(n), f(n), f(n), f(n * self.g), ctx.zeros(DType::I32, n * k), f(n * k)]
    }

    fn views<'a>(&self, out: &'a mut [Buf; 6], k: usize) -> Outputs<'a> {
        let [lse, logp, entropy, given, ids, top] = out;
        let given_logp = (self.g > 0).then(|| given.view_mut());
        let top = (k > 0).then(|| (ids.view_mut(), top.view_mut()));
        Outputs { lse: lse.view_mut(), logp: logp.view_mut(), entropy: entropy.view_mut(), given_logp, top }
    }

    /// d_hidden (of `dtype`) and d_weight, added to `before`.
    pub fn backward(&self, ctx: &Ctx, dtype: DType, before: &Buf, want: [bool; 2]) -> [Buf; 2] {
        self.backward_onto(ctx, dtype, (before, true), want)
    }

    /// As `backward`; d_weight is added to what was before, or overwrites it.
    pub fn backward_onto(&self, ctx: &Ctx, dtype: DType, before: (&Buf, bool), want: [bool; 2]) -> [Buf; 2] {
        let (before, accumulate) = before;
        let [lse, _, entropy, ..] = self.forward(ctx, 0);
        let mut dh = buf_on(ctx, dtype, &vec![7.0; self.n * self.d]);
        let mut dw = before.clone();
        let gradients = self.gradients(want[0].then_some(&mut dh), want[1].then_some((&mut dw, accumulate)));
        backward(ctx, self.inputs(), Backward { lse: lse.view(), entropy: entropy.view(), gradients });
        [dh, dw]
    }

    fn gradients<'a>(&'a self, dh: Option<&'a mut Buf>, dw: Option<(&'a mut Buf, bool)>) -> Gradients<'a> {
        Gradients {
            d_logp: self.d_logp.view(),
            d_entropy: Some(self.d_entropy.view()),
            d_given: (self.g > 0).then(|| self.d_given.view()),
            d_hidden: dh.map(Buf::view_mut),
            d_weight: dw.map(|(dw, accumulate)| (dw.view_mut(), accumulate)),
        }
    }

    /// What `forward` and `backward_onto` give, from both at once.
    pub fn both(
        &self,
        ctx: &Ctx,
        dtype: DType,
        before: (&Buf, bool),
        k: usize,
        want: [bool; 2],
    ) -> ([Buf; 6], [Buf; 2]) {
        let n = self.n;
        let mut dh = buf_on(ctx, dtype, &vec![7.0; n * self.d]);
        let mut dw = before.0.clone();
        let gradients = self.gradients(want[0].then_some(&mut dh), want[1].then_some((&mut dw, before.1)));
        let mut out = self.outputs(ctx, k);
        forward_backward(ctx, self.inputs(), self.views(&mut out, k), gradients);
        (out, [dh, dw])
    }

    /// Row `r` alone.
    pub fn row(&self, ctx: &Ctx, r: usize) -> Self {
        let f = |b: &Buf, w: usize| buf_on(ctx, b.dtype(), &b.view().slice(r * w..(r + 1) * w).to_f32());
        let i = |b: &Buf, w: usize| ctx.from_i32(&b.view().slice(r * w..(r + 1) * w).to_i32());
        Self {
            n: 1,
            hidden: f(&self.hidden, self.d),
            weight: self.weight.clone(),
            targets: i(&self.targets, 1),
            given: i(&self.given, self.g),
            d_logp: f(&self.d_logp, 1),
            d_entropy: f(&self.d_entropy, 1),
            d_given: f(&self.d_given, self.g),
            ..*self
        }
    }
}

pub fn widen(b: &Buf) -> Vec<f64> {
    b.view().to_f32().iter().map(|&x| f64::from(x)).collect()
}

/// N, D, V, G: one id, one id each side of a slice, ragged, more rows than a task, several slices, of a GPU too, and
/// several of its pieces.
const SHAPES: [[usize; 4]; 13] = [
    [1, 1, 1, 1],
    [3, 8, SLICE - 1, 2],
    [5, 16, SLICE, 0],
    [17, 24, SLICE + 1, 3],
    [33, 40, 2 * SLICE + 77, 1],
    [16, 7, 13, 5],
    [1, 64, 3 * SLICE, 4],
    [0, 8, 20, 2],
    [5, 16, WIDE + 1, 3],
    [9, 24, 2 * WIDE + 77, 0],
    [131, 72, 300, 0],
    [600, 8, 700, 1],
    [600, 8, 700, 0],
];

pub fn each_case(ctx: &Ctx, mut f: impl FnMut(DType, Case)) {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for dtype in [DType::F32, DType::Bf16] {
            f(dtype, Case::new(ctx, dtype, shape, [1.0, 0.7, 2.5][i % 3]));
        }
    }
}
