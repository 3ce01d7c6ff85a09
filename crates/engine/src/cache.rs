//! The latent cache: per layer `[blocks][64 tokens][C + R]` of the activation dtype, normalised c_kv then rotated k_pe
//! (V2 report 2.1.2). Which block is whose is the pool's knowledge.

use hadal_kernels::ops::mla_decode::BLOCK;
use hadal_kernels::{Buf, Ctx, DType};
use hadal_model::ModelConfig;

/// Memory of all layers.
#[derive(Debug)]
pub(crate) struct LatentCache {
    /// One per layer.
    pub layers: Vec<Buf>,
}

impl LatentCache {
    /// `blocks` blocks in each of `layers` layers.
    pub fn new(ctx: &Ctx, config: &ModelConfig, layers: usize, dtype: DType, blocks: usize) -> Self {
        let len = blocks * BLOCK * config.cache_width();
        Self { layers: (0..layers).map(|_| ctx.zeros(dtype, len)).collect() }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Buf::bytes).sum()
    }
}

/// Bytes that one block occupies over `layers` layers: how many fit a budget is its quotient.
pub fn block_bytes(config: &ModelConfig, layers: usize, dtype: DType) -> usize {
    layers * BLOCK * config.cache_width() * dtype.size()
}
