//! Training of byte-level BPE: repeatedly merge the most frequent pair of neighbours.
//!
//! Exact and deterministic: counts are updated for every word a merge touches, ties go to the lowest pair of ids, and
//! nothing depends on the order of a hash map or on the number of threads.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use rayon::prelude::*;
use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizer};

use super::{SPECIAL_TOKENS, alphabet, layout};
use crate::DataError;

type Pair = (u32, u32);

/// A pair must occur this often to be worth an id.
const MIN_COUNT: i64 = 2;

/// The `tokenizer.json` of a vocabulary of exactly `vocab_size` ids.
pub(super) fn train<S: AsRef<str> + Sync>(documents: &[S], vocab_size: usize) -> Result<Value, DataError> {
    if documents.is_empty() {
        return Err(DataError::EmptyCorpus);
    }
    let mut vocab: Vec<String> = SPECIAL_TOKENS.iter().map(|t| t.content.to_owned()).collect();
    vocab.extend(alphabet::in_id_order().iter().map(char::to_string));
    if vocab_size < vocab.len() {
        return Err(DataError::VocabTooSmall { expected: vocab.len(), found: vocab_size });
    }
    let words = count_words(documents, &layout::tokenizer(layout::file(&vocab, &[])));
    let mut trainer = Trainer::new(vocab, &words);
    while trainer.vocab.len() < vocab_size {
        if !trainer.merge_best() {
            return Err(DataError::VocabTooLarge { expected: vocab_size, found: trainer.vocab.len() });
        }
    }
    let spell = |id: u32| trainer.vocab[id as usize].clone();
    let merges: Vec<_> = trainer.merges.iter().map(|&(a, b)| (spell(a), spell(b))).collect();
    Ok(layout::file(&trainer.vocab, &merges))
}

/// How often each piece of the pre-tokenizer occurs. Sums commute, so threads do not show in the result.
fn count_words<S: AsRef<str> + Sync>(documents: &[S], tokenizer: &tokenizers::Tokenizer) -> BTreeMap<String, i64> {
    let count = |document: &S| {
        let added = tokenizer.get_added_vocabulary();
        let mut text = added.extract_and_normalize(tokenizer.get_normalizer(), document.as_ref());
        let splitter = tokenizer.get_pre_tokenizer().expect("our layout has a pre-tokenizer");
        splitter.pre_tokenize(&mut text).expect("splitting by a compiled regex cannot fail");
        let mut words: HashMap<String, i64> = HashMap::new();
        for (word, _, special) in text.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            // A special token spelled out in the text is no text.
            if special.is_none() {
                *words.entry(word.to_owned()).or_default() += 1;
            }
        }
        words
    };
    let mut total = BTreeMap::new();
    for words in documents.par_iter().map(count).collect::<Vec<_>>() {
        for (word, n) in words {
            *total.entry(word).or_default() += n;
        }
    }
    total
}

/// State of training. Invariant: `counts[p]` is the number of times p occurs in the words, weighted by how often each
/// word does; every positive count is in the heap at least once, outdated entries are skipped when popped.
struct Trainer {
    vocab: Vec<String>,
    ids: HashMap<String, u32>,
    merges: Vec<Pair>,
    merged: HashMap<Pair, u32>,
    words: Vec<(Vec<u32>, i64)>,
    counts: HashMap<Pair, i64>,
    /// Words that held the pair at some time; a superset of those that do.
    places: HashMap<Pair, BTreeSet<usize>>,
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
}

impl Trainer {
    fn new(vocab: Vec<String>, words: &BTreeMap<String, i64>) -> Self {
        let ids: HashMap<String, u32> = vocab.iter().cloned().zip(0..).collect();
        let split = |word: &str| word.chars().map(|c| ids[c.encode_utf8(&mut [0; 4]) as &str]).collect();
        let words: Vec<(Vec<u32>, i64)> = words.iter().map(|(w, &n)| (split(w), n)).collect();
        let (mut counts, mut places) = (HashMap::new(), HashMap::<Pair, BTreeSet<usize>>::new());
        for (i, (word, n)) in words.iter().enumerate() {
            for pair in pairs(word) {
                *counts.entry(pair).or_default() += n;
                places.entry(pair).or_default().insert(i);
            }
        }
        let heap = counts.iter().map(|(&pair, &n)| (n, Reverse(pair))).collect();
        Self { vocab, ids, merges: Vec::new(), merged: HashMap::new(), words, counts, places, heap }
    }

    /// Merges the most frequent pair everywhere; false if none is frequent enough.
    fn merge_best(&mut self) -> bool {
        let pair = loop {
            let Some((n, Reverse(pair))) = self.heap.pop() else { return false };
            if n < MIN_COUNT {
                return false;
            }
            if n == self.counts[&pair] {
                break pair;
            }
        };
        let id = self.id_of(pair);
        let mut changed = BTreeSet::new();
        for i in self.places.remove(&pair).unwrap_or_default() {
            self.merge_in_word(i, pair, id, &mut changed);
        }
        for pair in changed {
            let n = self.counts[&pair];
            if n > 0 {
                self.heap.push((n, Reverse(pair)));
            }
        }
        true
    }

    /// The id a pair merges into. Two pairs may spell the same token ("in" + "g", "i" + "ng"): they share its id. A
    /// pair may also come back after it was merged, when a later merge makes one of its halves anew: it keeps its rank.
    fn id_of(&mut self, pair: Pair) -> u32 {
        if let Some(&id) = self.merged.get(&pair) {
            return id;
        }
        let token = format!("{}{}", self.vocab[pair.0 as usize], self.vocab[pair.1 as usize]);
        let id = *self.ids.entry(token).or_insert_with_key(|token| {
            self.vocab.push(token.clone());
            self.vocab.len() as u32 - 1
        });
        self.merges.push(pair);
        self.merged.insert(pair, id);
        id
    }

    fn merge_in_word(&mut self, i: usize, pair: Pair, id: u32, changed: &mut BTreeSet<Pair>) {
        let (old, n) = &self.words[i];
        let new = replace(old, pair, id);
        for p in pairs(old) {
            // The pair was counted when the word was last written.
            *self.counts.get_mut(&p).expect("every pair of a word has a count") -= n;
            changed.insert(p);
        }
        for p in pairs(&new) {
            *self.counts.entry(p).or_default() += n;
            self.places.entry(p).or_default().insert(i);
            changed.insert(p);
        }
        self.words[i].0 = new;
    }
}

fn pairs(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|w| (w[0], w[1]))
}

/// `word` with each occurrence of `pair`, from the left, written as `id`.
fn replace(word: &[u32], pair: Pair, id: u32) -> Vec<u32> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        if *first == pair.0 && tail.first() == Some(&pair.1) {
            out.push(id);
            rest = &tail[1..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same rule written to be believed: count all pairs anew for every merge.
    fn naive(mut vocab: Vec<String>, words: &BTreeMap<String, i64>, size: usize) -> Vec<String> {
        let id = |vocab: &[String], token: &str| vocab.iter().position(|t| t == token).map(|i| i as u32);
        let split = |w: &String| w.chars().map(|c| id(&vocab, &c.to_string()).unwrap()).collect::<Vec<u32>>();
        let mut words: Vec<(Vec<u32>, i64)> = words.iter().map(|(w, &n)| (split(w), n)).collect();
        while vocab.len() < size {
            let mut counts: BTreeMap<Pair, i64> = BTreeMap::new();
            for (word, n) in &words {
                pairs(word).for_each(|p| *counts.entry(p).or_default() += n);
            }
            let (&pair, _) = counts.iter().max_by_key(|&(&p, &n)| (n, Reverse(p))).unwrap();
            let token = format!("{}{}", vocab[pair.0 as usize], vocab[pair.1 as usize]);
            let merged = id(&vocab, &token).unwrap_or_else(|| {
                vocab.push(token.clone());
                vocab.len() as u32 - 1
            });
            words.iter_mut().for_each(|(word, _)| *word = replace(word, pair, merged));
        }
        vocab
    }

    #[test]
    fn incremental_counts_agree_with_counting_anew() {
        let documents = crate::corpus::builtin::documents(8, 6_000);
        let vocab: Vec<String> = alphabet::in_id_order().iter().map(char::to_string).collect();
        let words = count_words(&documents, &layout::tokenizer(layout::file(&vocab, &[])));
        let mut trainer = Trainer::new(vocab.clone(), &words);
        while trainer.vocab.len() < 600 {
            assert!(trainer.merge_best());
        }
        assert_eq!(trainer.vocab, naive(vocab, &words, 600));
    }

    #[test]
    fn overlapping_pairs_merge_from_the_left() {
        assert_eq!(replace(&[1, 1, 1, 2, 1, 1], (1, 1), 9), [9, 1, 2, 9]);
        assert!(replace(&[], (1, 1), 9).is_empty());
    }
}
