//! Tokenising a source into its directory.

use std::ops::ControlFlow;
use std::path::Path;

use hadal_files::{Disk, Staged};
use rayon::prelude::*;

use super::{Identity, MANIFEST, Manifest, SHARD_TOKENS, ShardEntry, SideEntry, VERSION, file, hex};
use crate::corpus::Survey;
use crate::pack::Sides;
use crate::{DataError, Tokenizer};

/// Text that is tokenised at once, on all threads.
const BATCH: usize = 4 << 20;
/// Held-out documents whose beginnings are kept, and how much of each.
const BEGINNINGS: u64 = 5;
const BEGINNING_CHARS: usize = 24;

/// Runs a closure where its parallel loops find their threads.
pub type Pool<'a> = &'a dyn Fn(&mut (dyn FnMut() + Send));

/// Is told the bytes of text done, and says whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What to tokenise.
pub struct Job<'a> {
    /// The source's name.
    pub name: &'a str,
    /// Its documents.
    pub survey: &'a Survey,
    /// Their split.
    pub sides: &'a Sides,
    /// Makes tokens.
    pub tokenizer: &'a Tokenizer,
    /// What the tokens will be known by.
    pub identity: Identity,
}

/// Tokenises a source into a new directory below `root`, which appears when it is whole. The result does not depend on
/// the number of threads. `progress` is told the bytes of text done, and can end it with [`DataError::Stopped`].
pub fn tokenise(
    disk: &Disk,
    root: &Path,
    job: &Job<'_>,
    pool: Pool<'_>,
    progress: Progress<'_>,
) -> Result<(), DataError> {
    store(disk, root, job, pool, progress, SHARD_TOKENS)
}

pub(super) fn store(
    disk: &Disk,
    root: &Path,
    job: &Job<'_>,
    pool: Pool<'_>,
    progress: Progress<'_>,
    shard_tokens: usize,
) -> Result<(), DataError> {
    let target = root.join(job.identity.directory(job.name));
    if target.exists() {
        disk.remove_dir(&target)?; // Without a manifest, or nobody would ask for it to be made.
    }
    let staged = Staged::begin(disk, &target)?;
    let mut writer = Writer::new(&staged, job, shard_tokens)?;
    let (mut batch, mut bytes, mut done) = (Vec::new(), 0, 0);
    job.survey.each(|index, text| {
        bytes += text.len();
        batch.push((job.sides.held(index), text.to_owned()));
        if bytes >= BATCH {
            writer.add(&batch, pool)?;
            batch.clear();
            done += std::mem::take(&mut bytes) as u64;
            if progress(done).is_break() {
                return Err(DataError::Stopped);
            }
        }
        Ok(())
    })?;
    writer.add(&batch, pool)?;
    let manifest = writer.finish()?;
    let text = serde_json::to_vec_pretty(&manifest).expect("plain strings and numbers have a JSON form");
    disk.replace(&staged.path().join(MANIFEST), &text)?;
    staged.commit()?;
    // All is done: there is nothing left to stop.
    let _ = progress(job.survey.text_bytes());
    Ok(())
}

/// Removes from `root` what interrupted calls of [`tokenise`] left, and nothing else: the directory may be the user's.
/// For whoever holds its lock.
pub fn sweep(disk: &Disk, root: &Path) -> Result<(), DataError> {
    let hash = |digits: &str| digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    Ok(disk.sweep_named(root, |name| name.rsplit_once('-').is_some_and(|(_, digits)| hash(digits)))?)
}

struct Writer<'a> {
    job: &'a Job<'a>,
    eos: u32,
    train: SideWriter<'a>,
    valid: SideWriter<'a>,
    beginnings: Vec<String>,
}

impl<'a> Writer<'a> {
    fn new(staged: &'a Staged, job: &'a Job<'a>, shard_tokens: usize) -> Result<Self, DataError> {
        let eos = job.tokenizer.eos().ok_or(DataError::NoEos)?;
        let side = |name| SideWriter {
            name,
            staged,
            identity: job.identity,
            lengths: job.tokenizer.token_byte_lengths(),
            shard_tokens,
            waiting: Vec::new(),
            entry: SideEntry::default(),
        };
        Ok(Self { job, eos, train: side("train"), valid: side("valid"), beginnings: Vec::new() })
    }

    /// Documents with whether they are held out.
    fn add(&mut self, batch: &[(bool, String)], pool: Pool<'_>) -> Result<(), DataError> {
        let mut encoded = Vec::new();
        pool(&mut || encoded = batch.par_iter().map(|(_, text)| self.job.tokenizer.encode(text)).collect());
        for ((held, text), tokens) in batch.iter().zip(encoded) {
            let side = if *held { &mut self.valid } else { &mut self.train };
            let spread = self.job.sides.held_count().div_ceil(BEGINNINGS);
            if *held && side.entry.documents.is_multiple_of(spread) {
                self.beginnings.push(text.trim_start().chars().take(BEGINNING_CHARS).collect());
            }
            side.document(&tokens, self.eos, text.len() as u64)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Manifest, DataError> {
        let Identity { tokenizer, source } = self.job.identity;
        Ok(Manifest {
            version: VERSION,
            source: self.job.name.to_owned(),
            tokenizer: hex(tokenizer),
            fingerprint: hex(source),
            train: self.train.finish()?,
            valid: self.valid.finish()?,
            beginnings: self.beginnings,
        })
    }
}

struct SideWriter<'a> {
    name: &'static str,
    staged: &'a Staged,
    identity: Identity,
    lengths: Vec<u32>,
    shard_tokens: usize,
    waiting: Vec<u32>,
    entry: SideEntry,
}

impl SideWriter<'_> {
    fn document(&mut self, tokens: &[u32], eos: u32, bytes: u64) -> Result<(), DataError> {
        self.waiting.extend(tokens);
        self.waiting.push(eos);
        self.entry.documents += 1;
        self.entry.tokens += tokens.len() as u64 + 1;
        self.entry.bytes += bytes;
        while self.waiting.len() >= self.shard_tokens {
            self.shard(self.shard_tokens)?;
        }
        Ok(())
    }

    /// Writes the first `count` tokens that wait.
    fn shard(&mut self, count: usize) -> Result<(), DataError> {
        let name = format!("{}-{:05}.tokens", self.name, self.entry.shards.len());
        let tokens = &self.waiting[..count];
        let bytes = tokens.iter().map(|&t| u64::from(self.lengths[t as usize])).sum();
        let width = file::width(self.lengths.len());
        let path = self.staged.path().join(&name);
        let checksum = file::write(self.staged.disk(), &path, tokens, width, bytes, self.identity)?;
        self.entry.shards.push(ShardEntry { file: name, tokens: count as u64, checksum: hex(checksum) });
        self.waiting.drain(..count);
        Ok(())
    }

    fn finish(mut self) -> Result<SideEntry, DataError> {
        if !self.waiting.is_empty() {
            self.shard(self.waiting.len())?;
        }
        Ok(self.entry)
    }
}
