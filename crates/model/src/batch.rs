//! A packed batch: sequences one after the other with their positions, and what each MTP depth sees of them.

use crate::weight_grad::Shared;
use hadal_kernels::Ctx;
use std::sync::Arc;

/// One sequence of a batch, on the host.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// What each position predicts; -1 for nothing. May be empty for inference.
    pub targets: Vec<i32>,
}

/// The tokens of one depth: the main model's (depth 0), or what MTP layer k predicts from.
#[derive(Debug)]
pub struct Depth {
    /// Tokens in it.
    pub n: usize,
    /// i32 `[n]`: the token embedded at each row (at depth k, k positions ahead of the hidden state).
    pub tokens: Shared,
    /// i32 `[n]`: position of the embedded token.
    pub positions: Shared,
    /// i32 `[S + 1]`.
    pub cu: Shared,
    /// i32 `[n]`, -1 for none.
    pub targets: Shared,
    /// i32 `[n]`: the row of the previous depth that each row continues; empty at depth 0.
    pub from: Shared,
    /// The targets on the host.
    pub host_targets: Vec<i32>,
    /// Targets that are not -1.
    pub predicted: usize,
    /// Sequences that have at least one token at this depth.
    pub sequences: usize,
}

/// Sequences packed for one forward pass.
#[derive(Debug)]
pub struct Batch {
    /// Depth 0, then one per MTP layer.
    pub depths: Vec<Depth>,
}

impl Batch {
    /// Packs sequences, positions from 0, with what `mtp` MTP layers need. Sequence tokens must lie in the vocabulary
    /// and lengths within the model's positions: callers check (they know whose input it is).
    pub fn new(ctx: &Ctx, sequences: &[Sequence], mtp: usize) -> Self {
        Self { depths: (0..=mtp).map(|k| Depth::new(ctx, sequences, k)).collect() }
    }

    /// Tokens of the main model.
    pub fn n(&self) -> usize {
        self.depths[0].n
    }
}

impl Depth {
    fn new(ctx: &Ctx, sequences: &[Sequence], k: usize) -> Self {
        let (mut tokens, mut positions, mut targets, mut from) = (vec![], vec![], vec![], vec![]);
        let mut cu = vec![0i32];
        let mut previous = 0;
        for s in sequences {
            // Depth k uses positions 0 .. len - k: hidden state i, embedding i + k, target of i + k.
            for i in k..s.tokens.len() {
                tokens.push(s.tokens[i]);
                positions.push(i as i32);
                targets.push(s.targets.get(i).copied().unwrap_or(-1));
                if k > 0 {
                    from.push((previous + i - k) as i32);
                }
            }
            previous += (s.tokens.len() + 1).saturating_sub(k.max(1));
            cu.push(tokens.len() as i32);
        }
        Self {
            n: tokens.len(),
            predicted: targets.iter().filter(|&&t| t >= 0).count(),
            sequences: sequences.iter().filter(|s| s.tokens.len() > k).count(),
            tokens: Arc::new(ctx.from_i32(&tokens)),
            positions: Arc::new(ctx.from_i32(&positions)),
            cu: Arc::new(ctx.from_i32(&cu)),
            targets: Arc::new(ctx.from_i32(&targets)),
            host_targets: targets,
            from: Arc::new(ctx.from_i32(&from)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hadal_kernels::{Buf, Device};

    #[test]
    fn depths_shift_within_each_sequence() {
        let ctx = Device::cpu(Some(1)).unwrap().ctx();
        let seq = |t: &[i32]| Sequence { tokens: t.to_vec(), targets: t[1..].iter().copied().chain([-1]).collect() };
        let b = Batch::new(&ctx, &[seq(&[1, 2, 3]), seq(&[4]), seq(&[5, 6])], 2);
        let ints = |b: &Buf| b.view().i32().to_vec();
        assert_eq!(ints(&b.depths[0].cu), [0, 3, 4, 6]);
        assert_eq!(ints(&b.depths[1].tokens), [2, 3, 6]);
        assert_eq!(ints(&b.depths[1].positions), [1, 2, 1]);
        assert_eq!(ints(&b.depths[1].targets), [3, -1, -1]);
        // Rows 0 and 1 of sequence 0, row 4 (the first of sequence 2).
        assert_eq!(ints(&b.depths[1].from), [0, 1, 4]);
        assert_eq!(ints(&b.depths[1].cu), [0, 2, 2, 3]);
        // Depth 1 has rows 0, 1 | - | 2: depth 2 continues row 0.
        assert_eq!(ints(&b.depths[2].tokens), [3]);
        assert_eq!(ints(&b.depths[2].from), [0]);
        assert_eq!((b.depths[1].sequences, b.depths[2].sequences), (2, 1));
        assert_eq!((b.depths[0].predicted, b.depths[1].predicted), (3, 1));
    }
}
