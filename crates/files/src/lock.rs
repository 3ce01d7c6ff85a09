//! One writer a directory, as long as it lives.

use crate::FileError;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// An advisory lock on the file `.lock` of a directory. The system drops it when the process ends, however it ends; the
/// file stays and means nothing by itself.
#[derive(Debug)]
pub struct Lock {
    // Held for what closing it does.
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// The lock's file name.
    pub const NAME: &str = ".lock";

    /// Takes the lock of `dir`, or None if another process (or another part of this one) has it, with the number of
    /// that process if it could be read.
    pub fn take(dir: &Path) -> Result<Result<Self, Option<u32>>, FileError> {
        let path = dir.join(Self::NAME);
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open().map_err(FileError::new(&path, "creating the lock"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // Who holds it is a courtesy; that it is held is certain.
                let _ = file.read_to_string(&mut text);
                return Ok(Err(text.trim().parse().ok()));
            }
            Err(TryLockError::Error(e)) => return Err(FileError::new(&path, "locking")(e)),
        }
        let tell = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        // On a full disk the lock holds without the number.
        let _ = tell(&mut file);
        Ok(Ok(Self { _file: file, path }))
    }

    /// The lock's file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
