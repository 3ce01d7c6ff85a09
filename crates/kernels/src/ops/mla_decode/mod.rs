//! Paged, absorbed attention of MLA over the latent cache (multi-query form: every head shares one key of C + R and
//! one value of C). Queries come with kv_b_proj's key part already absorbed; the caller applies its value part to the
//! output. Several query tokens per sequence are allowed (prefill in chunks, speculation), causal and aligned at the
//! end. Keys are walked in tiles of one block in order, so a token's bits depend on its own sequence alone.
//! q, cache and out have one dtype. A query that sees no key gets zeros and a log-sum-exp of -inf.

mod cpu;
mod cuda;
mod product;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, ops::by_dtype};

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
    /// Softmax scale of the un-absorbed head (YaRN's m^2 included), above 0: maxima are taken before it is applied.
    pub scale: f32,
    /// `[Nq, H, C + R]`: absorbed latent query, then the rotated rope query.
    pub q: View<'a>,
    /// One layer's cache `[blocks][BLOCK][C + R]`: normalised c_kv, then rotated k_pe.
    pub cache: View<'a>,
    /// i32 `[S, max_blocks]`: the blocks of each sequence in order; entries beyond its length are not read.
    pub block_table: View<'a>,
    /// i32 `[S + 1]`: queries of each sequence.
    pub cu_q: View<'a>,
    /// i32 `[S]`: keys of each sequence, its new tokens included (they are stored before this call).
    pub lengths: View<'a>,
    /// `[Nq, H, C]`, q's dtype.
    pub out: ViewMut<'a>,
    /// f32 `[Nq, H]`.
    pub lse: ViewMut<'a>,
}

/// out = softmax(q . cache^T * scale) `cache[.., ..C]`.
pub fn forward(ctx: &Ctx, a: Decode<'_>) {
    let _timer = ctx.timer(
        "mla_decode",
        sizes![a.heads, a.latent, a.rope, a.q, a.cache, a.block_table, a.cu_q, a.lengths, a.out, a.lse],
    );
    check(&a);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, a),
        Device::Cpu(cpu) => by_dtype!(a.q.dtype(), T => cpu::forward::<T>(cpu, a)),
    }
}

fn check(a: &Decode<'_>) {
    let (h, c, width) = (a.heads, a.latent, a.latent + a.rope);
    let (seqs, table) = (a.lengths.len(), a.block_table.len());
    assert!(h > 0 && c > 0, "attention of {h} heads over latents of {c}");
    assert!(a.scale > 0.0, "attention with a scale of {}", a.scale);
    assert_eq!(a.cu_q.len(), seqs + 1, "cumulative query lengths of {seqs} sequences");
    let nq = if a.cu_q.is_host() {
        let cu_q = a.cu_q.i32();
        assert!(cu_q[0] == 0 && cu_q.is_sorted(), "cumulative lengths start at 0 and do not fall: {cu_q:?}");
        cu_q[seqs] as usize
    } else {
        a.q.len() / (h * width)
    };
    assert_eq!(a.q.len(), nq * h * width, "q of {nq} queries x {h} heads x {width}");
    assert_eq!(a.out.len(), nq * h * c, "out of {nq} queries x {h} heads x {c}");
    assert_eq!(a.lse.len(), nq * h, "lse of {nq} queries x {h} heads");
    assert!(a.cache.len().is_multiple_of(BLOCK * width), "a cache of {} elements, rows of {width}", a.cache.len());
    if seqs == 0 {
        assert_eq!(nq, 0, "queries without a sequence");
        return;
    }
    assert!(table.is_multiple_of(seqs), "a block table of {table} for {seqs} sequences");
    if a.lengths.is_host() {
        check_blocks(a.lengths.i32(), a.block_table.i32(), a.cache.len() / (BLOCK * width));
    }
}

/// Asserts that every sequence's blocks are in a cache of `blocks`.
fn check_blocks(lengths: &[i32], table: &[i32], blocks: usize) {
    let max_blocks = table.len() / lengths.len();
    for (s, &keys) in lengths.iter().enumerate() {
        let held = usize::try_from(keys).unwrap_or_else(|_| panic!("sequence {s} has {keys} keys")).div_ceil(BLOCK);
        assert!(held <= max_blocks, "sequence {s}: {keys} keys, a table of {max_blocks} blocks");
        for &b in &table[s * max_blocks..s * max_blocks + held] {
            assert!(usize::try_from(b).is_ok_and(|b| b < blocks), "sequence {s}: block {b} of {blocks}");
        }
    }
}
