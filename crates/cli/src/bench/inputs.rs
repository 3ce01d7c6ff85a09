//! Numbers to compute with: what they are does not matter to speed, as long as they are ordinary ones.

use hadal_kernels::ops::add;
use hadal_kernels::{Buf, Ctx, DType, Elem, bf16};
use hadal_numerics::{Purpose, Rng};

/// Numbers drawn; what is longer repeats them. For a GPU more: rows of its products are to differ.
const DRAWN: usize = 1 << 14;
const DRAWN_FOR_GPU: usize = 1 << 20;

/// `len` normally distributed numbers of a float dtype.
pub fn floats(ctx: &Ctx, dtype: DType, len: usize, stream: u64) -> Buf {
    let rng = Rng::new(0, Purpose::Test, stream);
    let drawn = |n: usize| -> Vec<f32> { (0..n.min(len) as u64).map(|i| rng.normal(i)).collect() };
    if ctx.device.as_cuda().is_some() {
        return repeated(ctx, dtype, len, &drawn(DRAWN_FOR_GPU));
    }
    let block = drawn(DRAWN);
    let mut buf = ctx.zeros(dtype, len);
    let cpu = ctx.host();
    match &mut buf {
        Buf::F32(to) => cpu.chunks_mut(to, DRAWN, |_, to| to.copy_from_slice(&block[..to.len()])),
        Buf::Bf16(to) => {
            let block: Vec<bf16> = block.iter().map(|&x| <bf16 as Elem>::round(x)).collect();
            cpu.chunks_mut(to, DRAWN, |_, to| to.copy_from_slice(&block[..to.len()]));
        }
        Buf::I32(_) | Buf::Cuda(_) => panic!("expected a float dtype in host memory"),
    }
    buf
}

/// `len` numbers on a GPU, as often `block` as it takes.
fn repeated(ctx: &Ctx, dtype: DType, len: usize, block: &[f32]) -> Buf {
    let (block, mut buf) = (ctx.from_f32(block), ctx.zeros(dtype, len));
    for at in (0..len).step_by(block.len().max(1)) {
        let piece = block.len().min(len - at);
        add::convert(ctx, block.view().slice(0..piece), buf.view_mut().slice(at..at + piece));
    }
    buf
}

/// `len` integers below `n`.
pub fn drawn(n: usize, len: usize, stream: u64) -> impl Iterator<Item = i32> {
    let rng = Rng::new(0, Purpose::Test, stream);
    (0..len as u64).map(move |i| rng.below(i, n as u64) as i32)
}

/// As [`drawn`], on the device.
pub fn below(ctx: &Ctx, n: usize, len: usize, stream: u64) -> Buf {
    ctx.from_i32(&drawn(n, len, stream).collect::<Vec<_>>())
}

/// The choice of `top_k` different experts of `experts` by each of `n` tokens, i32 `[n, top_k]`: even, neighbours in
/// turns.
pub fn choices(ctx: &Ctx, experts: usize, top_k: usize, n: usize) -> Buf {
    let stride = (experts / top_k).max(1);
    let chosen = |slot: usize| ((slot / top_k * 7 + slot % top_k * stride) % experts) as i32;
    ctx.from_i32(&(0..n * top_k).map(chosen).collect::<Vec<_>>())
}

/// Offsets of experts' rows from their counts, i32 `[E + 1]`.
pub fn offsets(ctx: &Ctx, counts: &[usize]) -> Buf {
    let mut at = 0;
    let ends = counts.iter().map(|c| {
        at += *c as i32;
        at
    });
    ctx.from_i32(&std::iter::once(0).chain(ends).collect::<Vec<_>>())
}
