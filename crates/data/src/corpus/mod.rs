//! Documents: from files, or from our generator. A [`Source`] says where they are; surveying it reads everything once,
//! and says what is there before anything is made of it; its documents are then read as often as needed, one at a time.

pub mod builtin;
mod cut;
mod find;
mod lines;
mod read;
mod survey;
#[cfg(test)]
mod tests;

pub use survey::{Skipped, Survey, sample};

use std::path::PathBuf;

/// Where documents come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The generated corpus.
    Builtin {
        /// Its seed.
        seed: u64,
        /// Its size.
        bytes: usize,
    },
    /// Files of the user.
    Files(Files),
}

/// Which files, and how to read them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Files {
    /// Files, folders, globs (`*`, `?`, `[ab]`, `{a,b}`, `**`).
    pub paths: Vec<PathBuf>,
    /// What to leave out of folders and globs, as lines of a .gitignore at their root.
    pub ignore: Vec<String>,
    /// Of all files; without it by extension: .jsonl and .ndjson are JSON lines, all else is text.
    pub format: Option<Format>,
    /// The key that holds the text of a JSON line; "text" if not said.
    pub field: Option<String>,
    /// What to do about bytes that are not UTF-8.
    pub invalid: InvalidUtf8,
}

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Plain text, cut at blank lines into documents of about 4 KiB.
    Text,
    /// A JSON object a line, each a document.
    Jsonl,
}

/// What to do about bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InvalidUtf8 {
    /// Refuse the file.
    #[default]
    Error,
    /// Put U+FFFD in their place, as `String::from_utf8_lossy` does.
    Replace,
    /// Leave out the document they are in.
    Skip,
}

impl Source {
    /// The source as messages name it.
    pub fn describe(&self) -> String {
        match self {
            Self::Builtin { .. } => "built-in corpus".into(),
            Self::Files(files) => match files.paths.as_slice() {
                [] => "no files".into(),
                [one] => one.display().to_string(),
                [first, rest @ ..] => format!("{} and {} more", first.display(), rest.len()),
            },
        }
    }
}
