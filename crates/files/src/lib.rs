//! Files that matter. Whatever a later run has to find whole goes through a [`Disk`]: written beside its place, flushed,
//! renamed. A killed process, a full disk or a power cut leaves the old or the new, or something whose name begins
//! with a dot, which nobody reads.
//!
//! A `Disk` counts its operations and can be told to fail or to die at one of them ([`Faults`]); tests go through every
//! operation of a save that way. This crate knows nothing of what it writes.

mod disk;
mod fault;
mod lock;
mod positioned;
mod staged;
#[cfg(test)]
mod tests;

pub use disk::{Disk, Output, Written, checksum};
pub use fault::{Fault, Faults};
pub use lock::Lock;
pub use positioned::Positioned;
pub use staged::Staged;

use std::path::{Path, PathBuf};

/// The operating system refused; one line.
#[derive(Debug, thiserror::Error)]
#[error("{}: {doing}: {why}", path.display())]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub doing: &'static str,
    /// What the system said.
    pub why: std::io::Error,
}

impl FileError {
    /// For `map_err`.
    pub fn new(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |why| Self { path: path.to_path_buf(), doing, why }
    }
}

/// The directory that `path` lies in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `.NAME.SUFFIX` beside `path`: a name that no reader takes for the finished thing.
fn hidden(path: &Path, suffix: &str) -> Result<PathBuf, FileError> {
    let Some(name) = path.file_name() else {
        let why = std::io::Error::new(std::io::ErrorKind::InvalidInput, "expected a path that ends in a name");
        return Err(FileError::new(path, "writing")(why));
    };
    Ok(path.with_file_name(format!(".{}.{suffix}", name.to_string_lossy())))
}
