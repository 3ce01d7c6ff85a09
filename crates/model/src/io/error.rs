//! What can be wrong with files. Every message is one line: path, tensor, what was expected, what was found.

use crate::config::ConfigError;
use std::path::{Path, PathBuf};

/// A checkpoint that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The operating system refused.
    #[error("{}: {doing}: {why}", path.display())]
    System {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        why: std::io::Error,
    },
    /// The file is not what its name says: a damaged header, a truncated file, a broken index.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the format demands.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor of the wrong shape or dtype.
    #[error("{}: {tensor}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the configuration demands.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Tensors that the configuration demands and no file holds.
    #[error("{}: {missing} of {wanted} tensors are missing, the first is {first}", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
        /// How many are missing.
        missing: usize,
        /// How many were wanted.
        wanted: usize,
        /// The first one's name.
        first: String,
    },
    /// The directory to be written is already there and holds something.
    #[error("{}: expected a path that does not exist yet, found {found}", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// Another process is writing the same directory.
    #[error("{}: expected a directory that no other process writes, found {} writing it", path.display(), who(*holder))]
    Held {
        /// The directory.
        path: PathBuf,
        /// Number of that process, if it is known.
        holder: Option<u32>,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl From<hadal_files::FileError> for IoError {
    fn from(e: hadal_files::FileError) -> Self {
        Self::System { path: e.path, doing: e.doing, why: e.why }
    }
}

impl IoError {
    pub(super) fn system(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |why| Self::System { path: path.to_path_buf(), doing, why }
    }

    pub(super) fn format(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), expected: expected.into(), found: found.into() }
    }

    pub(super) fn tensor(path: &Path, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        let (expected, found) = (expected.into(), found.into());
        Self::Tensor { path: path.to_path_buf(), tensor: printable(tensor), expected, found }
    }
}

fn who(holder: Option<u32>) -> String {
    holder.map_or("another".into(), |id| format!("process {id}"))
}

/// A name from a file as messages show it: one line, of bounded length.
pub(super) fn printable(name: &str) -> String {
    name.escape_debug().take(160).collect()
}
