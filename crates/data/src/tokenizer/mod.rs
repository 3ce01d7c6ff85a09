//! Byte-level BPE in the field's file format: loads a published `tokenizer.json`, or trains one that differs from
//! DeepSeek-V3's in nothing but its merges and the size of its vocabulary.
//!
//! Encoding, training and the file format are the `tokenizers` crate's.

mod check;
mod layout;
mod load;
#[cfg(test)]
mod tests;
mod train;

use std::path::Path;

use hadal_files::Disk;
use serde_json::{Map, Value};
use tokenizers::ModelWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use xxhash_rust::xxh3::Xxh3;

use crate::DataError;

pub use layout::SPECIAL_TOKENS;

/// A loaded or trained tokenizer. Cheap to share by reference; all methods may run on many threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    byte_lengths: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, given itself or as the directory that holds it. The names of the beginning, end and
    /// padding tokens come from `tokenizer_config.json` beside it; without that file there are none.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, DataError> {
        load::load(path.as_ref())
    }

    /// Trains on `documents`: at most `vocab_size` ids, of which the first are [`SPECIAL_TOKENS`] and the next 256 the
    /// bytes. Of two equally frequent pairs the one with the lower ids is merged first, so that one corpus gives one
    /// file. A corpus without enough repeated text for `vocab_size` gives fewer ids; a model may have more of them.
    pub fn train<S: AsRef<str> + Sync>(documents: &[S], vocab_size: usize) -> Result<Self, DataError> {
        let inner = train::train(documents, vocab_size)?;
        let [bos, eos, pad] = [0, 1, 2].map(|i| inner.token_to_id(SPECIAL_TOKENS[i].content));
        Ok(Self::new(inner, bos, eos, pad))
    }

    fn new(inner: tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>, pad: Option<u32>) -> Self {
        let byte_lengths = byte_lengths(&inner);
        Self { inner, bos, eos, pad, byte_lengths }
    }

    /// Token ids of `text`. Nothing is added before or after; a special token spelled out in the text becomes its id.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // Cannot fail: loading has checked for a byte-level BPE model without dropout, which has an id for any byte.
        self.inner.encode_fast(text, false).expect("byte-level BPE encodes any text").get_ids().to_vec()
    }

    /// The text of `ids`. Bytes that are not UTF-8 (a character cut in half) become U+FFFD; ids outside the vocabulary
    /// (rows that pad an embedding) give nothing. `skip_special` leaves out the tokens flagged special.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.inner.decode(ids, skip_special).expect("a byte-level decoder decodes any ids")
    }

    /// Number of ids, which run from 0 without a gap at the end: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.byte_lengths.len()
    }

    /// Id of the token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Id of the token that ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Id of the padding token; published files often name the end token.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Ids and spellings of the tokens that are matched as a whole, by id.
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut all: Vec<(u32, String)> = added.iter().map(|(&id, token)| (id, token.content.clone())).collect();
        all.sort_unstable();
        all
    }

    /// Ids and texts of the `count` tokens that stand for the most bytes, special ones left out; of equals the lowest
    /// ids.
    pub fn longest_tokens(&self, count: usize) -> Vec<(u32, String)> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut ids: Vec<u32> = (0..self.vocab_size() as u32).filter(|id| !added.contains_key(id)).collect();
        ids.sort_by_key(|&id| std::cmp::Reverse(self.byte_lengths[id as usize]));
        ids.into_iter().take(count).map(|id| (id, self.decode(&[id], false))).collect()
    }

    /// Merges of the BPE.
    pub fn merges(&self) -> usize {
        let file: Value = serde_json::from_slice(&self.files()[0].1).unwrap_or_default();
        file["model"]["merges"].as_array().map_or(0, Vec::len)
    }

    /// How many bytes of text each id stands for, by id; 0 for special tokens. With it a loss per token becomes bits
    /// per byte, which vocabularies of any size share.
    pub fn token_byte_lengths(&self) -> Vec<u32> {
        self.byte_lengths.clone()
    }

    /// A hash of all that decides which tokens a document becomes.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(&self.files()[0].1);
        hash.update(&self.eos.map_or(u64::MAX, u64::from).to_le_bytes());
        hash.digest()
    }

    /// `tokenizer.json` and `tokenizer_config.json` as transformers reads them: (name, contents), for whoever writes
    /// them beside a model.
    pub fn files(&self) -> [(&'static str, Vec<u8>); 2] {
        let json = self.inner.to_string(true).expect("a tokenizer in memory has a JSON form");
        let config = serde_json::to_vec_pretty(&self.config()).expect("plain strings have a JSON form");
        [("tokenizer.json", json.into_bytes()), ("tokenizer_config.json", config)]
    }

    /// Writes [`Tokenizer::files`] into `dir` (made if missing), each whole or not at all.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), DataError> {
        let dir = dir.as_ref();
        let disk = Disk::new();
        disk.create_dir(dir)?;
        self.files().iter().try_for_each(|(name, bytes)| Ok(disk.replace(&dir.join(name), bytes)?))
    }

    fn config(&self) -> Value {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), false.into());
        config.insert("add_eos_token".into(), false.into());
        for (key, id) in [("bos_token", self.bos), ("eos_token", self.eos), ("pad_token", self.pad)] {
            let name = id.and_then(|id| self.inner.id_to_token(id));
            config.insert(key.into(), name.map_or(Value::Null, Value::from));
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        Value::Object(config)
    }
}

/// Each character of a byte-level token stands for one byte; an added token that is not special is its own text.
fn byte_lengths(inner: &tokenizers::Tokenizer) -> Vec<u32> {
    let vocab = inner.get_vocab(true);
    let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
    let mut lengths = vec![0; size];
    for (token, &id) in &vocab {
        lengths[id as usize] = token.chars().count() as u32;
    }
    for (&id, token) in inner.get_added_vocabulary().get_added_tokens_decoder() {
        lengths[id as usize] = if token.special { 0 } else { token.content.len() as u32 };
    }
    lengths
}

/// Says why `encode` could fail for some text, if it could.
fn why_unusable(inner: &tokenizers::Tokenizer) -> Option<String> {
    if !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
        return Some("expected a BPE model, found another kind".into());
    }
    let missing = ByteLevel::alphabet().into_iter().filter(|c| inner.token_to_id(&c.to_string()).is_none()).count();
    (missing > 0).then(|| format!("expected all 256 bytes in the vocabulary, found {}", 256 - missing))
}
