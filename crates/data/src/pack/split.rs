//! Which documents are held out.

use hadal_numerics::{Purpose, Rng};

use xxhash_rust::xxh3::xxh3_64;

use crate::DataError;

/// The two sides of a source, neither empty. Whether document i is held out depends on (seed, source, i) alone, so that
/// adding documents moves none to the other side; only where a side would be empty does the nearest draw change sides.
#[derive(Clone, Copy, Debug)]
pub struct Sides {
    rng: Rng,
    fraction: f64,
    moved: Option<u64>,
    held: u64,
    count: u64,
}

impl Sides {
    /// Holds out about `fraction` of the `count` documents of source number `source`.
    pub fn new(count: u64, fraction: f64, seed: u64, source: u64) -> Result<Self, DataError> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(DataError::Fraction(fraction));
        }
        match count {
            0 => return Err(DataError::EmptyCorpus),
            1 => return Err(DataError::OneDocument),
            _ => {}
        }
        let rng = Rng::new(seed, Purpose::Split, source);
        let draw = |i: &u64| rng.uniform(*i);
        let held = (0..count).filter(|i| draw(i) < fraction).count() as u64;
        let order = |a: &u64, b: &u64| draw(a).total_cmp(&draw(b));
        let (moved, held) = match held {
            0 => ((0..count).min_by(order), 1),
            n if n == count => ((0..count).max_by(order), count - 1),
            n => (None, n),
        };
        Ok(Self { rng, fraction, moved, held, count })
    }

    /// True if document `i` is held out.
    pub fn held(&self, i: u64) -> bool {
        (self.rng.uniform(i) < self.fraction) != (self.moved == Some(i))
    }

    /// A hash of what decides who is held out.
    pub fn fingerprint(&self) -> u64 {
        let numbers = [self.rng.bits(0), self.rng.bits(1), self.fraction.to_bits(), self.count];
        xxh3_64(&numbers.map(u64::to_le_bytes).concat())
    }

    /// How many are held out.
    pub fn held_count(&self) -> u64 {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(count: u64, fraction: f64, seed: u64, source: u64) -> Vec<u64> {
        let sides = Sides::new(count, fraction, seed, source).unwrap();
        let held: Vec<u64> = (0..count).filter(|&i| sides.held(i)).collect();
        assert_eq!(held.len() as u64, sides.held_count());
        held
    }

    #[test]
    fn split_is_by_document_and_stable() {
        let a = held(1000, 0.05, 7, 0);
        assert_eq!(a, held(1000, 0.05, 7, 0));
        assert_ne!(a, held(1000, 0.05, 8, 0));
        assert_ne!(a, held(1000, 0.05, 7, 1));
        assert!((30..=70).contains(&a.len()), "{}", a.len());
        // More documents move none of the old ones to the other side.
        assert_eq!(a, held(1500, 0.05, 7, 0).into_iter().filter(|&i| i < 1000).collect::<Vec<_>>());
    }

    #[test]
    fn both_sides_have_a_document() {
        for seed in 0..50 {
            for fraction in [1e-9, 0.05, 0.95, 1.0 - 1e-9] {
                for count in [2, 3] {
                    let held = held(count, fraction, seed, 3).len() as u64;
                    assert!(0 < held && held < count, "{held} of {count}");
                }
            }
        }
    }

    #[test]
    fn split_errors() {
        let error = |count, fraction| Sides::new(count, fraction, 0, 0).unwrap_err().to_string();
        assert!(error(1, 0.05).contains("corpus is too short: expected at least 2 documents"));
        assert!(error(0, 0.05).contains("corpus is empty"));
        for fraction in [0.0, 1.0, -0.1, f64::NAN] {
            assert!(error(9, fraction).contains("held-out fraction"));
        }
    }
}
