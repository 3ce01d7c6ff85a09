//! Rows copied to memory past the caches: a line that is written as a whole need not be read first, which is a third of
//! a copy's traffic. What was written is in memory and not in a cache afterwards, so that it is for more than caches hold.

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::moves::LINE;

/// A buffer of at least so many bytes is written past the caches. Where they would hold it, what reads it next gains
/// less from them than writing loses: measured on 16 MB with 32 MB of cache.
const STREAMED: usize = 4 << 20;
/// Rows that are asked for before it is their turn: they lie anywhere, and what the CPU fetches on its own begins
/// anew with each.
#[cfg(target_arch = "x86_64")]
const ROWS_AHEAD: usize = 2;

/// Whether a buffer of so many bytes is.
pub(crate) fn streamed(bytes: usize) -> bool {
    cfg!(target_arch = "x86_64") && bytes >= STREAMED
}

/// Rows of one task of [`copy_rows`]. What is streamed is cut into larger pieces, for at the end of each its writes are
/// waited for.
pub(crate) fn copied_rows<T>(width: usize, all: usize) -> usize {
    let elements = if streamed(all * size_of::<T>()) { 1 << 17 } else { 1 << 14 };
    (elements / width.max(1)).max(1)
}

/// Fills `to` with rows of `width` elements, the i-th from the head of `source(i)`; of rows behind the last, asked for ahead
/// of time, `source` may have none. `all` is the number of elements of the buffer that `to` is a part of.
#[inline]
pub(crate) fn copy_rows<'a, T: bytemuck::Pod>(
    isa: Isa,
    to: &mut [T],
    width: usize,
    all: usize,
    source: impl Fn(usize) -> Option<&'a [T]>,
) {
    #[cfg(target_arch = "x86_64")]
    let _finish = streamed(all * size_of::<T>()).then_some(x86::Finish);
    for (i, to) in to.chunks_exact_mut(width).enumerate() {
        let from = &source(i).expect("a row for every row that is written")[..width];
        #[cfg(target_arch = "x86_64")]
        if streamed(all * size_of::<T>()) {
            let next = source(i + ROWS_AHEAD).unwrap_or(from);
            x86::stream(isa, bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to), next.as_ptr().cast());
            continue;
        }
        to.copy_from_slice(from);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (isa, all);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::LINE;
    use crate::isa::{Cache, Isa, Level, ask};
    use core::arch::x86_64::*;

    /// Copies; whole lines past the caches. [`Finish`] has to be dropped before another thread may read them.
    #[inline]
    pub fn stream(isa: Isa, from: &[u8], to: &mut [u8], next: *const u8) {
        assert_eq!(from.len(), to.len());
        let head = to.as_ptr().align_offset(LINE).min(to.len());
        let end = head + (to.len() - head) / LINE * LINE;
        to[..head].copy_from_slice(&from[..head]);
        to[end..].copy_from_slice(&from[end..]);
        let (from, to, next) = (&from[head..end], &mut to[head..end], next.wrapping_add(head));
        let (from, to, lines) = (from.as_ptr(), to.as_mut_ptr(), to.len() / LINE);
        // SAFETY: an Isa is a level that this CPU has; both have so many lines, those of `to` aligned.
        unsafe {
            match isa.level() {
                Level::Portable => portable(from, to, next, lines),
                Level::Avx2 => avx2(from, to, next, lines),
                _ => avx512(from, to, next, lines),
            }
        }
    }

    macro_rules! lines {
        ($(#[$meta:meta])* $name:ident, $vector:ty, $load:ident, $stream:ident) => {
            /// # Safety
            /// The CPU has the level; so many lines can be read and written, those written aligned.
            $(#[$meta])*
            unsafe fn $name(from: *const u8, to: *mut u8, next: *const u8, lines: usize) {
                for line in 0..lines {
                    ask(Cache::First, next.wrapping_add(line * LINE));
                    for at in (line * LINE..(line + 1) * LINE).step_by(size_of::<$vector>()) {
                        // SAFETY: the caller's promise.
                        unsafe { $stream(to.add(at).cast(), $load(from.add(at).cast())) }
                    }
                }
            }
        };
    }

    lines!(portable, __m128i, _mm_loadu_si128, _mm_stream_si128);
    lines!(
        #[target_feature(enable = "avx2")]
        avx2,
        __m256i,
        _mm256_loadu_si256,
        _mm256_stream_si256
    );
    lines!(
        #[target_feature(enable = "avx512f")]
        avx512,
        __m512i,
        _mm512_loadu_si512,
        _mm512_stream_si512
    );

    /// Puts what was streamed before whatever this thread writes next, also where a panic ends the copying.
    pub struct Finish;

    impl Drop for Finish {
        #[inline]
        fn drop(&mut self) {
            crate::isa::finish_streams();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::isas;

    /// Rows of all alignments and lengths, below and above the size from which they are streamed.
    #[test]
    fn rows_are_copied() {
        let from: Vec<u16> = (0..40_000).map(|i| (i * 40_503 % 65_521) as u16).collect();
        for isa in isas() {
            rows_are_copied_on(isa, &from);
        }
    }

    fn rows_are_copied_on(isa: Isa, from: &[u16]) {
        for (width, shift) in [(1, 0), (31, 3), (32, 0), (64, 1), (200, 0), (2048, 5)] {
            for all in [0, 1 << 30] {
                let rows = 9;
                let mut to = vec![u16::MAX; shift + rows * width + 1];
                let source = |i: usize| (i < rows).then(|| &from[i * 7919 % 20_000..]);
                copy_rows(isa, &mut to[shift..shift + rows * width], width, all, source);
                for i in 0..rows {
                    let found = &to[shift + i * width..][..width];
                    assert_eq!(found, &source(i).unwrap()[..width], "row {i} of width {width}");
                }
                assert!(to[..shift].iter().chain(&to[shift + rows * width..]).all(|&x| x == u16::MAX));
            }
        }
    }
}
