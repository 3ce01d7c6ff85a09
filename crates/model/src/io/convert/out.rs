//! A safetensors file written out of order by several workers, in which stretches of zeros are holes.

use super::unit::{Places, Tensor, Unit, width};
use crate::io::IoError;
use crate::io::save::header;
use safetensors::tensor::TensorInfo;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Zeros are left out in stretches of at most this many bytes, on multiples of it: whole pages of every file system.
const STRETCH: u64 = 1 << 16;

/// The file: its length is set and all of it zeros until something is written.
pub(super) struct Sparse {
    file: File,
    path: PathBuf,
}

impl Sparse {
    /// Creates the file of these units and writes its header. Beside it: where each unit's bytes go.
    pub(super) fn create(path: &Path, units: &[Unit<'_>]) -> Result<(Self, Vec<Places>), IoError> {
        let mut tensors: Vec<(usize, usize, Tensor)> = units
            .iter()
            .enumerate()
            .flat_map(|(u, unit)| unit.tensors().enumerate().map(move |(i, t)| (u, i, t)))
            .collect();
        // Wide elements first, so that every tensor is aligned to its own.
        tensors.sort_by_key(|(_, _, t)| std::cmp::Reverse(width(t.dtype)));
        let mut places = vec![[0; 2]; units.len()];
        let mut at = 0;
        let mut entries = Vec::with_capacity(tensors.len());
        for (unit, i, t) in tensors {
            let end = at + t.bytes();
            places[unit][i] = at as u64;
            entries.push((t.name, TensorInfo { dtype: t.dtype, shape: t.shape, data_offsets: (at, end) }));
            at = end;
        }
        let create = || {
            let header = header(entries)?;
            let file = File::create_new(path)?;
            file.set_len((header.len() + at) as u64)?;
            write_at(&file, &header, 0)?;
            Ok((file, header.len() as u64))
        };
        let (file, data) = create().map_err(IoError::system(path, "writing"))?;
        places.iter_mut().flatten().for_each(|place| *place += data);
        Ok((Self { file, path: path.to_path_buf() }, places))
    }

    /// Writes `bytes` at their place, but for zeros, which are there already.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), IoError> {
        let (mut bytes, mut at) = (bytes, at);
        while !bytes.is_empty() {
            let n = bytes.len().min((STRETCH - at % STRETCH) as usize);
            let (part, rest) = bytes.split_at(n);
            // Without an early end, so that it vectorises.
            if part.iter().fold(0, |any, b| any | b) != 0 {
                write_at(&self.file, part, at).map_err(IoError::system(&self.path, "writing"))?;
            }
            (bytes, at) = (rest, at + n as u64);
        }
        Ok(())
    }

    /// Flushes it to the disk.
    pub(super) fn sync(self) -> Result<(), IoError> {
        self.file.sync_all().map_err(IoError::system(&self.path, "flushing"))
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
fn write_at(file: &File, mut bytes: &[u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            n => (bytes, at) = (&bytes[n..], at + n as u64),
        }
    }
    Ok(())
}
