//! Which sequences advance in a step, and by how many tokens: a pure function of counts.
//!
//! All sequences stand in order of arrival, and those that hold cache are always the first `running` of them. Each step
//! walks them from the oldest: one token for a sequence that decodes, a chunk for one whose tokens are not all cached
//! yet. Where blocks are short the youngest running sequence is put back: it loses its cache, keeps its place and its
//! tokens, and is computed again later. The oldest fits the whole cache alone (a request that does not is refused), so
//! every step that has a sequence advances one.

use crate::pool::blocks_for;

/// What the scheduler knows of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Tokens it has: prompt and generated. At least one is not cached.
    pub known: usize,
    /// Tokens whose latents are in the cache.
    pub cached: usize,
    /// Blocks it holds.
    pub held: usize,
    /// Most tokens it will ever have in the cache.
    pub limit: usize,
}

impl State {
    /// Blocks it may still ask for soon: what its tokens need, and one to grow into.
    fn soon(&self) -> usize {
        let wanted = (blocks_for(self.known) + 1).min(blocks_for(self.limit));
        wanted.saturating_sub(self.held)
    }
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Place in the order of arrival.
    pub sequence: usize,
    /// New tokens to compute, at least one.
    pub tokens: usize,
    /// Blocks to allocate before.
    pub blocks: usize,
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sequences that hold cache after the step: the first `running`. Those beyond that held cache lose it.
    pub running: usize,
    /// What is computed, in order of arrival.
    pub work: Vec<Work>,
}

/// Plans a step for `sequences` in order of arrival, the first `running` of which hold cache, with `free` blocks and at
/// most `prefill` tokens of sequences that are behind by more than one.
pub fn plan(sequences: &[State], running: usize, free: usize, prefill: usize) -> Plan {
    let mut step = Step { sequences, free, prefill, plan: Plan { running, work: Vec::new() } };
    let mut i = 0;
    while i < step.plan.running {
        step.advance(i);
        i += 1;
    }
    if step.plan.running == running {
        step.admit();
    }
    step.plan
}

struct Step<'a> {
    sequences: &'a [State],
    free: usize,
    /// Prefill tokens left.
    prefill: usize,
    plan: Plan,
}

impl Step<'_> {
    /// Gives running sequence `i` its tokens, putting younger ones back, and itself if it is the youngest.
    fn advance(&mut self, i: usize) {
        let s = self.sequences[i];
        let behind = s.known - s.cached;
        let tokens = if behind == 1 { 1 } else { behind.min(self.prefill) };
        if tokens == 0 {
            return;
        }
        let blocks = blocks_for(s.cached + tokens) - s.held;
        while self.free < blocks {
            self.plan.running -= 1;
            self.free += self.sequences[self.plan.running].held;
            if self.plan.running == i {
                return;
            }
        }
        self.free -= blocks;
        if behind > 1 {
            self.prefill -= tokens;
        }
        self.plan.work.push(Work { sequence: i, tokens, blocks });
    }

    /// Takes up waiting sequences in order, as long as there is room for all that the running ones may soon ask for.
    fn admit(&mut self) {
        let taken: usize = self.plan.work.iter().map(|w| w.blocks).sum();
        let mut soon: usize = self.sequences[..self.plan.running].iter().map(State::soon).sum();
        soon = soon.saturating_sub(taken);
        while self.prefill > 0 && self.plan.running < self.sequences.len() {
            let i = self.plan.running;
            let more = self.sequences[i].soon();
            if self.free < soon + more {
                return;
            }
            self.plan.running += 1;
            let free = self.free;
            self.advance(i);
            soon += more - (free - self.free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiting(known: usize, limit: usize) -> State {
        State { known, cached: 0, held: 0, limit }
    }

    #[test]
    fn prefill_is_chunked_in_order_of_arrival() {
        let s = [waiting(200, 300), waiting(100, 120), waiting(5, 9)];
        let p = plan(&s, 0, 100, 256);
        let work = |sequence, tokens, blocks| Work { sequence, tokens, blocks };
        assert_eq!(p, Plan { running: 2, work: vec![work(0, 200, 4), work(1, 56, 1)] });
    }

    #[test]
    fn a_short_request_does_not_pass_a_long_one() {
        // The first needs 4 blocks; 3 are free: the second, which would fit, waits behind it.
        let p = plan(&[waiting(200, 250), waiting(5, 9)], 0, 3, 256);
        assert_eq!(p, Plan { running: 0, work: vec![] });
    }

    #[test]
    fn the_youngest_is_put_back() {
        let full = State { known: 65, cached: 64, held: 1, limit: 100 };
        let p = plan(&[full, full, full], 3, 0, 256);
        // The oldest takes the youngest's block; then the second is the youngest and finds none.
        assert_eq!(p, Plan { running: 1, work: vec![Work { sequence: 0, tokens: 1, blocks: 1 }] });
    }

    #[test]
    fn room_to_grow_is_kept() {
        // One block would hold the prompt of the second, but the first is about to need it.
        let first = State { known: 64, cached: 63, held: 1, limit: 100 };
        assert_eq!(plan(&[first, waiting(5, 9)], 1, 1, 256).running, 1);
        assert_eq!(plan(&[first, waiting(5, 9)], 1, 2, 256).running, 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]
        /// Plays requests (prompt, new tokens) to the end: nothing is lost, no block is promised twice, every step
        /// advances the oldest, a step's prefill stays within its limit.
        #[test]
        fn every_sequence_ends(
            requests in prop::collection::vec((1usize..300, 1usize..150), 1..12),
            extra in 0usize..8,
            prefill in 1usize..300,
        ) {
            let limit = |&(p, n): &(usize, usize)| p + n - 1;
            let total = requests.iter().map(|r| blocks_for(limit(r))).max().unwrap() + extra;
            let mut queue: Vec<State> = requests.iter().map(|r| waiting(r.0, limit(r))).collect();
            let (mut running, mut steps) = (0, 0);
            while !queue.is_empty() {
                let held: usize = queue.iter().map(|s| s.held).sum();
                prop_assert!(queue[running..].iter().all(|s| s.held == 0 && s.cached == 0));
                let p = plan(&queue, running, total - held, prefill);
                let first = *p.work.first().expect("a step does something");
                prop_assert_eq!(first.sequence, 0);
                prop_assert!(p.work.windows(2).all(|w| w[0].sequence < w[1].sequence));
                prop_assert!(p.work.iter().all(|w| w.sequence < p.running));
                let behind = |w: &&Work| queue[w.sequence].known - queue[w.sequence].cached > 1;
                prop_assert!(p.work.iter().filter(behind).map(|w| w.tokens).sum::<usize>() <= prefill);
                for s in &mut queue[p.running..] {
                    (s.held, s.cached) = (0, 0);
                }
                for w in &p.work {
                    let s = &mut queue[w.sequence];
                    s.held += w.blocks;
                    s.cached += w.tokens;
                    prop_assert!(s.cached <= s.known && s.held == blocks_for(s.cached));
                    s.known += usize::from(s.cached == s.known);
                }
                running = p.running;
                prop_assert!(queue.iter().map(|s| s.held).sum::<usize>() <= total);
                // A sequence whose every token but the last is cached has said all.
                running -= queue[..running].iter().filter(|s| s.known > s.limit).count();
                queue.retain(|s| s.known <= s.limit);
                steps += 1;
                prop_assert!(steps < 100_000);
            }
        }
    }
}
