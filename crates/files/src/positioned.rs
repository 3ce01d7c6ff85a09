//! A file written out of order, by several workers at once.

use crate::fault::Takes;
use crate::{Disk, FileError};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A new file whose pieces are written at their places. What is not written reads as zeros and takes no room where the
/// file system has holes.
#[derive(Debug)]
pub struct Positioned {
    disk: Disk,
    file: File,
    path: PathBuf,
}

impl Disk {
    /// Creates a file to be written by position. An existing one is an error.
    pub fn positioned(&self, path: &Path) -> Result<Positioned, FileError> {
        let file = self.op(Takes::Room, || (), || File::create_new(path)).map_err(FileError::new(path, "creating"))?;
        Ok(Positioned { disk: self.clone(), file, path: path.to_path_buf() })
    }
}

impl Positioned {
    /// Makes it this long.
    pub fn set_len(&self, bytes: u64) -> Result<(), FileError> {
        self.op(|| (), || self.file.set_len(bytes))
    }

    /// Writes all of `bytes`, the first of them at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), FileError> {
        let half = || {
            let _ = write_at(&self.file, &bytes[..bytes.len() / 2], offset); // A planned death.
        };
        self.op(half, || write_at(&self.file, bytes, offset))
    }

    /// Flushes it to the disk.
    pub fn finish(self) -> Result<(), FileError> {
        self.op(|| (), || self.file.sync_all())
    }

    fn op(&self, half: impl FnOnce(), f: impl FnOnce() -> std::io::Result<()>) -> Result<(), FileError> {
        self.disk.op(Takes::Room, half, f).map_err(FileError::new(&self.path, "writing"))
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            n => (bytes, offset) = (&bytes[n..], offset + n as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fault, Faults};
    use std::sync::Arc;

    fn write(disk: &Disk, path: &Path) -> Result<(), FileError> {
        let file = disk.positioned(path)?;
        file.set_len(10)?;
        file.write_at(b"end", 7)?;
        file.write_at(b"begin", 0)?;
        file.finish()
    }

    #[test]
    fn pieces_in_any_order() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        write(&Disk::new(), &path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"begin\0\0end");
        assert!(Disk::new().positioned(&path).is_err());
    }

    /// Creating, setting the length, two pieces, flushing.
    #[test]
    fn every_operation_may_fail() {
        for at in 0..5 {
            let root = tempfile::tempdir().unwrap();
            let faults = Arc::new(Faults::at(at, Fault::Full));
            let error = write(&Disk::with(faults.clone()), &root.path().join("a")).unwrap_err();
            assert!(error.why.kind() == std::io::ErrorKind::StorageFull && faults.count() == at + 1, "{error}");
        }
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        assert!(write(&Disk::with(Arc::new(Faults::at(3, Fault::Death))), &path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"be\0\0\0\0\0end");
    }
}
