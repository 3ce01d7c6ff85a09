//! From documents to the sequences of a training run: the split into training and validation, and the loader that maps
//! a global sample number to tokens.
//!
//! Documents are joined end to end, each followed by the end token, and cut into windows without a mask between
//! documents, as in pretraining of DeepSeek-V3 (paper, section 4.1).

mod loader;
mod permute;
mod split;
#[cfg(test)]
mod tests;

use loader::largest_remainder;
pub use loader::{BLOCK_SAMPLES, Loader, Part, Shares};
pub use split::Sides;

use crate::DataError;
use crate::shards::Side;

/// Documents as one run of tokens, each followed by the end token, in memory: what a run validates on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStream {
    /// The tokens.
    pub tokens: Vec<u32>,
}

impl TokenStream {
    /// The beginning of each side, in their order: about `most` tokens of all together, each by its size.
    pub fn beginnings(sides: &[&Side], most: u64) -> Result<Self, DataError> {
        let sizes: Vec<u64> = sides.iter().map(|s| s.tokens()).collect();
        let total: u64 = sizes.iter().sum();
        let shares = match total <= most {
            true => sizes,
            false => {
                let weights: Vec<f64> = sizes.iter().map(|&n| n as f64).collect();
                // Rounding up can ask for one token more than a side has; a side is never left out.
                largest_remainder(&weights, most).iter().zip(&sizes).map(|(&n, &size)| n.clamp(1, size)).collect()
            }
        };
        let mut tokens = Vec::with_capacity(shares.iter().sum::<u64>() as usize);
        for (side, share) in sides.iter().zip(shares) {
            tokens.extend(side.read(0, share as usize)?);
        }
        Ok(Self { tokens })
    }

    /// Windows of `seq_len` inputs plus the last target, in order, the last one as short as it must be: together they
    /// predict every token but the first exactly once. For bits per byte, weigh by the byte lengths of the targets.
    pub fn validation_windows(&self, seq_len: usize) -> impl Iterator<Item = &[u32]> {
        assert!(seq_len > 0, "sequence length 0");
        let last = self.tokens.len().saturating_sub(1);
        (0..last).step_by(seq_len).map(move |start| &self.tokens[start..=(start + seq_len).min(last)])
    }
}
