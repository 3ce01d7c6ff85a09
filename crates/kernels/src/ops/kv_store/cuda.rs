//! Storing on a GPU: a block of threads a token. A slot beyond the cache ends the program with the device's assertion;
//! two tokens for one slot are not found there.

use super::Store;
use crate::cuda::{Cuda, Grid, Source, Value, args, source};

static SOURCE: Source = source!("kv_store.cu");

/// See [`super::store`].
pub(super) fn store(cuda: &Cuda, mut a: Store<'_>) {
    let size = a.cache.dtype().size();
    let wide = [a.latent, a.rope, a.k_pe_stride].iter().all(|n| (n * size).is_multiple_of(16))
        && [a.c_kv.ptr(), a.k_pe.ptr(), a.cache.ptr()].iter().all(|p| p % 16 == 0);
    let bytes = if wide { 16 } else { size };
    let units = |n: usize| n * size / bytes;
    let kernel = cuda.kernel(&SOURCE, "kv_store", &[("BYTES", Value::Int(bytes as i64))]);
    let held = a.cache.len() / (a.latent + a.rope);
    let args = args![
        a.c_kv.ptr(),
        a.k_pe.ptr(),
        a.slots.ptr(),
        a.cache.ptr(),
        held as i64,
        units(a.latent) as i32,
        units(a.rope) as i32,
        units(a.k_pe_stride) as i64,
    ];
    cuda.launch(&kernel, Grid::new([a.slots.len() as u32, 1, 1], 128), &args);
}
