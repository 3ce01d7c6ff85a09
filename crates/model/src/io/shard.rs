//! One safetensors file: 8 bytes of header length (little-endian), a JSON header of names, dtypes, shapes and offsets,
//! then the data.

use super::IoError;
use super::error::printable;
use hadal_kernels::{Elem, bf16};
use hadal_numerics::ue8m0;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The format's own limit on headers.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes read at once: within a core's cache.
const PIECE: usize = 1 << 18;

/// An open file, its header checked against its size.
pub(super) struct Shard {
    pub(super) path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the data begins.
    data: u64,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard({})", self.path.display())
    }
}

impl Shard {
    pub(super) fn open(path: PathBuf) -> Result<Self, IoError> {
        let mut file = File::open(&path).map_err(IoError::system(&path, "opening"))?;
        let size = file.metadata().map_err(IoError::system(&path, "reading its size"))?.len();
        let bad = |expected: String, found: String| IoError::format(&path, expected, found);
        let mut length = [0u8; 8];
        if size < 8 {
            return Err(bad("a safetensors file of at least 8 bytes".into(), format!("{size} bytes")));
        }
        file.read_exact(&mut length).map_err(IoError::system(&path, "reading its header"))?;
        let length = u64::from_le_bytes(length);
        let room = (size - 8).min(MAX_HEADER);
        if length > room {
            return Err(bad(format!("a safetensors header of at most {room} bytes"), format!("{length} bytes")));
        }
        let mut text = vec![0u8; length as usize];
        file.read_exact(&mut text).map_err(IoError::system(&path, "reading its header"))?;
        let header: Metadata =
            serde_json::from_slice(&text).map_err(|e| bad("a safetensors header".into(), printable(&e.to_string())))?;
        let (data, end) = (8 + length, header.data_len() as u64);
        if data.checked_add(end) != Some(size) {
            return Err(bad(format!("{end} bytes of data after the header"), format!("{} bytes", size - data)));
        }
        Ok(Self { path, file, header, data })
    }

    pub(super) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// Names in the order of the file.
    pub(super) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// Reads elements `first .. first + out.len()` of a tensor of floats or scales of this file, widened. One that is not
    /// finite is an error: no model gives an answer with it.
    pub(super) fn read(&self, name: &str, tensor: &TensorInfo, first: usize, out: &mut [f32]) -> Result<(), IoError> {
        let width = tensor.dtype.bitsize() / 8;
        let mut first = first;
        let mut bytes = vec![0u8; PIECE.min(out.len() * width)];
        for piece in out.chunks_mut(PIECE / width) {
            let bytes = &mut bytes[..piece.len() * width];
            self.read_bytes(tensor, first, bytes)?;
            widen(tensor.dtype, bytes, piece);
            self.finite(name, piece)?;
            first += piece.len();
        }
        Ok(())
    }

    /// Reads the bytes of elements from `first` on, as many as `out` takes.
    pub(super) fn read_bytes(&self, tensor: &TensorInfo, first: usize, out: &mut [u8]) -> Result<(), IoError> {
        read_at(&self.file, out, self.place(tensor, first)).map_err(IoError::system(&self.path, "reading a tensor"))
    }

    /// Refuses numbers that are not finite, in the tensor `name`.
    pub(super) fn finite(&self, name: &str, numbers: &[f32]) -> Result<(), IoError> {
        // Without an early end, so that it vectorises.
        if !numbers.iter().fold(true, |fine, x| fine & x.is_finite())
            && let Some(x) = numbers.iter().find(|x| !x.is_finite())
        {
            return Err(IoError::tensor(&self.path, name, "finite numbers", format!("{x}")));
        }
        Ok(())
    }

    /// True if the file system knows that the elements `first .. first + len` were never written, and so are zeros: they
    /// need not be read. False where it does not say.
    pub(super) fn is_hole(&self, tensor: &TensorInfo, first: usize, len: usize) -> bool {
        next_data(&self.file, self.place(tensor, first)).is_some_and(|next| next >= self.place(tensor, first + len))
    }

    /// Where in the file an element lies.
    fn place(&self, tensor: &TensorInfo, element: usize) -> u64 {
        self.data + (tensor.data_offsets.0 + element * (tensor.dtype.bitsize() / 8)) as u64
    }
}

/// The first byte at or after `at` that was written, or the end of numbers if there is none; None where the system does
/// not tell. Files are read by position, so that moving the file's own one disturbs nobody.
#[cfg(target_os = "linux")]
fn next_data(file: &File, at: u64) -> Option<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(next) => Some(next),
        Err(rustix::io::Errno::NXIO) => Some(u64::MAX),
        Err(_) => None,
    }
}

#[cfg(not(target_os = "linux"))]
fn next_data(_: &File, _: u64) -> Option<u64> {
    None
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (bytes, at) = (&mut bytes[n..], at + n as u64),
        }
    }
    Ok(())
}

/// True for the dtypes of weights that need no scales.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}

/// True for the dtypes that scales may have; a U8 means what an F8_E8M0 does.
pub(super) fn is_scale(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F8_E8M0 | Dtype::U8)
}

/// Exact: every BF16 and F16 number is an f32, and so is every power of two that a byte of scales means.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            let numbers = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            out.iter_mut().zip(numbers).for_each(|(o, x)| *o = x);
        }
        Dtype::BF16 => {
            let numbers = bytes.chunks_exact(2).map(|b| bf16::from_bits(u16::from_le_bytes([b[0], b[1]])).f32());
            out.iter_mut().zip(numbers).for_each(|(o, x)| *o = x);
        }
        Dtype::F16 => {
            let numbers = bytes.chunks_exact(2).map(|b| half_to_f32(u16::from_le_bytes([b[0], b[1]])));
            out.iter_mut().zip(numbers).for_each(|(o, x)| *o = x);
        }
        Dtype::F8_E8M0 | Dtype::U8 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = ue8m0::decode(b)),
        other => panic!("expected a float tensor, found {other:?}"),
    }
}

/// IEEE binary16: sign, 5 bits of exponent (bias 15), 10 bits of fraction.
fn half_to_f32(h: u16) -> f32 {
    let (sign, exponent, fraction) = (u32::from(h >> 15) << 31, (h >> 10) & 31, u32::from(h & 1023));
    let magnitude = match exponent {
        // Subnormal: fraction * 2^-24, exact in f32.
        0 => (fraction as f32 * f32::from_bits((127 - 24) << 23)).to_bits(),
        31 => 0x7f80_0000 | fraction << 13,
        e => (u32::from(e) + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// The directory's file `name`, which must be a plain file name: an index may not point elsewhere.
pub(super) fn inside(dir: &Path, name: &str) -> Option<PathBuf> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0']);
    plain.then(|| dir.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_widens_exactly() {
        for (bits, value) in [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 2.0f32.powi(-24)),
            (0x83ff, -1023.0 * 2.0f32.powi(-24)),
            (0x0400, 2.0f32.powi(-14)),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(half_to_f32(bits).to_bits(), f32::to_bits(value), "{bits:#06x}");
        }
        assert!(half_to_f32(0x7e01).is_nan());
    }
}
