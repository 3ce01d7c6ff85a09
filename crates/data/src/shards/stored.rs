//! A tokenised source, opened.

use std::path::Path;

use super::{Identity, MANIFEST, Manifest, Side, VERSION, hex};
use crate::DataError;

/// Sources up to this size are checked whole when they are opened, larger ones block by block as they are read: a run
/// of days should learn of a damaged disk at once, but not wait for terabytes to be read.
const CHECK_AT_ONCE: u64 = 4 << 30;

/// The tokens of a source.
pub struct Stored {
    /// To train on.
    pub train: Side,
    /// Held out.
    pub valid: Side,
    /// The first words of documents spread over the held-out side.
    pub beginnings: Vec<String>,
}

impl Stored {
    /// True if the directory has been written to its end.
    pub fn is_whole(dir: &Path) -> bool {
        dir.join(MANIFEST).is_file()
    }

    /// Opens and checks the tokens in `dir`, which must be those of `identity` and below `vocab_size`. Works in parallel
    /// on the current rayon pool.
    pub fn open(dir: &Path, identity: Identity, vocab_size: usize) -> Result<Self, DataError> {
        let manifest = read(dir, identity)?;
        let side = |entry| Side::open(dir, entry, identity, vocab_size);
        let stored =
            Self { train: side(&manifest.train)?, valid: side(&manifest.valid)?, beginnings: manifest.beginnings };
        if stored.train.tokens() + stored.valid.tokens() <= CHECK_AT_ONCE / 4 {
            stored.train.check()?;
            stored.valid.check()?;
        }
        Ok(stored)
    }
}

fn read(dir: &Path, identity: Identity) -> Result<Manifest, DataError> {
    let path = dir.join(MANIFEST);
    let bad = |reason| DataError::Shard { path: path.clone(), reason };
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(bad("expected the manifest that is written last, found none".into()));
        }
        other => other.map_err(DataError::read(&path))?,
    };
    let version = serde_json::from_slice::<serde_json::Value>(&bytes).ok().and_then(|m| m["version"].as_u64());
    if let Some(found) = version.filter(|&v| v != u64::from(VERSION)) {
        return Err(bad(format!("expected version {VERSION}, found {found}")));
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let (expected, found) = (hex(identity.tokenizer), &manifest.tokenizer);
    if expected != *found {
        return Err(bad(format!("expected tokens of tokenizer {expected}, found those of tokenizer {found}")));
    }
    let (expected, found) = (hex(identity.source), &manifest.fingerprint);
    if expected != *found {
        return Err(bad(format!("expected tokens of source {expected}, found those of source {found}")));
    }
    // Names come from us: a path out of the directory is somebody else's.
    let shards = manifest.train.shards.iter().chain(&manifest.valid.shards);
    match shards.map(|s| &s.file).find(|f| f.contains(['/', '\\'])) {
        Some(name) => Err(bad(format!("expected names of shards, found \"{name}\""))),
        None => Ok(manifest),
    }
}
