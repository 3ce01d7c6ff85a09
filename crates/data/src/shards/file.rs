//! One shard: a header, tokens, a checksum for every block of them. All numbers are little-endian.
//!
//! ```text
//!     0   8   magic
//!     8   4   version
//!     12  4   bytes a token, 2 or 4
//!     16  8   tokens
//!     24  8   bytes of text that the tokens stand for
//!     32  8   fingerprint of the tokenizer
//!     40  8   fingerprint of the source
//!     48  8   bytes a block
//!     56  8   XXH3 of bytes 0 to 56 and of the table of checksums
//!     64      tokens
//!             XXH3 of each block, 8 bytes each
//! ```

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use hadal_files::Disk;
use memmap2::Mmap;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{BLOCK, Identity, ShardEntry, VERSION, hex};
use crate::DataError;

const MAGIC: [u8; 8] = *b"hadaltok";
const HEADER: usize = 64;
const HASHED: usize = 56;

/// Bytes a token: two hold ids below 65536.
pub(super) fn width(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Writes a new shard and gives the checksum in its header, which covers all of it. What a failure leaves is for the
/// directory's writer to discard.
pub(super) fn write(
    disk: &Disk,
    path: &Path,
    tokens: &[u32],
    width: usize,
    text_bytes: u64,
    identity: Identity,
) -> Result<u64, DataError> {
    let data: Vec<u8> = match width {
        2 => tokens.iter().flat_map(|&t| (t as u16).to_le_bytes()).collect(),
        _ => tokens.iter().flat_map(|t| t.to_le_bytes()).collect(),
    };
    let table: Vec<u8> = data.chunks(BLOCK).flat_map(|block| xxh3_64(block).to_le_bytes()).collect();
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((width as u32).to_le_bytes());
    for n in [tokens.len() as u64, text_bytes, identity.tokenizer, identity.source, BLOCK as u64] {
        header.extend(n.to_le_bytes());
    }
    let checksum = head_hash(&header, &table);
    header.extend(checksum.to_le_bytes());
    disk.write_new(path, |out| {
        out.write_all(&header)?;
        out.write_all(&data)?;
        out.write_all(&table)
    })?;
    Ok(checksum)
}

fn head_hash(header: &[u8], table: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    hash.update(table);
    hash.digest()
}

/// A mapped shard.
pub(super) struct Shard {
    path: PathBuf,
    map: Mmap,
    width: usize,
    tokens: usize,
    vocab_size: usize,
    /// Blocks whose checksum and ids have been seen to be right.
    checked: Vec<AtomicBool>,
}

impl Shard {
    /// Maps the shard at `path` and checks everything but its tokens.
    pub fn open(path: &Path, entry: &ShardEntry, identity: Identity, vocab_size: usize) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::read(path))?;
        // SAFETY: a mapping must not change while it is borrowed as a slice. The file is one of ours: it was written
        // once, flushed and renamed into place, and nothing of ours opens it for writing again. Another process that
        // overwrites it breaks this rule; what it can then do is change what integers we read, since every use below
        // goes by lengths taken here and copies plain bytes. One that cuts the file short ends this process with a
        // bus error at the next touch, as it does for whoever maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::read(path))?;
        let shard = Self::parse(path, map, identity, vocab_size)?;
        let found = [(shard.tokens as u64).to_string(), hex(shard.number(HASHED, 8))];
        let expected = [entry.tokens.to_string(), entry.checksum.clone()];
        match ["tokens", "header checksum"].iter().zip(expected).zip(found).find(|((_, a), b)| a != b) {
            Some(((what, expected), found)) => {
                Err(shard.bad(format!("expected {what} {expected} as its manifest says, found {found}")))
            }
            None => Ok(shard),
        }
    }

    fn parse(path: &Path, map: Mmap, identity: Identity, vocab_size: usize) -> Result<Self, DataError> {
        let mut shard = Self { path: path.to_owned(), map, width: 0, tokens: 0, vocab_size, checked: Vec::new() };
        let found = shard.map.len();
        if found < HEADER || shard.map[..8] != MAGIC {
            return Err(
                shard.bad(format!("expected a header that begins with \"hadaltok\", found {found} other bytes"))
            );
        }
        let (version, width) = (shard.number(8, 4), shard.number(12, 4));
        if version != u64::from(VERSION) {
            return Err(shard.bad(format!("expected version {VERSION}, found {version}")));
        }
        let (tokens, block) = (shard.number(16, 8), shard.number(48, 8));
        let blocks = tokens.saturating_mul(width).div_ceil(BLOCK as u64);
        let expected = tokens.saturating_mul(width).saturating_add(blocks * 8).saturating_add(HEADER as u64);
        if ![2, 4].contains(&width) || block != BLOCK as u64 || expected != found as u64 {
            return Err(shard.bad(format!("expected {expected} bytes for {tokens} tokens, found {found}")));
        }
        let table = &shard.map[HEADER + (tokens * width) as usize..];
        let (expected, found) = (shard.number(HASHED, 8), head_hash(&shard.map[..HASHED], table));
        if expected != found {
            return Err(shard.bad(format!("header: expected checksum {expected:016x}, found {found:016x}")));
        }
        shard.owned_by(identity)?;
        (shard.width, shard.tokens) = (width as usize, tokens as usize);
        shard.checked = (0..blocks).map(|_| AtomicBool::new(false)).collect();
        Ok(shard)
    }

    fn owned_by(&self, identity: Identity) -> Result<(), DataError> {
        let (tokenizer, source) = (self.number(32, 8), self.number(40, 8));
        if tokenizer != identity.tokenizer {
            return Err(self.bad(format!(
                "expected tokens of tokenizer {:016x}, found those of tokenizer {tokenizer:016x}",
                identity.tokenizer
            )));
        }
        if source != identity.source {
            return Err(self.bad(format!(
                "expected tokens of source {:016x}, found those of source {source:016x}",
                identity.source
            )));
        }
        Ok(())
    }

    fn bad(&self, reason: String) -> DataError {
        DataError::Shard { path: self.path.clone(), reason }
    }

    fn number(&self, at: usize, bytes: usize) -> u64 {
        self.map[at..at + bytes].iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
    }

    /// Tokens in it.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Blocks in it.
    pub fn blocks(&self) -> usize {
        self.checked.len()
    }

    /// Checks block `i`, if nobody has before: its checksum, and that its ids are the tokenizer's.
    pub fn check(&self, i: usize) -> Result<(), DataError> {
        if self.checked[i].load(Ordering::Relaxed) {
            return Ok(());
        }
        let data = &self.map[HEADER..HEADER + self.tokens * self.width];
        let block = &data[i * BLOCK..data.len().min((i + 1) * BLOCK)];
        let (expected, found) = (self.number(HEADER + data.len() + i * 8, 8), xxh3_64(block));
        if expected != found {
            let blocks = self.blocks();
            return Err(
                self.bad(format!("block {i} of {blocks}: expected checksum {expected:016x}, found {found:016x}"))
            );
        }
        if let Some(id) = self.ids(block).find(|&id| id as usize >= self.vocab_size) {
            return Err(self.bad(format!("block {i}: expected ids below {}, found {id}", self.vocab_size)));
        }
        self.checked[i].store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Appends tokens `start..end` to `to`.
    pub fn read(&self, start: usize, end: usize, to: &mut Vec<u32>) -> Result<(), DataError> {
        let bytes = start * self.width..end * self.width;
        (bytes.start / BLOCK..bytes.end.div_ceil(BLOCK)).try_for_each(|i| self.check(i))?;
        to.extend(self.ids(&self.map[HEADER + bytes.start..HEADER + bytes.end]));
        Ok(())
    }

    fn ids<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
        let id = |b: &[u8]| b.iter().rev().fold(0, |n, &b| n << 8 | u32::from(b));
        bytes.chunks_exact(self.width).map(id)
    }
}
