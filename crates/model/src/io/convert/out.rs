//! A safetensors file written out of order by several workers, in which stretches of zeros are holes.

use super::unit::{Places, Tensor, Unit, width};
use crate::io::IoError;
use crate::io::save::header;
use hadal_files::{Disk, Positioned};
use safetensors::tensor::TensorInfo;
use std::path::Path;

/// Zeros are left out in stretches of at most this many bytes, on multiples of it: whole pages of every file system.
const STRETCH: u64 = 1 << 16;

/// The file: its length is set and all of it zeros until something is written.
pub(super) struct Sparse(Positioned);

impl Sparse {
    /// Creates the file of these units and writes its header. Beside it: where each unit's bytes go.
    pub(super) fn create(disk: &Disk, path: &Path, units: &[Unit<'_>]) -> Result<(Self, Vec<Places>), IoError> {
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
        let header = header(entries).map_err(IoError::system(path, "writing"))?;
        let file = disk.positioned(path)?;
        file.set_len((header.len() + at) as u64)?;
        file.write_at(&header, 0)?;
        places.iter_mut().flatten().for_each(|place| *place += header.len() as u64);
        Ok((Self(file), places))
    }

    /// Writes `bytes` at their place, but for zeros, which are there already.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<(), IoError> {
        let (mut bytes, mut at) = (bytes, at);
        while !bytes.is_empty() {
            let n = bytes.len().min((STRETCH - at % STRETCH) as usize);
            let (part, rest) = bytes.split_at(n);
            // Without an early end, so that it vectorises.
            if part.iter().fold(0, |any, b| any | b) != 0 {
                self.0.write_at(part, at)?;
            }
            (bytes, at) = (rest, at + n as u64);
        }
        Ok(())
    }

    /// Flushes it to the disk.
    pub(super) fn finish(self) -> Result<(), IoError> {
        Ok(self.0.finish()?)
    }
}
