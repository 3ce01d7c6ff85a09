//! What plain loops do not compile to: a transpose in registers, and prefetching. Both only move bits.

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::Level;

/// A square of this many lanes and steps is transposed at once, in registers.
pub(crate) const SQUARE: usize = 16;

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Writes the transpose of the square at the head of `src` (rows `ld` apart) to the head of `dst` (rows `width` apart),
/// but only its first `lines` rows.
#[inline(always)]
pub(crate) fn transpose(isa: Isa, src: &[u32], ld: usize, dst: &mut [u32], width: usize, lines: usize) {
    assert!(lines <= SQUARE && src.len() >= (SQUARE - 1) * ld + SQUARE);
    assert!(lines == 0 || dst.len() >= (lines - 1) * width + SQUARE);
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 {
        // SAFETY: an Isa is a level that this CPU has, and the asserts above are what the function asks for.
        return unsafe { x86::transpose(src.as_ptr(), ld, dst.as_mut_ptr(), width, lines) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx2 && lines == SQUARE {
        for (i, k) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
            let (src, dst) = (&src[i * ld + k..], &mut dst[k * width + i..]);
            // SAFETY: as above, of eight rows and columns of the sixteen.
            unsafe { x86::transpose8(src.as_ptr(), ld, dst.as_mut_ptr(), width) };
        }
        return;
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    for k in 0..lines {
        let line = &mut dst[k * width..][..SQUARE];
        line.iter_mut().enumerate().for_each(|(i, o)| *o = src[i * ld + k]);
    }
}

/// Asks for `x` to be in the cache soon.
#[inline(always)]
pub(crate) fn prefetch<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for x in x.chunks(LINE / size_of::<T>()) {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, of an address within a live slice.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::SQUARE;
    use core::arch::x86_64::*;

    /// Four rounds of merging row i with row i + 8, element by element: each round moves one bit of the row's number to
    /// the column's.
    ///
    /// # Safety
    /// 16 rows of 16 elements, `ld` apart, can be read, and `lines` <= 16 rows of 16, `width` apart, be written.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn transpose(src: *const u32, ld: usize, dst: *mut u32, width: usize, lines: usize) {
        let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        let high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
        // SAFETY: the caller's promise.
        let mut x: [__m512i; SQUARE] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(src.add(i * ld).cast()) });
        for _ in 0..4 {
            let mut y = x;
            for i in 0..SQUARE / 2 {
                y[2 * i] = _mm512_permutex2var_epi32(x[i], low, x[i + SQUARE / 2]);
                y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], high, x[i + SQUARE / 2]);
            }
            x = y;
        }
        if lines == SQUARE {
            for i in 0..SQUARE {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_si512(dst.add(i * width).cast(), x[i]) }
            }
        } else {
            for i in 0..lines {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_si512(dst.add(i * width).cast(), x[i]) }
            }
        }
    }

    /// As [`transpose`], of 8 rows and columns.
    ///
    /// # Safety
    /// 8 rows of 8 elements, `ld` apart, can be read, and 8 rows of 8, `width` apart, be written.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn transpose8(src: *const u32, ld: usize, dst: *mut u32, width: usize) {
        // SAFETY: the caller's promise.
        let mut x: [__m256i; 8] = std::array::from_fn(|i| unsafe { _mm256_loadu_si256(src.add(i * ld).cast()) });
        // Merging rows i and i + 4 as above, but within halves; the last step puts the halves together.
        for _ in 0..3 {
            let mut y = x;
            for i in 0..4 {
                y[2 * i] = _mm256_unpacklo_epi32(x[i], x[i + 4]);
                y[2 * i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 4]);
            }
            x = y;
        }
        for i in 0..4 {
            let (low, high) = (
                _mm256_permute2x128_si256::<0x20>(x[2 * i], x[2 * i + 1]),
                _mm256_permute2x128_si256::<0x31>(x[2 * i], x[2 * i + 1]),
            );
            // SAFETY: the caller's promise.
            unsafe {
                _mm256_storeu_si256(dst.add(i * width).cast(), low);
                _mm256_storeu_si256(dst.add((i + 4) * width).cast(), high);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::isas;

    #[test]
    fn transposes() {
        let src: Vec<u32> = (0..15 * 20 + 16).collect();
        for (isa, lines) in isas().into_iter().flat_map(|isa| [0, 1, 7, 16].map(|lines| (isa, lines))) {
            let mut dst = vec![u32::MAX; 15 * 17 + 16];
            transpose(isa, &src, 20, &mut dst, 17, lines);
            for k in 0..SQUARE {
                for i in 0..SQUARE {
                    let expected = if k < lines { (i * 20 + k) as u32 } else { u32::MAX };
                    assert_eq!(dst[k * 17 + i], expected, "{isa:?}, lines {lines}, row {k}, column {i}");
                }
            }
        }
    }
}
