//! Writes new tokens into the latent cache: normalised c_kv, then rotated k_pe, one slot per token.
//! All three buffers have one dtype; a copy rounds nothing.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, ops::by_dtype};

/// Arguments of [`store`].
#[derive(Debug)]
pub struct Store<'a> {
    /// `[N, C]`, dense.
    pub c_kv: View<'a>,
    /// `[N, R]` with rows `k_pe_stride` apart.
    pub k_pe: View<'a>,
    /// Elements from one row of k_pe to the next.
    pub k_pe_stride: usize,
    /// C.
    pub latent: usize,
    /// R.
    pub rope: usize,
    /// i32 `[N]`: slot = block * 64 + offset in the block; -1 stores nothing. No slot occurs twice.
    pub slots: View<'a>,
    /// One layer's cache `[blocks][64][C + R]`.
    pub cache: ViewMut<'a>,
}

/// `cache[slot]` = `[c_kv | k_pe]`. A slot beyond the cache is a contract breach: a CPU panics and names the token, a
/// GPU stops with an assertion of the device.
pub fn store(ctx: &Ctx, a: Store<'_>) {
    let _timer = ctx.timer("kv_store", sizes![a.c_kv, a.k_pe, a.k_pe_stride, a.latent, a.rope, a.slots, a.cache]);
    let (n, c, r) = (a.slots.len(), a.latent, a.rope);
    assert_eq!(a.c_kv.len(), n * c, "c_kv of {n} tokens x {c}");
    assert!(a.k_pe_stride >= r, "k_pe: rows of {r}, {} apart", a.k_pe_stride);
    let need = if n == 0 { 0 } else { (n - 1) * a.k_pe_stride + r };
    assert!(a.k_pe.len() >= need, "k_pe holds {} elements, {n} tokens need {need}", a.k_pe.len());
    assert!(
        c + r > 0 && a.cache.len().is_multiple_of(c + r),
        "a cache of {} elements, rows of {c} + {r}",
        a.cache.len()
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::store(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.cache.dtype(), T => cpu::store::<T>(cpu, a)),
    }
}
