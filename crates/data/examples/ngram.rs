//! Byte n-gram baselines for the held-out text of the built-in corpus: bits per byte of interpolated models, to set
//! beside `hadal pretrain`'s.
//!
//! ```text
//! cargo run --release -p hadal-data --example ngram -- --seed 0 --max-bytes 40000
//! ```
//!
//! Order n predicts a byte from the n - 1 before it. Two smoothings, which interpolate every order down to the uniform
//! distribution: Witten-Bell, and Kneser-Ney with the three discounts of Chen and Goodman (1999), fitted by their
//! formula on the training side. Training and held-out documents are those of `hadal pretrain` with the same seed; a
//! document's bytes are predicted from a context that begins with its end mark, as the model's does, and the mark
//! itself is no byte and is not counted. `--max-bytes N` stops after the first N held-out bytes, since a training run
//! validates on the beginning of the held-out side; the whole side is always printed too.

use std::collections::HashMap;

use hadal_data::{corpus::builtin, split};

/// What `hadal pretrain` holds out.
const FRACTION: f64 = 0.05;
/// Bytes, and the mark between documents.
const SYMBOLS: usize = 257;
const MARK: u16 = 256;

fn main() -> Result<(), hadal_data::DataError> {
    let args: Vec<String> = std::env::args().collect();
    let number =
        |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)?.parse::<usize>().ok());
    let seed = number("--seed").unwrap_or(0) as u64;
    let documents = builtin::documents(seed, builtin::DEFAULT_BYTES);
    let split = split(documents.len(), FRACTION, seed)?;
    let symbols = |side: &[usize]| -> Vec<u16> {
        side.iter().flat_map(|&i| documents[i].bytes().map(u16::from).chain([MARK])).collect()
    };
    let (train, held) = (symbols(&split.train), symbols(&split.validation));
    let mut lengths = Vec::new();
    lengths.extend(number("--max-bytes"));
    lengths.push(usize::MAX);
    for order in [3, 5] {
        for smoothing in [Smoothing::WittenBell, Smoothing::KneserNey] {
            let model = Model::train(order, smoothing, &train);
            for &length in &lengths {
                let (bits, bytes) = model.score(&held, length);
                let name = if smoothing == Smoothing::WittenBell { "Witten-Bell" } else { "Kneser-Ney" };
                println!("seed {seed}, order {order}, {name}: {:.4} bits per byte, {bytes} bytes", bits / bytes as f64);
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Smoothing {
    WittenBell,
    KneserNey,
}

/// What followed one context.
#[derive(Default)]
struct Followers {
    counts: HashMap<u16, u32>,
    total: u32,
    /// Symbols that occurred once, twice, and more often.
    classes: [u32; 3],
}

/// `levels[k]` maps contexts of k symbols to what followed them.
struct Model {
    smoothing: Smoothing,
    levels: Vec<HashMap<u64, Followers>>,
    /// Taken off a count of one, two, more, for each level.
    discounts: Vec<[f64; 3]>,
}

impl Model {
    fn train(order: usize, smoothing: Smoothing, text: &[u16]) -> Self {
        let mut levels: Vec<HashMap<u64, Followers>> = (0..order).map(|_| HashMap::new()).collect();
        for (at, &symbol) in text.iter().enumerate() {
            for (k, level) in levels.iter_mut().enumerate() {
                let context = context(text, at, k);
                *level.entry(context).or_default().counts.entry(symbol).or_default() += 1;
            }
        }
        if smoothing == Smoothing::KneserNey {
            for k in (0..order - 1).rev() {
                levels[k] = continuations(&levels[k + 1]);
            }
        }
        for followers in levels.iter_mut().flat_map(HashMap::values_mut) {
            followers.total = followers.counts.values().sum();
            for &count in followers.counts.values() {
                followers.classes[count.min(3) as usize - 1] += 1;
            }
        }
        let discounts = levels.iter().map(discounts).collect();
        Self { smoothing, levels, discounts }
    }

    /// Probability of `text[at]` after what precedes it.
    fn probability(&self, text: &[u16], at: usize) -> f64 {
        let mut p = 1.0 / SYMBOLS as f64;
        for (k, level) in self.levels.iter().enumerate() {
            let Some(followers) = level.get(&context(text, at, k)) else { break };
            let count = followers.counts.get(&text[at]).copied().unwrap_or(0);
            let total = f64::from(followers.total);
            p = match self.smoothing {
                Smoothing::WittenBell => {
                    let kinds = followers.counts.len() as f64;
                    (f64::from(count) + kinds * p) / (total + kinds)
                }
                Smoothing::KneserNey => {
                    let discounts = &self.discounts[k];
                    let off = if count == 0 { 0.0 } else { discounts[count.min(3) as usize - 1] };
                    let mass: f64 = discounts.iter().zip(followers.classes).map(|(d, n)| d * f64::from(n)).sum();
                    (f64::from(count) - off + mass * p) / total
                }
            };
        }
        p
    }

    /// Bits and bytes of the first `limit` bytes of `text`.
    fn score(&self, text: &[u16], limit: usize) -> (f64, usize) {
        let (mut bits, mut bytes) = (0.0, 0);
        for (at, _) in text.iter().enumerate().filter(|(_, symbol)| **symbol != MARK).take(limit) {
            bits -= self.probability(text, at).log2();
            bytes += 1;
        }
        (bits, bytes)
    }
}

/// The `k` symbols before `at`, as a number; before the beginning there are end marks.
fn context(text: &[u16], at: usize, k: usize) -> u64 {
    (1..=k).fold(0, |key, back| key << 9 | u64::from(if back <= at { text[at - back] } else { MARK }))
}

/// For each shorter context, in how many longer ones a symbol followed it: the counts of Kneser-Ney's lower orders.
fn continuations(longer: &HashMap<u64, Followers>) -> HashMap<u64, Followers> {
    let mut shorter: HashMap<u64, Followers> = HashMap::new();
    for (&key, followers) in longer {
        // The oldest symbol is in the lowest bits.
        let entry = shorter.entry(key >> 9).or_default();
        for &symbol in followers.counts.keys() {
            *entry.counts.entry(symbol).or_default() += 1;
        }
    }
    shorter
}

/// The three discounts from how many counts are 1, 2, 3 and 4.
fn discounts(level: &HashMap<u64, Followers>) -> [f64; 3] {
    let mut n = [0.0; 5];
    for &count in level.values().flat_map(|f| f.counts.values()) {
        if count < 5 {
            n[count as usize] += 1.0;
        }
    }
    if n[1..].contains(&0.0) {
        // Too little text for the formula, as for single symbols, where nearly everything is frequent.
        return [0.5, 0.5, 0.5];
    }
    let y = n[1] / (n[1] + 2.0 * n[2]);
    [1, 2, 3].map(|k| (k as f64 - (k + 1) as f64 * y * n[k + 1] / n[k]).clamp(0.0, k as f64))
}
