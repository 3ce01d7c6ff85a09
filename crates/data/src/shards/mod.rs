//! Tokens on disk: a source is tokenised once, into files that are mapped into memory and checked as they are read.
//!
//! A source's directory is named by what its tokens are a function of (the documents, the split, the tokenizer), written
//! under another name and renamed when it is whole, and never changed again. So runs can share a directory of them, and
//! what a run reads does not change under it, whatever happens to the text. The layout is in `docs/formats.md`.

mod file;
mod side;
mod store;
mod stored;
#[cfg(test)]
mod tests;

pub use side::Side;
pub use store::{Job, Pool, Progress, sweep, tokenise};
pub use stored::Stored;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::Tokenizer;
use crate::corpus::Survey;
use crate::pack::Sides;

/// Tokens of a full shard. As many are held in memory for each side while a source is tokenised.
const SHARD_TOKENS: usize = 16 << 20;
/// Bytes that one checksum covers.
const BLOCK: usize = 1 << 20;
/// Version of shards and manifest.
const VERSION: u32 = 1;
/// Name of the file that is written last.
const MANIFEST: &str = "manifest.json";

/// What a source's tokens are a function of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the tokenizer: [`Tokenizer::fingerprint`].
    pub tokenizer: u64,
    /// Of the documents and their split.
    pub source: u64,
}

impl Identity {
    /// Of a source as it is now.
    pub fn new(survey: &Survey, sides: &Sides, tokenizer: &Tokenizer) -> Self {
        let source = [survey.fingerprint(), sides.fingerprint(), u64::from(VERSION)];
        Self { tokenizer: tokenizer.fingerprint(), source: hash(&source) }
    }

    /// The name of the directory with the tokens of source `name`.
    pub fn directory(&self, name: &str) -> String {
        format!("{name}-{:016x}", hash(&[self.tokenizer, self.source]))
    }

    /// A hash of all tokens that a run reads, its sources in their order. Where the text lies, what it is called and
    /// when it was written does not count.
    pub fn of_all(sources: &[Self]) -> u64 {
        hash(&sources.iter().flat_map(|i| [i.tokenizer, i.source]).collect::<Vec<_>>())
    }
}

fn hash(numbers: &[u64]) -> u64 {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    xxh3_64(&bytes)
}

/// `manifest.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    source: String,
    /// Fingerprints, in hexadecimal.
    tokenizer: String,
    fingerprint: String,
    train: SideEntry,
    valid: SideEntry,
    /// The first words of documents spread over the held-out side.
    beginnings: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SideEntry {
    documents: u64,
    tokens: u64,
    /// Of text; end tokens count nothing.
    bytes: u64,
    shards: Vec<ShardEntry>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShardEntry {
    file: String,
    tokens: u64,
    /// Of its header and table of checksums, so of all of it, in hexadecimal.
    checksum: String,
}

fn hex(fingerprint: u64) -> String {
    format!("{fingerprint:016x}")
}

/// Sides of any tokens, for the tests of what reads them.
#[cfg(test)]
pub(crate) mod testing {
    use std::path::Path;

    use super::*;

    /// Writes `tokens` in shards of 256 and opens them.
    pub(crate) fn side(dir: &Path, name: &str, tokens: &[u32]) -> Side {
        let (identity, disk) = (Identity { tokenizer: 1, source: 2 }, hadal_files::Disk::new());
        let mut entry = SideEntry { tokens: tokens.len() as u64, ..SideEntry::default() };
        for (i, part) in tokens.chunks(256).enumerate() {
            let file = format!("{name}-{i}");
            let path = dir.join(&file);
            let _ = std::fs::remove_file(&path); // Of an earlier call.
            let checksum = hex(file::write(&disk, &path, part, 4, 0, identity).unwrap());
            entry.shards.push(ShardEntry { file, tokens: part.len() as u64, checksum });
        }
        Side::open(dir, &entry, identity, u32::MAX as usize).unwrap()
    }
}
