//! Paged, absorbed attention of MLA over the latent cache (multi-query form: every head shares one key of C + R and
//! one value of C). Queries come with kv_b_proj's key part already absorbed; the caller applies its value part to the
//! output. Several query tokens per sequence are allowed (prefill in chunks, speculation), causal and aligned at the
//! end. Keys are walked in tiles of one block in order, so a token's bits depend on its own sequence alone.

use crate::{Ctx, View, ViewMut};

/// Tokens per cache block.
pub const BLOCK: usize = 64;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Decode<'a> {
    /// H.
    pub heads: usize,
    /// C, kv_lora_rank.
    pub latent: usize,
    /// R, qk_rope_head_dim.
    pub rope: usize,
    /// Softmax scale of the un-absorbed head (YaRN's m^2 included).
    pub scale: f32,
    /// [Nq, H, C + R]: absorbed latent query, then the rotated rope query.
    pub q: View<'a>,
    /// One layer's cache [blocks][BLOCK][C + R]: normalised c_kv, then rotated k_pe.
    pub cache: View<'a>,
    /// i32 [S, max_blocks]: the blocks of each sequence in order; entries beyond its length are not read.
    pub block_table: View<'a>,
    /// i32 [S + 1]: queries of each sequence.
    pub cu_q: View<'a>,
    /// i32 [S]: keys of each sequence, its new tokens included (they are stored before this call).
    pub lengths: View<'a>,
    /// [Nq, H, C], q's dtype.
    pub out: ViewMut<'a>,
    /// f32 [Nq, H].
    pub lse: ViewMut<'a>,
}

/// out = softmax(q . cache^T * scale) cache[.., ..C].
pub fn forward(ctx: &Ctx, a: Decode<'_>) {
    todo!()
}
