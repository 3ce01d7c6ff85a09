//! What a source holds: every file is read once before anything is made of it, so that bad input is known at once, and
//! so that tokens made of it can be known again by its content.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::find::{Found, find};
use super::read::{Reading, Tally};
use super::{Files, Format, Source, builtin};
use crate::DataError;
use crate::pack::Sides;

/// A source whose files have been read.
pub struct Survey {
    parts: Parts,
    documents: u64,
    text_bytes: u64,
    skipped: Skipped,
    fingerprint: u64,
}

enum Parts {
    Generated(Vec<String>),
    Files(Vec<Part>),
}

struct Part {
    path: PathBuf,
    reading: Reading,
    tally: Tally,
}

/// What was left out or changed; displayed as a list, empty if there is nothing to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Files in folders that have NUL bytes.
    pub binary: u64,
    /// Files in folders without text.
    pub empty: u64,
    /// Places where U+FFFD stands for invalid UTF-8.
    pub replaced: u64,
    /// Documents left out for invalid UTF-8.
    pub dropped: u64,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = [
            (self.binary, "binary files left out"),
            (self.empty, "files without text left out"),
            (self.replaced, "places with invalid UTF-8 replaced"),
            (self.dropped, "documents with invalid UTF-8 left out"),
        ];
        let told: Vec<String> = all.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        f.write_str(&told.join(", "))
    }
}

impl Survey {
    /// Reads all of `source`, files in parallel on the current rayon pool.
    pub fn new(source: &Source) -> Result<Self, DataError> {
        match source {
            Source::Builtin { seed, bytes } => Ok(Self::generated(*seed, *bytes)),
            Source::Files(files) => Self::files(files, source),
        }
    }

    fn generated(seed: u64, bytes: usize) -> Self {
        let documents = builtin::documents(seed, bytes);
        let mut hash = Xxh3::new();
        documents.iter().for_each(|d| add(&mut hash, d.as_bytes()));
        Self {
            documents: documents.len() as u64,
            text_bytes: documents.iter().map(|d| d.len() as u64).sum(),
            skipped: Skipped::default(),
            fingerprint: hash.digest(),
            parts: Parts::Generated(documents),
        }
    }

    fn files(files: &Files, source: &Source) -> Result<Self, DataError> {
        let found = find(files)?;
        // Collected before the first error is taken, so that it does not depend on which thread was first.
        let read: Vec<Result<_, DataError>> = found.par_iter().map(|f| survey_file(f, files)).collect();
        let (mut parts, mut skipped, mut hash) = (Vec::new(), Skipped::default(), Xxh3::new());
        for (found, read) in found.into_iter().zip(read) {
            let Some((reading, tally)) = read? else {
                skipped.binary += 1;
                continue;
            };
            skipped.replaced += tally.replaced;
            skipped.dropped += tally.dropped;
            skipped.empty += u64::from(tally.documents + tally.dropped == 0);
            add(&mut hash, reading.fingerprint().as_bytes());
            hash.update(&tally.hash.to_le_bytes());
            parts.push(Part { path: found.path, reading, tally });
        }
        if files.field.is_some() && parts.iter().all(|p| p.reading.format() == Format::Text) {
            return Err(DataError::NoEffect { key: "field", why: "no file is read as JSON lines" });
        }
        let sum = |f: fn(&Tally) -> u64| parts.iter().map(|p| f(&p.tally)).sum::<u64>();
        let (documents, text_bytes) = (sum(|t| t.documents), sum(|t| t.text_bytes));
        if documents == 0 {
            let rest = if skipped == Skipped::default() { String::new() } else { format!(": {skipped}") };
            return Err(DataError::NoText { origin: source.describe(), found: format!("none{rest}") });
        }
        Ok(Self { documents, text_bytes, skipped, fingerprint: hash.digest(), parts: Parts::Files(parts) })
    }

    /// Documents there are.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// Their bytes.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// What was left out.
    pub fn skipped(&self) -> Skipped {
        self.skipped
    }

    /// A hash of what the documents are: the contents of the files in their order and how they are read, not their
    /// names or dates.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Gives all documents with their numbers to `f`, one at a time, in order. A file that is no longer what it was at
    /// the survey is an error.
    pub fn each(&self, mut f: impl FnMut(u64, &str) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut index = 0;
        let mut numbered = |text: &str| {
            f(index, text)?;
            index += 1;
            Ok(())
        };
        match &self.parts {
            Parts::Generated(documents) => documents.iter().try_for_each(|d| numbered(d)),
            Parts::Files(parts) => parts.iter().try_for_each(|part| {
                if part.reading.documents(&part.path, &mut numbered)? == part.tally {
                    return Ok(());
                }
                Err(DataError::Changed { path: part.path.clone() })
            }),
        }
    }
}

/// With its length, so that what is where cannot shift unseen.
fn add(hash: &mut Xxh3, bytes: &[u8]) {
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// How a file is read and what is in it; None for a binary file that nobody named.
fn survey_file(found: &Found, files: &Files) -> Result<Option<(Reading, Tally)>, DataError> {
    let path = &found.path;
    let (bytes, nul) = scan(path).map_err(DataError::read(path))?;
    match nul {
        Some(offset) if found.named => return Err(DataError::Binary { path: path.clone(), offset }),
        Some(_) => return Ok(None),
        None => {}
    }
    let reading = Reading::new(files, path);
    let tally = reading.documents(path, &mut |_| Ok(()))?;
    if found.named && tally.documents + tally.dropped == 0 {
        return Err(DataError::EmptyFile { path: path.clone(), bytes });
    }
    Ok(Some((reading, tally)))
}

/// A file's size and its first NUL byte, with which it is taken for no text.
fn scan(path: &Path) -> std::io::Result<(u64, Option<u64>)> {
    let mut file = File::open(path)?;
    let (mut piece, mut at) = (vec![0; 1 << 18], 0);
    loop {
        let n = file.read(&mut piece)?;
        if n == 0 {
            return Ok((at, None));
        }
        if let Some(i) = piece[..n].iter().position(|&b| b == 0) {
            return Ok((at, Some(at + i as u64)));
        }
        at += n as u64;
    }
}

/// Documents to train a tokenizer on, without held-out ones. If all documents together have at most `bound` bytes, all
/// are taken. Of more, about `bound` bytes are: each document is chosen or not by its content, so that the chosen ones
/// are spread over everything. Mixture weights do not count.
pub fn sample(sources: &[(&Survey, Option<&Sides>)], bound: u64) -> Result<Vec<String>, DataError> {
    let total: u64 = sources.iter().map(|(survey, _)| survey.text_bytes).sum();
    let share = (u128::from(bound) << 64) / u128::from(total.max(1));
    let (mut taken, mut bytes) = (Vec::new(), 0);
    for (survey, sides) in sources {
        survey.each(|index, text| {
            let chosen = total <= bound || (u128::from(xxh3_64(text.as_bytes())) < share && bytes < bound);
            if chosen && !sides.is_some_and(|s| s.held(index)) {
                bytes += text.len() as u64;
                taken.push(text.to_owned());
            }
            Ok(())
        })?;
    }
    Ok(taken)
}
