//! From documents to the sequences of a training run: the split into training and validation, the token stream, and
//! the loader that maps a global sample number to tokens.
//!
//! Documents are joined end to end, each followed by the end token, and cut into windows without a mask between
//! documents, as in pretraining of DeepSeek-V3 (paper, section 4.1).

mod loader;
#[cfg(test)]
mod tests;

use hadal_numerics::{Purpose, Rng};
use rayon::prelude::*;

use crate::{DataError, Tokenizer};

pub use loader::Loader;

/// Indices of the documents on each side, both ascending, neither empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// To train on.
    pub train: Vec<usize>,
    /// Held out.
    pub validation: Vec<usize>,
}

/// Holds out about `fraction` of `count` documents. Whether document i is held out depends on (seed, i) alone, so that
/// adding documents moves none to the other side; only where a side would be empty does the nearest draw change sides.
pub fn split(count: usize, fraction: f64, seed: u64) -> Result<Split, DataError> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(DataError::Fraction(fraction));
    }
    match count {
        0 => return Err(DataError::EmptyCorpus),
        1 => return Err(DataError::OneDocument),
        _ => {}
    }
    let rng = Rng::new(seed, Purpose::Split, 0);
    let draw = |i: &usize| rng.uniform(*i as u64);
    let (mut validation, mut train): (Vec<usize>, Vec<usize>) = (0..count).partition(|i| draw(i) < fraction);
    let order = |a: &usize, b: &usize| draw(a).total_cmp(&draw(b));
    if validation.is_empty() {
        // With at least two documents and none held out, `train` has a lowest draw.
        let lowest = (0..train.len()).min_by(|&a, &b| order(&train[a], &train[b])).expect("two documents or more");
        validation.push(train.remove(lowest));
    } else if train.is_empty() {
        let highest = (0..count).max_by(|&a, &b| order(&validation[a], &validation[b])).expect("two documents or more");
        train.push(validation.remove(highest));
    }
    Ok(Split { train, validation })
}

/// Documents as one run of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenStream {
    /// All documents in order, each followed by the end token.
    pub tokens: Vec<u32>,
    /// Bytes of text the tokens stand for, end tokens counting nothing.
    pub bytes: u64,
}

impl TokenStream {
    /// Tokenises `documents` on all threads of the current rayon pool; the result does not depend on their number.
    pub fn new<S: AsRef<str> + Sync>(tokenizer: &Tokenizer, documents: &[S]) -> Result<Self, DataError> {
        let eos = tokenizer.eos().ok_or(DataError::NoEos)?;
        if documents.is_empty() {
            return Err(DataError::EmptyCorpus);
        }
        let encoded: Vec<Vec<u32>> = documents.par_iter().map(|d| tokenizer.encode(d.as_ref())).collect();
        let mut tokens = Vec::with_capacity(encoded.iter().map(|d| d.len() + 1).sum());
        for document in encoded {
            tokens.extend(document);
            tokens.push(eos);
        }
        let bytes = documents.iter().map(|d| d.as_ref().len() as u64).sum();
        Ok(Self { tokens, bytes })
    }

    /// Windows of `seq_len` inputs plus the last target, in order, the last one as short as it must be: together they
    /// predict every token but the first exactly once. For bits per byte, weigh by the byte lengths of the targets.
    pub fn validation_windows(&self, seq_len: usize) -> impl Iterator<Item = &[u32]> {
        assert!(seq_len > 0, "sequence length 0");
        let last = self.tokens.len().saturating_sub(1);
        (0..last).step_by(seq_len).map(move |start| &self.tokens[start..=(start + seq_len).min(last)])
    }
}
