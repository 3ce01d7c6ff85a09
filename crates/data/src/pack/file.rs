//! Token files for comparison with other trainers: one-dimensional npy arrays of little-endian i32 (numpy's format
//! version 1.0), which `numpy.load` reads, memory-mapped if asked.

use std::path::Path;

use crate::DataError;

const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
/// The data starts at a multiple of this, so that a mapped file is aligned.
const ALIGN: usize = 64;

/// Writes `tokens` to `path`.
pub fn write_tokens(path: impl AsRef<Path>, tokens: &[u32]) -> Result<(), DataError> {
    let path = path.as_ref();
    let fields = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': ({},), }}", tokens.len());
    // Two bytes of length and the closing newline belong to the aligned part.
    let padded = (MAGIC.len() + 2 + fields.len() + 1).next_multiple_of(ALIGN);
    let mut bytes = Vec::with_capacity(padded + 4 * tokens.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&((padded - MAGIC.len() - 2) as u16).to_le_bytes());
    bytes.extend_from_slice(fields.as_bytes());
    bytes.resize(padded - 1, b' ');
    bytes.push(b'\n');
    for &token in tokens {
        let token = i32::try_from(token).unwrap_or_else(|_| panic!("token id {token} does not fit i32"));
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    std::fs::write(path, bytes).map_err(DataError::write(path))
}

/// Reads a file of [`write_tokens`], or one that numpy wrote with the same element type.
pub fn read_tokens(path: impl AsRef<Path>) -> Result<Vec<u32>, DataError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    let wrong = |expected: &str, found: String| DataError::TokenFile {
        path: path.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let no_header = || wrong("an npy file, version 1.0", format!("{} bytes without its header", bytes.len()));
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(no_header)?;
    let (length, rest) = rest.split_first_chunk::<2>().ok_or_else(no_header)?;
    let (header, data) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or_else(no_header)?;
    let header = String::from_utf8_lossy(header);
    let count = header.split_once("'shape': (").and_then(|(_, s)| s.split_once(",)")).and_then(|(n, _)| n.parse().ok());
    let (true, true, Some(count)) = (header.contains("'<i4'"), header.contains("'fortran_order': False"), count) else {
        return Err(wrong("a one-dimensional array of '<i4'", header.trim_end().to_owned()));
    };
    if Some(data.len()) != usize::checked_mul(count, 4) {
        return Err(wrong(&format!("{count} tokens of 4 bytes"), format!("{} bytes", data.len())));
    }
    let decode = |(i, b): (usize, &[u8])| {
        let value = i32::from_le_bytes(b.try_into().expect("chunks of 4"));
        u32::try_from(value).map_err(|_| wrong("token ids of 0 or more", format!("{value} at index {i}")))
    };
    data.chunks_exact(4).enumerate().map(decode).collect()
}
