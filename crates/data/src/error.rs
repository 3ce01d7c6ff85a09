//! What can be wrong with data that comes from outside: one line each, naming the path, the expected and the found.

use std::path::{Path, PathBuf};

/// An input that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file cannot be opened or read.
    #[error("{path}: cannot be read: {why}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        why: std::io::Error,
    },
    /// The named path is a device or a pipe: text is read more than once.
    #[error("{path}: expected a file, a folder or a glob, found something else", path = path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A glob without a file.
    #[error("{pattern}: expected a glob that matches a file, found none", pattern = pattern.display())]
    NoMatch {
        /// The glob.
        pattern: PathBuf,
    },
    /// A glob or an ignore rule that cannot be read.
    #[error("pattern \"{pattern}\": expected a glob as in .gitignore: {why}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong.
        why: String,
    },
    /// A folder that cannot be walked.
    #[error("{path}: cannot be walked: {why}", path = path.display())]
    Walk {
        /// The folder.
        path: PathBuf,
        /// What happened, with the path where it happened.
        why: String,
    },
    /// A setting that would change nothing.
    #[error("{key} has no effect: {why}")]
    NoEffect {
        /// The setting.
        key: &'static str,
        /// Why.
        why: &'static str,
    },
    /// A named file that is no text.
    #[error("{path}: expected text, found a NUL byte at byte offset {offset}", path = path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
    /// Files were looked at, and none has text.
    #[error("{origin}: expected files with text, found {found}")]
    NoText {
        /// The source.
        origin: String,
        /// What is there instead.
        found: String,
    },
    /// A JSON line without text.
    #[error("{path}:{line}: {reason}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// Expected and found.
        reason: String,
    },
    /// A file that somebody writes to.
    #[error("{path}: changed while it was being read", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A shard or a manifest that is not what was written.
    #[error("{path}: not a usable token shard: {reason} (remove {dir} to have it made again)",
        path = path.display(), dir = path.parent().unwrap_or(path).display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        reason: String,
    },
    /// Mixture weights that cannot be.
    #[error("source {name}: {reason}")]
    Mixture {
        /// The source.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// Somebody else writes there.
    #[error("{path}: expected to be alone, found it locked by {}",
        pid.map_or_else(|| "another process".into(), |n| format!("process {n}")), path = path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
        /// Its holder, where known.
        pid: Option<u32>,
    },
    /// A file of ours cannot be written.
    #[error(transparent)]
    File(#[from] hadal_files::FileError),
    /// The file is not UTF-8.
    #[error("{path}: expected UTF-8 text, found an invalid byte 0x{byte:02x} at byte offset {offset}", path = path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Where the first invalid sequence starts.
        offset: u64,
        /// The byte there.
        byte: u8,
    },
    /// The file has no text.
    #[error("{path}: expected text, found {bytes} bytes of nothing but white space", path = path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// No documents at all.
    #[error("the corpus is empty: expected at least one document, found none")]
    EmptyCorpus,
    /// Nothing could be held out for validation, or nothing would be left to train on.
    #[error(
        "the corpus is too short: expected at least 2 documents (files, or pieces of about 4 KiB that end at a blank \
         line), one to train on and one to hold out, found 1"
    )]
    OneDocument,
    /// The held-out fraction is not a proper fraction.
    #[error("held-out fraction: expected more than 0 and less than 1, found {0}")]
    Fraction(f64),
    /// The corpus is shorter than one training sequence.
    #[error("the corpus is shorter than one sequence: expected at least {expected} tokens, found {found}")]
    TooShort {
        /// Sequence length plus the last target.
        expected: u64,
        /// Tokens there are.
        found: u64,
    },
    /// A tokenizer file that is not one, or not one of our kind.
    #[error("{path}: not a usable tokenizer: {reason}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The vocabulary does not hold the byte alphabet and the special tokens.
    #[error("vocab_size: expected at least {expected} ids (256 bytes and the special tokens), found {found}")]
    VocabTooSmall {
        /// Fewest ids possible.
        expected: usize,
        /// Ids asked for.
        found: usize,
    },
    /// Whoever watched the text being tokenised asked for an end.
    #[error("stopped before all text was tokenised")]
    Stopped,
    /// Packing needs a token that ends a document.
    #[error("the tokenizer names no end-of-sentence token: expected eos_token in tokenizer_config.json")]
    NoEos,
}

impl DataError {
    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |why| Self::Read { path: path.to_owned(), why }
    }
}

/// Text from a file as messages show it: one line, of bounded length.
pub(crate) fn printable(text: &str) -> String {
    text.escape_debug().take(160).collect()
}
