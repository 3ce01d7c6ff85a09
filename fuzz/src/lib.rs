//! What the fuzz targets share: mutations that keep an input's structure, the fixed model and a directory for files,
//! and what must hold of every message.

pub mod json;
pub mod model;
pub mod safetensors;

use hadal_numerics::{Purpose, Rng};
use std::fmt::Display;

/// Draws from one stream, in order: a mutation is a function of its seed.
pub struct Dice {
    rng: Rng,
    next: u64,
}

impl Dice {
    /// The stream of `seed`.
    pub fn new(seed: u32) -> Self {
        Self { rng: Rng::new(seed.into(), Purpose::Test, 0), next: 0 }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.next += 1;
        self.rng.bits(self.next)
    }

    /// Below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        self.rng.below(self.next, n.max(1) as u64) as usize
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `all`.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }
}

/// Longest message a user is shown. Lists of known keys are the longest part of one.
const LONGEST: usize = 2000;

/// What holds of every error and warning: one line of bounded length.
#[track_caller]
pub fn one_line(message: &dyn Display) {
    let text = message.to_string();
    assert!(!text.contains(['\n', '\r']), "a message of several lines: {text:?}");
    assert!(text.len() <= LONGEST, "a message of {} bytes: {:.200}...", text.len(), text);
}

/// The words of a libFuzzer dictionary: lines `"word"`, where `\"` and `\\` are escapes.
pub fn words(dictionary: &str) -> Vec<String> {
    let line =
        |l: &str| Some(l.trim().strip_prefix('"')?.strip_suffix('"')?.replace("\\\"", "\"").replace("\\\\", "\\"));
    dictionary.lines().filter_map(line).collect()
}

/// Copies `new` into libFuzzer's buffer if it fits.
pub fn put(new: &[u8], data: &mut [u8], max: usize) -> Option<usize> {
    let room = data.get_mut(..new.len()).filter(|_| new.len() <= max)?;
    room.copy_from_slice(new);
    Some(new.len())
}
