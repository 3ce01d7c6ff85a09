//! Batches, and both directions over them beside the reference.

use super::super::{Backward, Inputs, Shape, backward, forward, reference};
use crate::testing::{assert_close, buf, buf_on, ctx, normals, op_tolerance};
use crate::{Buf, Ctx, DType, Level};
use hadal_numerics::Tolerance;

/// A batch in buffers, and what the reference makes of the same (rounded) numbers.
pub struct Case {
    pub name: String,
    pub shape: Shape,
    pub q: Buf,
    pub kv_up: Buf,
    pub k_pe: Buf,
    pub dout: Buf,
    pub cu_q: Buf,
    pub cu_k: Buf,
}

pub struct Results {
    pub out: Buf,
    pub lse: Buf,
    pub dq: Buf,
    pub dkv_up: Buf,
    pub dk_pe: Buf,
}

pub fn shape(heads: usize, nope: usize, rope: usize, v: usize) -> Shape {
    Shape { heads, nope, rope, v, k_pe_stride: rope + 5, scale: ((nope + rope) as f32).powf(-0.5) * 1.2 }
}

fn ints(values: &[i32]) -> Buf {
    ctx().from_i32(values)
}

fn cumulative(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut cu = vec![0];
    for n in lengths {
        cu.push(cu[cu.len() - 1] + n as i32);
    }
    cu
}

impl Case {
    /// Sequences of (queries, keys).
    pub fn new(dtype: DType, shape: Shape, sequences: &[(usize, usize)]) -> Self {
        let cu_q = cumulative(sequences.iter().map(|s| s.0));
        let cu_k = cumulative(sequences.iter().map(|s| s.1));
        let (nq, nk) = (cu_q[sequences.len()] as usize, cu_k[sequences.len()] as usize);
        let h = shape.heads;
        Self {
            name: format!("{dtype:?} {shape:?} {sequences:?}"),
            shape,
            q: buf(dtype, &normals(1, nq * h * (shape.nope + shape.rope), 1.0)),
            kv_up: buf(dtype, &normals(2, nk * h * (shape.nope + shape.v), 1.0)),
            k_pe: buf(dtype, &normals(3, nk * shape.k_pe_stride, 1.0)),
            dout: buf(dtype, &normals(4, nq * h * shape.v, 1.0)),
            cu_q: ints(&cu_q),
            cu_k: ints(&cu_k),
        }
    }

    pub fn reference(&self) -> reference::Inputs {
        reference::Inputs {
            q: f64s(&self.q),
            kv_up: f64s(&self.kv_up),
            k_pe: f64s(&self.k_pe),
            cu_q: self.cu_q.view().i32().to_vec(),
            cu_k: self.cu_k.view().i32().to_vec(),
        }
    }

    pub fn run(&self, ctx: &Ctx) -> Results {
        let (dtype, s) = (self.q.dtype(), self.shape);
        let here = |b: &Buf| ctx.here(b.clone());
        let (q, kv_up, k_pe, dout) = (here(&self.q), here(&self.kv_up), here(&self.k_pe), here(&self.dout));
        let (cu_q, cu_k) = (here(&self.cu_q), here(&self.cu_k));
        let inputs =
            Inputs { q: q.view(), kv_up: kv_up.view(), k_pe: k_pe.view(), cu_q: cu_q.view(), cu_k: cu_k.view() };
        let mut r = Results {
            out: ctx.zeros(dtype, self.dout.len()),
            lse: ctx.zeros(DType::F32, self.dout.len() / s.v),
            dq: ctx.zeros(dtype, self.q.len()),
            dkv_up: ctx.zeros(dtype, self.kv_up.len()),
            dk_pe: buf_on(ctx, dtype, &vec![7.0; self.k_pe.len()]),
        };
        forward(ctx, s, inputs, r.out.view_mut(), r.lse.view_mut());
        let b = Backward {
            out: r.out.view(),
            lse: r.lse.view(),
            dout: dout.view(),
            dq: r.dq.view_mut(),
            dkv_up: r.dkv_up.view_mut(),
            dk_pe: r.dk_pe.view_mut(),
            dk_pe_stride: s.k_pe_stride,
        };
        backward(ctx, s, inputs, b);
        r
    }

    /// Runs and compares everything with the reference.
    pub fn check(&self, ctx: &Ctx) {
        let (s, name, tol) = (&self.shape, &self.name, op_tolerance(self.q.dtype()));
        let r = self.run(ctx);
        let x = self.reference();
        let (out, lse) = reference::forward(s, &x);
        let g = reference::backward(s, &x, &f64s(&r.out), &f64s(&self.dout));
        assert_close(&format!("out, {name}"), &r.out, &out, tol);
        assert_close(&format!("lse, {name}"), &r.lse, &lse, Tolerance::F32_OP);
        let multiplies_bf16 = ctx.device.as_cuda().is_some() || ctx.host().isa().level() >= Level::Avx512Bf16;
        let rounds_again = self.q.dtype() == DType::Bf16 && multiplies_bf16;
        let spread = rounds_again.then(|| reference::squares(s, &x, &f64s(&r.out), &f64s(&self.dout)));
        let check = |what: &str, found: &Buf, expected: &[f64], squares: Option<&Vec<f64>>| match squares {
            None => assert_close(&format!("{what}, {name}"), found, expected, tol),
            Some(squares) => assert_rounded(&format!("{what}, {name}"), found, expected, squares, tol),
        };
        check("dq", &r.dq, &g.dq, spread.as_ref().map(|s| &s.dq));
        check("dkv_up", &r.dkv_up, &g.dkv_up, spread.as_ref().map(|s| &s.dkv_up));
        let all = r.dk_pe.view().to_f32();
        let rows = || all.chunks(s.k_pe_stride);
        let dk_pe: Vec<f32> = rows().flat_map(|row| row[..s.rope].to_vec()).collect();
        check("dk_pe", &buf(DType::F32, &dk_pe), &g.dk_pe, spread.as_ref().map(|s| &s.dk_pe));
        assert!(rows().all(|row| row[s.rope..].iter().all(|&x| x == 7.0)), "what lies between dk_pe's rows: {name}");
    }
}

/// As `assert_close` for sums whose every term was rounded to bf16 once more (P and dS before their products; Hopper's dS
/// twice, as it is made of the rounded P): beyond the tolerance an element may be off by six deviations of what one such
/// rounding does to it. A rounding by up to half of 2^-8 of a term
/// deviates by that over the root of three; `squares` are the sums of the terms' squares. One in 5e8 elements is further off.
fn assert_rounded(name: &str, found: &Buf, expected: &[f64], squares: &[f64], tol: Tolerance) {
    let found = found.view().to_f32();
    let rms = (expected.iter().map(|b| b * b).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    for (i, ((&a, b), square)) in found.iter().zip(expected).zip(squares).enumerate() {
        let allowed = tol.element * (b.abs() + rms) + 6.0 * (2f64.powi(-9) / 3f64.sqrt()) * square.sqrt();
        let error = (f64::from(a) - b).abs();
        assert!(error <= allowed, "{name}[{i}]: {a}, expected {b}: {error:.3e} apart, allowed {allowed:.3e}");
    }
    let expected: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
    let cosine = hadal_numerics::cosine(&found, &expected);
    assert!(cosine >= 1.0 - tol.cosine, "{name}: cosine {cosine}");
}

pub fn f64s(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Head dims and strides in whole vectors of 16 bytes, V3's own among them: other kernels take them where there are.
pub fn even_shapes() -> Vec<Shape> {
    let even = |shape: Shape| Shape { k_pe_stride: shape.rope + 8, ..shape };
    vec![even(shape(2, 16, 8, 16)), even(shape(2, 32, 16, 32)), even(shape(2, 128, 64, 128))]
}

/// V3's head (128 + 64, 128) scaled down, ragged widths, no nope part, no rope part.
pub fn shapes() -> Vec<Shape> {
    vec![shape(2, 16, 8, 16), shape(3, 7, 3, 5), shape(1, 0, 4, 18), shape(2, 9, 0, 33)]
}

/// Small heads in both dtypes, and the even ones in bf16.
pub fn kinds() -> Vec<(DType, Shape)> {
    let small = shape(2, 12, 6, 10);
    let even = even_shapes().into_iter().map(|shape| (DType::Bf16, shape));
    [(DType::F32, small), (DType::Bf16, small)].into_iter().chain(even).collect()
}

/// A buffer's elements from `at * width` on, `n * width` of them.
pub fn rows(b: &Buf, at: usize, n: usize, width: usize) -> Buf {
    buf(b.dtype(), &b.view().to_f32()[at * width..(at + n) * width])
}
