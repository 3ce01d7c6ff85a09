//! Inputs and checks shared by the ops' tests.

use crate::{Buf, Ctx, DType, Device, Elem, bf16};
use hadal_numerics::{Purpose, Rng, Tolerance, close};

/// Contexts with 1, 2 and 5 threads: every fast path must give the same bits on all.
pub fn contexts() -> Vec<Ctx> {
    [1, 2, 5].iter().map(|&t| Device::cpu(Some(t)).unwrap().ctx()).collect()
}

/// A context with two threads.
pub fn ctx() -> Ctx {
    Device::cpu(Some(2)).unwrap().ctx()
}

/// `n` standard normals times `scale`, the stream numbered `stream`.
pub fn normals(stream: u64, n: usize, scale: f32) -> Vec<f32> {
    let r = Rng::new(1, Purpose::Test, stream);
    (0..n).map(|i| r.normal(i as u64) * scale).collect()
}

/// Values in a buffer of `dtype`, rounded where it is bf16.
pub fn buf(dtype: DType, values: &[f32]) -> Buf {
    let mut b = Buf::host_zeros(dtype, values.len());
    match &mut b {
        Buf::F32(v) => v.copy_from_slice(values),
        Buf::Bf16(v) => v.iter_mut().zip(values).for_each(|(o, x)| *o = <bf16 as Elem>::round(*x)),
        Buf::I32(_) => panic!("expected a float dtype"),
    }
    b
}

/// The tolerance of one op with outputs of `dtype`.
pub fn op_tolerance(dtype: DType) -> Tolerance {
    if dtype == DType::F32 { Tolerance::F32_OP } else { Tolerance::BF16_OP }
}

/// Fails the test if `found` is not close to the f64 `expected`.
#[track_caller]
pub fn assert_close(name: &str, found: &Buf, expected: &[f64], tol: Tolerance) {
    let expected: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
    if let Err(e) = close(name, &found.view().to_f32(), &expected, tol) {
        panic!("{e}");
    }
}

/// Fails the test unless the bytes are equal.
#[track_caller]
pub fn assert_same_bits(name: &str, a: &Buf, b: &Buf) {
    let (x, y) = (a.view().to_f32(), b.view().to_f32());
    assert_eq!(x.len(), y.len(), "{name}");
    for (i, (p, q)) in x.iter().zip(&y).enumerate() {
        assert_eq!(p.to_bits(), q.to_bits(), "{name}[{i}]: {p} and {q}");
    }
}

/// Checks an analytic gradient of the scalar function `f` at `x` by central differences in f64. Every element is
/// checked up to 200, then a spread of 200 of them.
#[track_caller]
pub fn finite_difference(name: &str, x: &[f64], gradient: &[f64], mut f: impl FnMut(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len(), "{name}");
    let stride = x.len().div_ceil(200).max(1);
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    let mut probe = x.to_vec();
    for i in (0..x.len()).step_by(stride) {
        let h = 1e-5 * x[i].abs().max(1.0);
        probe[i] = x[i] + h;
        let up = f(&probe);
        probe[i] = x[i] - h;
        let down = f(&probe);
        probe[i] = x[i];
        found.push(gradient[i] as f32);
        expected.push(((up - down) / (2.0 * h)) as f32);
    }
    if let Err(e) = close(name, &found, &expected, Tolerance::FINITE_DIFFERENCE) {
        panic!("finite difference: {e}");
    }
}
