//! Lines of a file, one at a time, with a checksum of everything that was read.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Result};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

/// A file being read. Memory is bounded by the longest line asked for, not by the file.
pub(super) struct Lines {
    file: BufReader<Hashed>,
    line: Vec<u8>,
    /// Bytes at the beginning of `line` that the last call did not give out.
    kept: usize,
    /// Length of what the last call gave out.
    given: usize,
    /// Where the line given last begins.
    pub offset: u64,
    /// Its number, from 1.
    pub number: u64,
    ended: bool,
}

struct Hashed {
    file: File,
    hash: Xxh3,
}

impl Read for Hashed {
    fn read(&mut self, to: &mut [u8]) -> Result<usize> {
        let n = self.file.read(to)?;
        self.hash.update(&to[..n]);
        Ok(n)
    }
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self> {
        let file = Hashed { file: File::open(path)?, hash: Xxh3::new() };
        let file = BufReader::with_capacity(1 << 18, file);
        Ok(Self { file, line: Vec::new(), kept: 0, given: 0, offset: 0, number: 0, ended: true })
    }

    /// Goes to the next line; false at the end of the file. At most `most` (4 or more) bytes of it come at once, cut
    /// between characters; the next piece has the same number.
    pub fn next(&mut self, most: usize) -> Result<bool> {
        self.offset += self.given as u64;
        self.line.drain(..self.given);
        self.number += u64::from(self.ended);
        let room = most.saturating_sub(self.kept) as u64;
        (&mut self.file).take(room).read_until(b'\n', &mut self.line)?;
        self.ended = self.line.last() == Some(&b'\n');
        self.kept = if self.line.len() < most || self.ended { 0 } else { unfinished(&self.line) };
        self.given = self.line.len() - self.kept;
        Ok(self.given > 0)
    }

    /// The line with its end.
    pub fn line(&self) -> &[u8] {
        &self.line[..self.given]
    }

    /// XXH3 of the whole file, once `next` has given false.
    pub fn hash(&self) -> u64 {
        self.file.get_ref().hash.digest()
    }
}

/// Bytes at the end that begin a character and do not end it.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = bytes.iter().rev().take(3).take_while(|&&b| b & 0xC0 == 0x80).count();
    let needed = match bytes.iter().rev().nth(tail) {
        Some(0xC2..=0xDF) => 2,
        Some(0xE0..=0xEF) => 3,
        Some(0xF0..=0xF4) => 4,
        _ => 0,
    };
    if tail + 1 < needed { tail + 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_come_in_pieces_of_whole_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        let text = "ab你好é😀x\n\nlast 你";
        std::fs::write(&path, text).unwrap();
        for most in 4..20 {
            let mut lines = Lines::open(&path).unwrap();
            let (mut all, mut numbers) = (String::new(), Vec::new());
            while lines.next(most).unwrap() {
                let line = std::str::from_utf8(lines.line()).unwrap();
                assert!(line.len() <= most);
                assert_eq!(lines.offset, all.len() as u64);
                all += line;
                numbers.push(lines.number);
            }
            assert_eq!(all, text);
            numbers.dedup();
            assert_eq!(numbers, [1, 2, 3], "{most}");
            assert_eq!(lines.hash(), xxhash_rust::xxh3::xxh3_64(text.as_bytes()));
        }
    }
}
