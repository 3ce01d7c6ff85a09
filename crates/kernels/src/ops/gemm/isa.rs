//! Compiles plain loops for the widest vectors of the CPU at hand, and holds the one shuffle that loops do not give.
//! Neither changes a result: the loops are elementwise and the shuffle moves bits.

/// A square of this many lanes and steps is transposed at once, in registers.
pub const SQUARE: usize = 16;

/// Runs `f`, which must be inlinable (`#[inline(always)]` at its definition), compiled for the widest vectors there are.
#[inline(always)]
pub fn widest<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if avx512() {
            // SAFETY: the CPU has the features.
            return unsafe { x86::with_avx512(f) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the feature.
            return unsafe { x86::with_avx2(f) };
        }
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bw")
}

/// Writes the transpose of the square at the head of `src` (rows `ld` apart) to the head of `dst` (rows `width` apart),
/// but only its first `lines` rows.
#[inline(always)]
pub fn transpose(src: &[f32], ld: usize, dst: &mut [f32], width: usize, lines: usize) {
    assert!(lines <= SQUARE && src.len() >= (SQUARE - 1) * ld + SQUARE);
    assert!(lines == 0 || dst.len() >= (lines - 1) * width + SQUARE);
    #[cfg(target_arch = "x86_64")]
    if avx512() {
        // SAFETY: the CPU has the features, and the asserts above are what the function asks for.
        return unsafe { x86::transpose(src.as_ptr(), ld, dst.as_mut_ptr(), width, lines) };
    }
    for k in 0..lines {
        let line = &mut dst[k * width..][..SQUARE];
        line.iter_mut().enumerate().for_each(|(i, o)| *o = src[i * ld + k]);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::SQUARE;
    use core::arch::x86_64::{__m512, _mm512_loadu_ps, _mm512_permutex2var_ps, _mm512_set_epi32, _mm512_storeu_ps};

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    #[target_feature(enable = "avx2")]
    pub fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    /// Four rounds of merging row i with row i + 8, element by element: each round moves one bit of the row's number to
    /// the column's.
    ///
    /// # Safety
    /// 16 rows of 16 elements, `ld` apart, can be read, and `lines` <= 16 rows of 16, `width` apart, be written.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
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

    #[test]
    fn transposes() {
        let src: Vec<f32> = (0..15 * 20 + 16).map(|i| i as f32).collect();
        for lines in [0, 1, 7, 16] {
            let mut dst = vec![-1.0; 15 * 17 + 16];
            widest(|| transpose(&src, 20, &mut dst, 17, lines));
            for k in 0..SQUARE {
                for i in 0..SQUARE {
                    let expected = if k < lines { (i * 20 + k) as f32 } else { -1.0 };
                    assert_eq!(dst[k * 17 + i], expected, "lines {lines}, row {k}, column {i}");
                }
            }
        }
    }
}
