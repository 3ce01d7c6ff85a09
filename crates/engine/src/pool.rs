//! Who holds which block of the cache: counts, no memory. A block is held through a [`Block`], which cannot be copied
//! and is given back by value, so that no block is freed twice; running out is an ordinary answer.

use hadal_kernels::ops::mla_decode::BLOCK;

/// One hold on a block. Dropping it would lose the block, so it is given back to its pool.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is not freed is lost to its pool"]
pub struct Block(u32);

impl Block {
    /// Its number: the first slot is `index * BLOCK`.
    pub fn index(&self) -> usize {
        self.0 as usize
    }

    /// Cache slot of the token at `offset` within the block.
    pub fn slot(&self, offset: usize) -> usize {
        debug_assert!(offset < BLOCK, "offset {offset} within a block of {BLOCK}");
        self.index() * BLOCK + offset
    }
}

/// Blocks needed for `tokens` tokens.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK)
}

/// A fixed number of blocks with a count of holds on each.
#[derive(Debug)]
pub struct BlockPool {
    holds: Vec<u32>,
    /// Numbers of blocks that nobody holds; the last goes out first.
    free: Vec<u32>,
}

impl BlockPool {
    /// `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        let n = u32::try_from(blocks).unwrap_or_else(|_| panic!("a pool of {blocks} blocks, at most {}", u32::MAX));
        Self { holds: vec![0; blocks], free: (0..n).rev().collect() }
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.holds.len()
    }

    /// Blocks that nobody holds.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks with at least one hold.
    pub fn used_blocks(&self) -> usize {
        self.total() - self.free_blocks()
    }

    /// `n` blocks that nobody held, or None (and nothing changes) if fewer are free.
    pub fn allocate(&mut self, n: usize) -> Option<Vec<Block>> {
        let left = self.free.len().checked_sub(n)?;
        let taken: Vec<u32> = self.free.drain(left..).rev().collect();
        taken.iter().for_each(|&b| self.holds[b as usize] = 1);
        Some(taken.into_iter().map(Block).collect())
    }

    /// A second hold on a held block: two sequences with the same beginning share it.
    pub fn retain(&mut self, block: &Block) -> Block {
        let holds = &mut self.holds[block.index()];
        assert!(*holds > 0, "block {} is of another pool: nobody holds it in this one", block.0);
        *holds += 1;
        Block(block.0)
    }

    /// Gives up holds; a block whose last hold goes is free again.
    pub fn free(&mut self, blocks: impl IntoIterator<Item = Block>) {
        for Block(b) in blocks {
            let holds = &mut self.holds[b as usize];
            assert!(*holds > 0, "block {b} is of another pool: nobody holds it in this one");
            *holds -= 1;
            if *holds == 0 {
                self.free.push(b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// free + used = total, and the pool's counts are the holds that are out.
    fn check(pool: &BlockPool, owners: &[Vec<Block>], shared: &[Block]) {
        let mut out = BTreeMap::<usize, u32>::new();
        let mut fresh = std::collections::BTreeSet::new();
        for b in owners.iter().flatten() {
            assert!(fresh.insert(b.index()), "block {} in two hands", b.index());
        }
        for b in owners.iter().flatten().chain(shared) {
            *out.entry(b.index()).or_default() += 1;
        }
        assert_eq!(pool.used_blocks(), out.len());
        assert_eq!(pool.free_blocks() + pool.used_blocks(), pool.total());
        for (b, &holds) in pool.holds.iter().enumerate() {
            assert_eq!(holds, out.get(&b).copied().unwrap_or(0), "block {b}");
        }
    }

    proptest! {
        #![proptest_config(crate::tests::cases(200))]
        #[test]
        fn random_operations_keep_the_invariants(
            total in 0usize..20,
            ops in prop::collection::vec((0u8..4, 0usize..64, 0usize..7), 0..120),
        ) {
            let mut pool = BlockPool::new(total);
            let (mut owners, mut shared) = (Vec::<Vec<Block>>::new(), Vec::<Block>::new());
            for (op, pick, n) in ops {
                let free = pool.free_blocks();
                match op {
                    0 => match pool.allocate(n) {
                        Some(b) => {
                            prop_assert_eq!(b.len(), n);
                            prop_assert_eq!(pool.free_blocks(), free - n);
                            // A block that only a sharer held was not free.
                            prop_assert!(b.iter().all(|b| shared.iter().all(|s| s.index() != b.index())));
                            owners.push(b);
                        }
                        None => {
                            prop_assert!(n > free);
                            prop_assert_eq!(pool.free_blocks(), free);
                        }
                    },
                    1 if !owners.is_empty() => {
                        let i = pick % owners.len();
                        pool.free(owners.swap_remove(i));
                    }
                    2 if !owners.is_empty() => {
                        let i = pick % owners.len();
                        if let Some(b) = owners[i].first() {
                            shared.push(pool.retain(b));
                        }
                    }
                    3 if !shared.is_empty() => {
                        let i = pick % shared.len();
                        pool.free([shared.swap_remove(i)]);
                    }
                    _ => {}
                }
                check(&pool, &owners, &shared);
            }
            pool.free(owners.into_iter().flatten());
            pool.free(shared);
            prop_assert_eq!(pool.free_blocks(), total);
        }
    }

    #[test]
    #[should_panic(expected = "block 0 is of another pool")]
    fn a_foreign_block_is_refused() {
        let mut a = BlockPool::new(1);
        let b = a.allocate(1).unwrap();
        BlockPool::new(1).free(b);
    }

    #[test]
    fn blocks_hold_sixty_four_tokens() {
        assert_eq!([0, 1, 64, 65, 128].map(blocks_for), [0, 1, 1, 2, 2]);
        assert_eq!(BlockPool::new(3).allocate(3).unwrap()[2].slot(5), 2 * 64 + 5);
    }
}
