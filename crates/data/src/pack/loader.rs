//! Which tokens training sample number i consists of: a pure function of (tokens, sequence length, weights, seed, i).
//! To go on at a sample, a run needs its number and nothing else.

use std::sync::{Arc, Mutex};

use super::permute::Permutation;
use crate::DataError;
use crate::shards::Side;

/// Samples in which weighted sources have exact shares.
pub const BLOCK_SAMPLES: u64 = 4096;

/// A source as the loader sees it.
pub struct Part {
    /// Its name, for messages.
    pub name: String,
    /// Its training tokens.
    pub tokens: Side,
}

/// Serves windows of several sources by global sample number. Shareable by threads; the only state is a cache.
///
/// Without weights the windows of all sources are one set, and each occurs once in every run of [`Loader::windows`]
/// samples that starts at a multiple of it, in an order of that epoch. With weights every [`BLOCK_SAMPLES`] samples hold
/// each source by its share, in an order of that block, and each source has epochs of its own.
pub struct Loader {
    parts: Vec<Part>,
    seq_len: usize,
    seed: u64,
    /// Windows of each source.
    windows: Vec<u64>,
    mixture: Option<Mixture>,
}

struct Mixture {
    /// Samples of each source in a block.
    quotas: Vec<u64>,
    /// The last two blocks asked for: a batch may reach over the end of one.
    blocks: Mutex<Vec<(u64, Arc<Places>)>>,
}

/// For each place of a block its source, and its number among the block's samples of that source.
type Places = Vec<(u32, u32)>;

impl Loader {
    /// Cuts every source into windows of `seq_len` inputs; what is left over at a source's end is not trained on. A
    /// source too short for one window is an error.
    pub fn new(parts: Vec<Part>, shares: Shares, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        assert!(seq_len > 0 && !parts.is_empty(), "{} sources in sequences of {seq_len}", parts.len());
        let expected = seq_len as u64 + 1;
        for part in &parts {
            let found = part.tokens.tokens();
            if found < expected {
                let why = DataError::TooShort { expected, found };
                return Err(match parts.len() {
                    1 => why,
                    _ => DataError::Mixture { name: part.name.clone(), reason: why.to_string() },
                });
            }
        }
        let windows = parts.iter().map(|p| (p.tokens.tokens() - 1) / seq_len as u64).collect();
        let mixture = shares.quotas.map(|quotas| Mixture { quotas, blocks: Mutex::new(Vec::new()) });
        Ok(Self { parts, seq_len, seed, windows, mixture })
    }

    /// The `seq_len + 1` tokens of sample `index`: inputs are all but the last, targets all but the first.
    pub fn sample(&self, index: u64) -> Result<Vec<u32>, DataError> {
        let (source, window) = self.place(index);
        self.parts[source].tokens.read(window * self.seq_len as u64, self.seq_len + 1)
    }

    /// The source and the window of sample `index`.
    pub fn place(&self, index: u64) -> (usize, u64) {
        let Some(mixture) = &self.mixture else {
            let mut window = epochs(self.windows(), self.seed, 0, index);
            for (source, &windows) in self.windows.iter().enumerate() {
                if window < windows {
                    return (source, window);
                }
                window -= windows;
            }
            unreachable!("a permutation of all windows stays among them");
        };
        let block = index / BLOCK_SAMPLES;
        let (source, nth) = mixture.block(self.seed, block)[(index % BLOCK_SAMPLES) as usize];
        let source = source as usize;
        let nth = block * mixture.quotas[source] + u64::from(nth);
        (source, epochs(self.windows[source], self.seed, 1 + source as u64, nth))
    }

    /// Windows of all sources.
    pub fn windows(&self) -> u64 {
        self.windows.iter().sum()
    }
}

/// Streams of random orders: which kind, then which source, then which epoch or block.
fn stream(kind: u64, number: u64) -> u64 {
    kind << 44 | number
}

/// Number `index` of the endless run over `windows` windows, each epoch in an order of its own.
fn epochs(windows: u64, seed: u64, kind: u64, index: u64) -> u64 {
    Permutation::new(windows, seed, stream(kind, index / windows)).at(index % windows)
}

impl Mixture {
    fn block(&self, seed: u64, block: u64) -> Arc<Places> {
        // A panic while the lock is held leaves at worst a missing cache entry, so a poisoned lock is still good.
        let mut blocks = self.blocks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, places)) = blocks.iter().find(|(b, _)| *b == block) {
            return Arc::clone(places);
        }
        let order = Permutation::new(BLOCK_SAMPLES, seed, stream(BLOCK_ORDER, block));
        let ends: Vec<u64> = self
            .quotas
            .iter()
            .scan(0, |sum, q| {
                *sum += q;
                Some(*sum)
            })
            .collect();
        let mut given = vec![0u32; ends.len()];
        let place = |i| {
            let source = ends.partition_point(|&end| end <= order.at(i));
            given[source] += 1;
            (source as u32, given[source] - 1)
        };
        let places = Arc::new((0..BLOCK_SAMPLES).map(place).collect::<Places>());
        if blocks.len() == 2 {
            blocks.remove(0);
        }
        blocks.push((block, Arc::clone(&places)));
        places
    }
}

/// The stream kind of blocks; sources are kinds from 1, and there are fewer than samples in a block.
const BLOCK_ORDER: u64 = BLOCK_SAMPLES + 1;

/// How samples are shared out over sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Samples of each source in a block of [`BLOCK_SAMPLES`]; None without weights.
    quotas: Option<Vec<u64>>,
}

impl Shares {
    /// From each source's name and weight, by largest remainder. All have a weight or none has; one that is not above
    /// 0, or gives no sample in a block, is an error.
    pub fn new(sources: &[(&str, Option<f64>)]) -> Result<Self, DataError> {
        let bad = |name: &str, reason| Err(DataError::Mixture { name: name.to_owned(), reason });
        if sources.iter().all(|(_, weight)| weight.is_none()) {
            return Ok(Self { quotas: None });
        }
        let mut weights = Vec::new();
        for (name, weight) in sources {
            match weight {
                None => return bad(name, "expected a weight, as other sources have one, found none".into()),
                Some(w) if !(w.is_finite() && *w > 0.0) => {
                    return bad(name, format!("expected a finite weight above 0, found {w}"));
                }
                Some(w) => weights.push(*w),
            }
        }
        let quotas = largest_remainder(&weights, BLOCK_SAMPLES);
        let Some(none) = quotas.iter().position(|&q| q == 0) else { return Ok(Self { quotas: Some(quotas) }) };
        let all = weights.iter().sum::<f64>();
        bad(
            sources[none].0,
            format!("expected a weight that gives it one sample in {BLOCK_SAMPLES}, found {} of {all}", weights[none]),
        )
    }
}

/// `total` in whole parts proportional to `weights` (finite, at least one above 0): each rounded down, then one more for
/// the largest remainders, of equals the first.
pub fn largest_remainder(weights: &[f64], total: u64) -> Vec<u64> {
    // Scaled by the largest first, so that no sum of finite weights overflows.
    let largest = weights.iter().fold(0.0, |a: f64, &b| a.max(b));
    let sum: f64 = weights.iter().map(|w| w / largest).sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / largest / sum * total as f64).collect();
    let mut parts: Vec<u64> = exact.iter().map(|x| x.floor() as u64).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let remainder = |i: &usize| exact[*i] - exact[*i].floor();
    order.sort_by(|a, b| remainder(b).total_cmp(&remainder(a)));
    let missing = total.saturating_sub(parts.iter().sum()) as usize;
    order.iter().cycle().take(missing).for_each(|&i| parts[i] += 1);
    parts
}
