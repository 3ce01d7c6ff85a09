//! Packs the new tokens of several sequences into one forward pass over the cache.

use crate::pool::Block;
use hadal_kernels::Ctx;
use hadal_kernels::ops::mla_decode::BLOCK;
use hadal_model::decode::Step;
use std::sync::Arc;

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    /// The new tokens.
    pub tokens: &'a [u32],
    /// Position of the first: how many are in the cache.
    pub first: usize,
    /// Blocks for the cached and the new tokens, in order.
    pub blocks: &'a [Block],
}

/// One sequence after the other. Ids, positions and slots fit i32: submission checked the first two, the pool's size
/// bounds the last.
pub(crate) fn pack(ctx: &Ctx, spans: &[Span<'_>]) -> Step {
    let (mut tokens, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cu, mut lengths, mut block_table) = (vec![0i32], Vec::new(), Vec::new());
    let widest = spans.iter().map(|s| s.blocks.len()).max().unwrap_or(0);
    for s in spans {
        for (i, &token) in s.tokens.iter().enumerate() {
            let position = s.first + i;
            tokens.push(token as i32);
            positions.push(position as i32);
            slots.push(s.blocks[position / BLOCK].slot(position % BLOCK) as i32);
        }
        cu.push(tokens.len() as i32);
        lengths.push((s.first + s.tokens.len()) as i32);
        block_table.extend(s.blocks.iter().map(|b| b.index() as i32));
        // Never read: a sequence has as many blocks as its length needs.
        block_table.resize(lengths.len() * widest, -1);
    }
    let upload = |v: &[i32]| Arc::new(ctx.from_i32(v));
    Step {
        tokens: upload(&tokens),
        positions: upload(&positions),
        slots: upload(&slots),
        cu: upload(&cu),
        lengths: upload(&lengths),
        block_table: upload(&block_table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::BlockPool;
    use hadal_kernels::{Buf, Device};

    #[test]
    fn slots_follow_the_block_table() {
        let ctx = Device::cpu(Some(1)).unwrap().ctx();
        let mut pool = BlockPool::new(3);
        let (a, b) = (pool.allocate(1).unwrap(), pool.allocate(2).unwrap());
        let spans = [Span { tokens: &[7], first: 4, blocks: &a }, Span { tokens: &[8, 9, 10], first: 62, blocks: &b }];
        let s = pack(&ctx, &spans);
        let ints = |b: &Buf| b.view().i32().to_vec();
        assert_eq!(ints(&s.tokens), [7, 8, 9, 10]);
        assert_eq!(ints(&s.positions), [4, 62, 63, 64]);
        assert_eq!(ints(&s.slots), [4, 64 + 62, 64 + 63, 128]);
        assert_eq!(ints(&s.cu), [0, 1, 4]);
        assert_eq!(ints(&s.lengths), [5, 65]);
        assert_eq!(ints(&s.block_table), [0, -1, 1, 2]);
    }
}
