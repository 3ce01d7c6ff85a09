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
    /// Its share of the samples, relative to the other sources'. All have one or none has.
    pub weight: Option<f64>,
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
    /// source too short for one window, or with a weight too small for one sample in a block, is an error.
    pub fn new(parts: Vec<Part>, seq_len: usize, seed: u64) -> Result<Self, DataError> {
        assert!(seq_len > 0 && !parts.is_empty(), "{} sources in sequences of {seq_len}", parts.len());
        let expected = seq_len as u64 + 1;
        for part in &parts {
            let found = part.tokens.tokens();
            if found < expected {
                return Err(match parts.len() {
                    1 => DataError::TooShort { expected, found },
                    _ => mixture(&part.name, DataError::TooShort { expected, found }.to_string()),
                });
            }
        }
        let windows = parts.iter().map(|p| (p.tokens.tokens() - 1) / seq_len as u64).collect();
        let mixture = quotas(&parts)?.map(|quotas| Mixture { quotas, blocks: Mutex::new(Vec::new()) });
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

    /// The sources.
    pub fn parts(&self) -> &[Part] {
        &self.parts
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
        let ends: Vec<u64> = self.quotas.iter().scan(0, |sum, q| { *sum += q; Some(*sum) }).collect();
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

/// Each source's samples in a block, by largest remainder; None without weights.
fn quotas(parts: &[Part]) -> Result<Option<Vec<u64>>, DataError> {
    let given = parts.iter().filter(|p| p.weight.is_some()).count();
    if given == 0 {
        return Ok(None);
    }
    for part in parts {
        match part.weight {
            None => return Err(mixture(&part.name, "expected a weight, as other sources have one, found none".into())),
            Some(w) if !(w.is_finite() && w > 0.0) => {
                return Err(mixture(&part.name, format!("expected a finite weight above 0, found {w}")));
            }
            Some(_) => {}
        }
    }
    let weights: Vec<f64> = parts.iter().filter_map(|p| p.weight).collect();
    let quotas = largest_remainder(&weights, BLOCK_SAMPLES);
    match quotas.iter().position(|&q| q == 0) {
        Some(i) => {
            let (found, sum) = (weights[i], weights.iter().sum::<f64>());
            let reason = format!(
                "expected a weight of at least one sample in {BLOCK_SAMPLES}, found {found} of {sum} in all sources"
            );
            Err(mixture(&parts[i].name, reason))
        }
        None => Ok(Some(quotas)),
    }
}

fn mixture(name: &str, reason: String) -> DataError {
    DataError::Mixture { name: name.to_owned(), reason }
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
