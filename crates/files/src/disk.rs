//! Operations that change what is on the disk, one by one.

use crate::fault::{Faults, Takes, Verdict};
use crate::{FileError, hidden, parent};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// A handle to the file system. Clones share their faults.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    faults: Option<Arc<Faults>>,
}

/// What a finished file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub bytes: u64,
    /// XXH3 (64 bits) of them.
    pub xxh3: u64,
}

/// A file being written.
pub struct Output {
    disk: Disk,
    file: File,
    hash: Xxh3,
    bytes: u64,
    /// Written, not yet handed to the system: small pieces go in one call.
    pending: Vec<u8>,
}

/// Bytes that wait for a call.
const PENDING: usize = 1 << 20;

impl Disk {
    /// The real file system.
    pub fn new() -> Self {
        Self::default()
    }

    /// The real file system, with one planned fault.
    pub fn with(faults: Arc<Faults>) -> Self {
        Self { faults: Some(faults) }
    }

    /// Runs `f` unless a fault is planned here; `half` is what a planned death lets happen.
    pub(crate) fn op<T>(
        &self,
        takes: Takes,
        half: impl FnOnce(),
        f: impl FnOnce() -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        match self.faults.as_ref().map_or(Verdict::Proceed, |faults| faults.verdict(takes)) {
            Verdict::Proceed => f(),
            Verdict::Fail(e) => Err(e),
            Verdict::Half => {
                half();
                Err(std::io::Error::other("dead"))
            }
        }
    }

    /// Writes a new file through `f` and flushes it to the disk. An existing file is an error.
    pub fn write_new(
        &self,
        path: &Path,
        f: impl FnOnce(&mut Output) -> std::io::Result<()>,
    ) -> Result<Written, FileError> {
        let write = || {
            let file = self.op(Takes::Room, || (), || File::create_new(path))?;
            let mut out = Output { disk: self.clone(), file, hash: Xxh3::new(), bytes: 0, pending: Vec::new() };
            f(&mut out)?;
            out.flush()?;
            self.op(Takes::Room, || (), || out.file.sync_all())?;
            Ok(Written { bytes: out.bytes, xxh3: out.hash.digest() })
        };
        write().map_err(FileError::new(path, "writing"))
    }

    /// Writes one file beside its place, flushes it and renames it: whole or not there. An existing file is replaced.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), FileError> {
        let partial = hidden(path, "partial")?;
        self.forget(&partial);
        let written = self.write_new(&partial, |out| out.write_all(bytes)).and_then(|_| self.rename(&partial, path));
        if written.is_err() {
            self.forget(&partial);
        }
        written
    }

    /// Removes what an interrupted or failed writer left, if anything; should it stay, making it anew says so.
    fn forget(&self, partial: &Path) {
        let _ = self.op(Takes::Nothing, || (), || std::fs::remove_file(partial));
    }

    /// Makes a directory and those above it.
    pub fn create_dir(&self, path: &Path) -> Result<(), FileError> {
        self.op(Takes::Room, || (), || std::fs::create_dir_all(path)).map_err(FileError::new(path, "creating"))
    }

    /// Gives a file or directory its final name, replacing a file of that name, and makes the name durable.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), FileError> {
        self.op(Takes::Nothing, || (), || std::fs::rename(from, to))
            .map_err(FileError::new(to, "renaming into place"))?;
        self.sync_dir(parent(to))
    }

    /// Replaces `path` by a link to its sibling `name`; where links need privileges, by a file that holds the name.
    pub fn point(&self, path: &Path, name: &str) -> Result<(), FileError> {
        if cfg!(not(unix)) {
            return self.replace(path, name.as_bytes());
        }
        let partial = hidden(path, "partial")?;
        self.forget(&partial);
        self.op(Takes::Room, || (), || symlink(name, &partial)).map_err(FileError::new(&partial, "linking"))?;
        self.rename(&partial, path)
    }

    /// Removes a directory and all in it. It is renamed first: what a killed removal leaves begins with a dot.
    pub fn remove_dir(&self, path: &Path) -> Result<(), FileError> {
        let doomed = hidden(path, "removed")?;
        self.discard(&doomed)?;
        self.op(Takes::Nothing, || (), || std::fs::rename(path, &doomed)).map_err(FileError::new(path, "removing"))?;
        self.discard(&doomed)
    }

    /// Removes from `dir` what interrupted writers and removals left in it. For whoever alone writes there.
    pub fn sweep(&self, dir: &Path) -> Result<(), FileError> {
        self.sweep_named(dir, |_| true)
    }

    /// As [`Disk::sweep`], only of files and directories whose finished names are `ours`.
    pub fn sweep_named(&self, dir: &Path, ours: impl Fn(&str) -> bool) -> Result<(), FileError> {
        for entry in std::fs::read_dir(dir).map_err(FileError::new(dir, "listing"))? {
            let path = entry.map_err(FileError::new(dir, "listing"))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let hidden = name.strip_prefix('.');
            let finished = hidden.and_then(|n| n.strip_suffix(".partial").or(n.strip_suffix(".removed")));
            if !finished.is_some_and(&ours) {
                continue;
            }
            match path.is_dir() && !path.is_symlink() {
                true => self.discard(&path)?,
                false => self
                    .op(Takes::Nothing, || (), || std::fs::remove_file(&path))
                    .map_err(FileError::new(&path, "removing"))?,
            }
        }
        Ok(())
    }

    /// Removes a directory whose name says that it is nothing, if it is there.
    pub(crate) fn discard(&self, path: &Path) -> Result<(), FileError> {
        if !path.exists() {
            return Ok(());
        }
        let first = || {
            if let Some(entry) = std::fs::read_dir(path).ok().and_then(|mut entries| entries.next()?.ok()) {
                let _ = std::fs::remove_file(entry.path()); // A planned death.
            }
        };
        self.op(Takes::Nothing, first, || std::fs::remove_dir_all(path)).map_err(FileError::new(path, "removing"))
    }

    /// Makes the names in a directory durable. Windows has no such call and needs none.
    pub fn sync_dir(&self, path: &Path) -> Result<(), FileError> {
        if cfg!(unix) {
            let sync = || File::open(path)?.sync_all();
            self.op(Takes::Nothing, || (), sync).map_err(FileError::new(path, "flushing"))?;
        }
        Ok(())
    }
}

#[cfg(unix)]
fn symlink(name: &str, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(name, path)
}

#[cfg(not(unix))]
fn symlink(_: &str, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

impl Output {
    /// Hands bytes to the system.
    fn put(&self, bytes: &[u8]) -> std::io::Result<()> {
        let mut file = &self.file;
        let half = || {
            let mut file = &self.file;
            let _ = file.write_all(&bytes[..bytes.len() / 2]); // A planned death.
        };
        self.disk.op(Takes::Room, half, || file.write_all(bytes))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.pending.len() + bytes.len() > PENDING {
            self.flush()?;
        }
        match bytes.len() < PENDING {
            true => self.pending.extend_from_slice(bytes),
            false => self.put(bytes)?,
        }
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if !self.pending.is_empty() {
            self.put(&self.pending)?;
            self.pending.clear();
        }
        Ok(())
    }
}

/// Size and XXH3 of a file as it is on the disk, to compare with what [`Disk::write_new`] returned.
pub fn checksum(path: &Path) -> Result<Written, FileError> {
    let read = || {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes, mut piece) = (Xxh3::new(), 0u64, vec![0; 1 << 18]);
        loop {
            match std::io::Read::read(&mut file, &mut piece)? {
                0 => return Ok(Written { bytes, xxh3: hash.digest() }),
                n => {
                    hash.update(&piece[..n]);
                    bytes += n as u64;
                }
            }
        }
    };
    read().map_err(FileError::new(path, "reading"))
}
