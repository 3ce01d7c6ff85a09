//! Inputs and checks shared by the ops' tests.

use crate::cuda::Cuda;
use crate::{Buf, Ctx, DType, Device, Elem, Isa, Level, bf16};
pub use hadal_numerics::skipped;
use hadal_numerics::{Purpose, Rng, Tolerance, close};

/// The levels of vector instructions that this CPU has, the narrowest first; a test's run without the others is
/// reported as skipped.
#[track_caller]
pub fn isas() -> Vec<Isa> {
    let isa = |level: Level| {
        let isa = Isa::new(level);
        if isa.is_none() {
            skipped(&format!("this CPU lacks {}", level.name()));
        }
        isa
    };
    let mut isas: Vec<Isa> = Level::ALL.into_iter().filter_map(isa).collect();
    if Isa::new(Level::Amx).is_none() {
        isas.extend(Isa::emulated_amx());
    }
    isas
}

/// A context with `threads` workers on one level.
pub fn ctx_of(threads: usize, isa: Isa) -> Ctx {
    Device::cpu_with(Some(threads), isa).unwrap().ctx()
}

/// A context with two threads for every level that this CPU has, and one of a GPU: every fast path must match its
/// reference on all.
#[track_caller]
pub fn levels() -> Vec<Ctx> {
    isas().into_iter().map(|isa| ctx_of(2, isa)).chain(gpu()).collect()
}

/// A context of the first GPU; where there is none, what it would have tested is reported as skipped.
#[track_caller]
pub fn gpu() -> Option<Ctx> {
    if Cuda::count().unwrap() == 0 {
        skipped("no NVIDIA GPU");
        return None;
    }
    Some(Device::cuda(0, Some(2)).unwrap().ctx())
}

/// As [`gpu`], with products that are batch-invariant.
#[track_caller]
pub fn invariant_gpu() -> Option<Ctx> {
    let ctx = gpu()?;
    ctx.device.as_cuda()?.set_invariant(true);
    Some(ctx)
}

/// As [`invariant_gpu`], with the kernels that a GPU before Hopper gets.
#[track_caller]
pub fn older_gpu() -> Option<Ctx> {
    let ctx = invariant_gpu()?;
    ctx.device.as_cuda()?.set_plain();
    Some(ctx)
}

/// As [`buf`], on the context's device.
pub fn buf_on(ctx: &Ctx, dtype: DType, values: &[f32]) -> Buf {
    ctx.upload(&buf(dtype, values))
}

/// Contexts with 1, 2 and 5 threads on one level, which must give the same bits on all.
pub fn thread_counts(isa: Isa) -> Vec<Ctx> {
    [1, 2, 5].iter().map(|&t| ctx_of(t, isa)).collect()
}

/// Contexts with 1, 2 and 5 threads on the widest level and two on the others: what fuses nothing must give the same
/// bits on all.
#[track_caller]
pub fn contexts() -> Vec<Ctx> {
    let mut isas = isas();
    let widest = isas.pop().expect("every CPU has the first level");
    let others = isas.into_iter().map(|isa| ctx_of(2, isa));
    thread_counts(widest).into_iter().chain(others).collect()
}

/// A context with two threads, on the level that a user would get.
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
        Buf::I32(_) | Buf::Cuda(_) => panic!("expected a float dtype"),
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
