//! Writes new tokens into the latent cache: normalised c_kv, then rotated k_pe, one slot per token.

use crate::{Ctx, View, ViewMut};

/// Arguments of [`store`].
#[derive(Debug)]
pub struct Store<'a> {
    /// [N, C], dense.
    pub c_kv: View<'a>,
    /// [N, R] with rows `k_pe_stride` apart.
    pub k_pe: View<'a>,
    /// Elements from one row of k_pe to the next.
    pub k_pe_stride: usize,
    /// C.
    pub latent: usize,
    /// R.
    pub rope: usize,
    /// i32 [N]: slot = block * 64 + offset in the block; -1 stores nothing. No slot occurs twice.
    pub slots: View<'a>,
    /// One layer's cache [blocks][64][C + R].
    pub cache: ViewMut<'a>,
}

/// cache[slot] = [c_kv | k_pe]. A slot beyond the cache is a contract breach.
pub fn store(ctx: &Ctx, a: Store<'_>) {
    todo!()
}
