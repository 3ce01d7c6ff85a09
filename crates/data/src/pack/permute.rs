//! Random orders without a table: a place is computed, whatever the number of places.

use hadal_numerics::{Purpose, Rng};

/// Rounds of the network. Four give a pseudorandom permutation where the round function is one (Luby and Rackoff, 1988);
/// more make small domains mix as well.
const ROUNDS: u64 = 8;

/// A permutation of `0..n` that depends on a seed and a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Permutation {
    rng: Rng,
    n: u64,
    half: u32,
}

impl Permutation {
    pub fn new(n: u64, seed: u64, stream: u64) -> Self {
        let bits = n.saturating_sub(1).checked_ilog2().map_or(0, |b| b + 1);
        Self { rng: Rng::new(seed, Purpose::Shuffle, stream), n, half: bits.div_ceil(2) }
    }

    /// What stands at place `i`, which is below `n`: a Feistel network permutes the next power of four, and what falls
    /// outside of `0..n` is sent through again until it does not. That is a permutation too, since each cycle of the
    /// larger one just leaves out the strangers; it takes less than four turns on average.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "place {i} of {}", self.n);
        let mut x = self.turn(i);
        while x >= self.n {
            x = self.turn(x);
        }
        x
    }

    fn turn(&self, x: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (x >> self.half, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (self.rng.bits(round << 32 | right) & mask));
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_permuted() {
        for n in (1..200).chain([255, 256, 257, 1023, 1024, 1025, 4097]) {
            let p = Permutation::new(n, 5, n);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                assert!(!std::mem::replace(&mut seen[p.at(i) as usize], true), "{n} {i}");
            }
        }
    }

    #[test]
    fn large_sizes_are_one_to_one_where_looked_at() {
        let n = (1 << 40) + 12_345;
        let p = Permutation::new(n, 1, 2);
        let mut seen: Vec<u64> = (0..10_000).map(|i| p.at(n - 1 - i * 7919)).collect();
        assert!(seen.iter().all(|&x| x < n));
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_000);
    }

    /// Place and neighbour are independent, streams and seeds differ: each of the 24 orders of 4 comes about as often.
    #[test]
    fn orders_are_spread() {
        let mut orders = std::collections::HashMap::new();
        for stream in 0..4800 {
            let p = Permutation::new(4, 9, stream);
            *orders.entry([0, 1, 2, 3].map(|i| p.at(i))).or_insert(0) += 1;
        }
        assert_eq!(orders.len(), 24);
        assert!(orders.values().all(|n| (140..260).contains(n)), "{orders:?}");
        let n = 1000u64;
        let p = Permutation::new(n, 9, 0);
        let correlation: f64 = (0..n).map(|i| (i as f64 - 499.5) * (p.at(i) as f64 - 499.5)).sum::<f64>()
            / (0..n).map(|i| (i as f64 - 499.5).powi(2)).sum::<f64>();
        assert!(correlation.abs() < 0.1, "{correlation}");
        assert!((0..n).any(|i| p.at(i) != Permutation::new(n, 10, 0).at(i)));
    }
}
