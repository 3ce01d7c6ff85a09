//! One side of a source, as one run of tokens over its shards.

use std::path::Path;

use rayon::prelude::*;

use super::file::Shard;
use super::{Identity, SideEntry};
use crate::DataError;

/// Training or held-out tokens of a source: all documents in order, each followed by the end token.
pub struct Side {
    shards: Vec<Shard>,
    /// Where each shard begins, in tokens.
    starts: Vec<u64>,
    tokens: u64,
    bytes: u64,
}

impl Side {
    pub(super) fn open(dir: &Path, entry: &SideEntry, identity: Identity, vocab: usize) -> Result<Self, DataError> {
        let (mut shards, mut starts, mut tokens) = (Vec::new(), Vec::new(), 0);
        for shard in &entry.shards {
            shards.push(Shard::open(&dir.join(&shard.file), shard, identity, vocab)?);
            starts.push(tokens);
            tokens += shard.tokens;
        }
        if tokens != entry.tokens {
            let reason = format!("expected {} tokens in all shards of a side, found {tokens}", entry.tokens);
            return Err(DataError::Shard { path: dir.join(super::MANIFEST), reason });
        }
        Ok(Self { shards, starts, tokens, bytes: entry.bytes })
    }

    /// Tokens there are.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Bytes of text the tokens stand for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The `count` tokens from `start` on, which must be there. Blocks that nobody has read before are checked.
    pub fn read(&self, start: u64, count: usize) -> Result<Vec<u32>, DataError> {
        assert!(start + count as u64 <= self.tokens, "tokens {start} + {count} of {}", self.tokens);
        let mut to = Vec::with_capacity(count);
        let mut i = self.starts.partition_point(|&s| s <= start).saturating_sub(1);
        while to.len() < count {
            let shard = &self.shards[i];
            let from = (start + to.len() as u64 - self.starts[i]) as usize;
            shard.read(from, shard.tokens().min(from + count - to.len()), &mut to)?;
            i += 1;
        }
        Ok(to)
    }

    /// Checks every block, in parallel on the current rayon pool.
    pub fn check(&self) -> Result<(), DataError> {
        let blocks: Vec<(&Shard, usize)> =
            self.shards.iter().flat_map(|s| (0..s.blocks()).map(move |i| (s, i))).collect();
        // Collected, so that of several errors the first one is told whatever the threads do.
        let found: Vec<Result<(), DataError>> = blocks.par_iter().map(|(shard, i)| shard.check(*i)).collect();
        found.into_iter().collect()
    }
}
