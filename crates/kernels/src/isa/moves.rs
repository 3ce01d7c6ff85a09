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
pub(crate) fn transpose(isa: Isa, src: &[f32], ld: usize, dst: &mut [f32], width: usize, lines: usize) {
    assert!(lines <= SQUARE && src.len() >= (SQUARE - 1) * ld + SQUARE);
    assert!(lines == 0 || dst.len() >= (lines - 1) * width + SQUARE);
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        // SAFETY: an Isa is a level that this CPU has, and the asserts above are what the function asks for.
        return unsafe { x86::transpose(src.as_ptr(), ld, dst.as_mut_ptr(), width, lines) };
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
    use core::arch::x86_64::{__m512, _mm512_loadu_ps, _mm512_permutex2var_ps, _mm512_set_epi32, _mm512_storeu_ps};

    /// Four rounds of merging row i with row i + 8, element by element: each round moves one bit of the row's number to
    /// the column's.
    ///
    /// # Safety
    /// 16 rows of 16 elements, `ld` apart, can be read, and `lines` <= 16 rows of 16, `width` apart, be written.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub unsafe fn transpose(src: *const f32, ld: usize, dst: *mut f32, width: usize, lines: usize) {
        let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        let high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
        // SAFETY: the caller's promise.
        let mut x: [__m512; SQUARE] = std::array::from_fn(|i| unsafe { _mm512_loadu_ps(src.add(i * ld)) });
        for _ in 0..4 {
            let mut y = x;
            for i in 0..SQUARE / 2 {
                y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + SQUARE / 2]);
                y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + SQUARE / 2]);
            }
            x = y;
        }
        if lines == SQUARE {
            for i in 0..SQUARE {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_ps(dst.add(i * width), x[i]) }
            }
        } else {
            for i in 0..lines {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_ps(dst.add(i * width), x[i]) }
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
        let src: Vec<f32> = (0..15 * 20 + 16).map(|i| i as f32).collect();
        for (isa, lines) in isas().into_iter().flat_map(|isa| [0, 1, 7, 16].map(|lines| (isa, lines))) {
            let mut dst = vec![-1.0; 15 * 17 + 16];
            transpose(isa, &src, 20, &mut dst, 17, lines);
            for k in 0..SQUARE {
                for i in 0..SQUARE {
                    let expected = if k < lines { (i * 20 + k) as f32 } else { -1.0 };
                    assert_eq!(dst[k * 17 + i], expected, "{isa:?}, lines {lines}, row {k}, column {i}");
                }
            }
        }
    }
}
