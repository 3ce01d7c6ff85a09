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

    /// Other sequences of the same sizes into the same buffers; false, and nothing can be said of what they hold, if
    /// sizes differ or somebody still holds a buffer.
    #[must_use = "buffers that do not fit hold neither batch"]
    pub fn refill(&mut self, sequences: &[Sequence]) -> bool {
        self.depths.iter_mut().enumerate().all(|(k, d)| d.refill(Rows::new(sequences, k)))
    }

    /// Tokens of the main model.
    pub fn n(&self) -> usize {
        self.depths[0].n
    }
}

/// A depth's numbers, on the host.
struct Rows {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    cu: Vec<i32>,
    targets: Vec<i32>,
    from: Vec<i32>,
    sequences: usize,
}

impl Rows {
    fn new(sequences: &[Sequence], k: usize) -> Self {
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
            tokens,
            positions,
            cu,
            targets,
            from,
            sequences: sequences.iter().filter(|s| s.tokens.len() > k).count(),
        }
    }

    fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&t| t >= 0).count()
    }
}

impl Depth {
    fn new(ctx: &Ctx, sequences: &[Sequence], k: usize) -> Self {
        let rows = Rows::new(sequences, k);
        let upload = |x: &[i32]| Arc::new(ctx.from_i32(x));
        Self {
            n: rows.tokens.len(),
            predicted: rows.predicted(),
            sequences: rows.sequences,
            tokens: upload(&rows.tokens),
            positions: upload(&rows.positions),
            cu: upload(&rows.cu),
            targets: upload(&rows.targets),
            from: upload(&rows.from),
            host_targets: rows.targets,
        }
    }

    /// See [`Batch::refill`].
    fn refill(&mut self, rows: Rows) -> bool {
        let buffers = [
            (&mut self.tokens, &rows.tokens),
            (&mut self.positions, &rows.positions),
            (&mut self.cu, &rows.cu),
            (&mut self.targets, &rows.targets),
            (&mut self.from, &rows.from),
        ];
        let write = |(to, from): (&mut Shared, &Vec<i32>)| {
            let fitting = Arc::get_mut(to).filter(|to| to.len() == from.len());
            fitting.map(|to| to.view_mut().write_i32(from)).is_some()
        };
        self.predicted = rows.predicted();
        self.sequences = rows.sequences;
        let fits = buffers.into_iter().all(write);
        self.host_targets = rows.targets;
        fits
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

    #[test]
    fn a_batch_takes_in_another_of_its_sizes() {
        let ctx = Device::cpu(Some(1)).unwrap().ctx();
        let seq = |t: &[i32]| Sequence { tokens: t.to_vec(), targets: t[1..].iter().copied().chain([-1]).collect() };
        let (one, other) = ([seq(&[1, 2, 3]), seq(&[4, 5])], [seq(&[9, 8]), seq(&[7, 6, 5])]);
        let mut b = Batch::new(&ctx, &one, 1);
        assert!(b.refill(&other));
        let fresh = Batch::new(&ctx, &other, 1);
        for (a, b) in b.depths.iter().zip(&fresh.depths) {
            let all =
                |d: &Depth| [&d.tokens, &d.positions, &d.cu, &d.targets, &d.from].map(|x| x.view().i32().to_vec());
            assert_eq!(all(a), all(b));
            assert_eq!(
                (a.n, a.predicted, a.sequences, &a.host_targets),
                (b.n, b.predicted, b.sequences, &b.host_targets)
            );
        }
        assert!(!b.refill(&[seq(&[1, 2])]), "other sizes");
        let held = b.depths[0].tokens.clone();
        assert!(!b.refill(&other), "a buffer that somebody holds");
        drop(held);
        assert!(b.refill(&one));
    }
}
