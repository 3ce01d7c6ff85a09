//! A directory that appears whole or not at all.

use crate::{Disk, FileError, hidden};
use std::path::{Path, PathBuf};

/// A directory being written under the name `.NAME.partial`; removed unless committed.
pub struct Staged {
    disk: Disk,
    path: PathBuf,
    target: PathBuf,
    done: bool,
}

impl Staged {
    /// Begins `target`, which must not exist (or be an empty directory) when it is committed. What an interrupted
    /// writer of the same name left is removed.
    pub fn begin(disk: &Disk, target: &Path) -> Result<Self, FileError> {
        let path = Self::place(target)?;
        disk.discard(&path)?;
        disk.create_dir(&path)?;
        Ok(Self { disk: disk.clone(), path, target: target.to_path_buf(), done: false })
    }

    /// Where `target` is written until it is committed.
    pub fn place(target: &Path) -> Result<PathBuf, FileError> {
        hidden(target, "partial")
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What writes.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Gives the directory its name. Files in it must have been flushed ([`Disk::write_new`] does).
    pub fn commit(mut self) -> Result<(), FileError> {
        self.disk.sync_dir(&self.path)?;
        self.disk.rename(&self.path, &self.target)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.done {
            // The error that led here is the one to report; the next writer removes what stays.
            let _ = self.disk.discard(&self.path);
        }
    }
}
