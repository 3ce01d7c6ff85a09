//! The moves in instructions of AVX2 and AVX-512.

use crate::bf16;
use crate::isa::lanes::Lanes;
use crate::isa::lanes::x86::{Avx2, Avx512};
use core::arch::x86_64::*;

/// Quarters of rows are read to where they belong, four to a vector; two rounds of merging do the rest. Of the four
/// rounds that a transpose of whole rows takes, on the one port that Intel has for them, two are left.
///
/// # Safety
/// 16 rows of 64 bytes, `stride` bytes apart, can be read, and `lines` <= 16 rows of 16 cells, `width` apart, be
/// written.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn transpose(src: *const u8, stride: usize, dst: *mut u32, width: usize, lines: usize) {
    for quarter in 0..lines.div_ceil(4) {
        // SAFETY: the caller's promise.
        let of = |row: usize| unsafe { _mm_loadu_si128(src.add(row * stride + 16 * quarter).cast()) };
        let x: [__m512i; 4] = std::array::from_fn(|row| {
            let x = _mm512_broadcast_i32x4(of(row));
            let x = _mm512_mask_broadcast_i32x4(x, 0x00f0, of(row + 4));
            let x = _mm512_mask_broadcast_i32x4(x, 0x0f00, of(row + 8));
            _mm512_mask_broadcast_i32x4(x, 0xf000, of(row + 12))
        });
        let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
        let (c, d) = (_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
        let y = [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ];
        for (i, y) in y.into_iter().enumerate() {
            if 4 * quarter + i < lines {
                // SAFETY: the caller's promise.
                unsafe { _mm512_storeu_si512(dst.add((4 * quarter + i) * width).cast(), y) }
            }
        }
    }
}

/// See [`super::transpose_halves`]. As `transpose`, quarters of rows are read to where they belong: rows 0, 8, 16 and
/// 24 to a vector, so that three rounds within quarters of vectors do the rest.
///
/// # Safety
/// 32 rows of 64 bytes, `stride` bytes apart, can be read, and 2 KiB be written.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn transpose_halves(src: *const u8, stride: usize, dst: *mut u8) {
    for quarter in 0..4 {
        // SAFETY: the caller's promise.
        let of = |row: usize| unsafe { _mm_loadu_si128(src.add(row * stride + 16 * quarter).cast()) };
        let x: [__m512i; 8] = std::array::from_fn(|row| {
            let x = _mm512_broadcast_i32x4(of(row));
            let x = _mm512_mask_broadcast_i32x4(x, 0x00f0, of(row + 8));
            let x = _mm512_mask_broadcast_i32x4(x, 0x0f00, of(row + 16));
            _mm512_mask_broadcast_i32x4(x, 0xf000, of(row + 24))
        });
        // Columns 0 to 3 of rows 2 i and 2 i + 1, then columns 4 to 7.
        let low: [__m512i; 4] = std::array::from_fn(|i| _mm512_unpacklo_epi16(x[2 * i], x[2 * i + 1]));
        let high: [__m512i; 4] = std::array::from_fn(|i| _mm512_unpackhi_epi16(x[2 * i], x[2 * i + 1]));
        // Columns 2 i and 2 i + 1 of the first four rows and of the others.
        let fours = |x: &[__m512i; 4], i: usize| {
            let (a, b) = (x[2 * i], x[2 * i + 1]);
            [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
        };
        let pairs = [[fours(&low, 0), fours(&low, 1)], [fours(&high, 0), fours(&high, 1)]];
        for (half, [first, second]) in pairs.into_iter().enumerate() {
            for (pair, (a, b)) in first.into_iter().zip(second).enumerate() {
                let column = 8 * quarter + 4 * half + 2 * pair;
                // SAFETY: the caller's promise.
                unsafe {
                    _mm512_storeu_si512(dst.add(64 * column).cast(), _mm512_unpacklo_epi64(a, b));
                    _mm512_storeu_si512(dst.add(64 * (column + 1)).cast(), _mm512_unpackhi_epi64(a, b));
                }
            }
        }
    }
}

/// See [`super::pair_rows`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn pair_rows(rows: [*const u8; 2], low: *mut u32, high: *mut u32) {
    // SAFETY: the caller's promise.
    let [x, y] = rows.map(|row| unsafe { _mm512_loadu_si512(row.cast()) });
    // Quarters of pairs: 0, 2, 4, 6 and 1, 3, 5, 7.
    let (even, odd) = (_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y));
    let first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    let second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_storeu_si512(low.cast(), _mm512_permutex2var_epi64(even, first, odd));
        _mm512_storeu_si512(high.cast(), _mm512_permutex2var_epi64(even, second, odd));
    }
}

/// See [`super::stream_row`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn stream_row(from: &[f32; 32], to: &mut [f32; 32]) {
    for (from, to) in from.as_chunks::<16>().0.iter().zip(to.as_chunks_mut::<16>().0) {
        // SAFETY: 16 elements each, those written a line, as the caller promises.
        unsafe { Avx512::<false>::load(from.as_ptr()).stream(to.as_mut_ptr()) }
    }
}

/// See [`super::round_row`].
///
/// # Safety
/// The CPU has AVX-512 BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn round_row(from: &[f32; 32], to: &mut [bf16; 32]) {
    // SAFETY: 32 elements are there to be read, and as many to be written.
    unsafe {
        let (first, next) = (Avx512::<true>::load(from.as_ptr()), Avx512::load(from.as_ptr().add(16)));
        first.joined(next).store(to.as_mut_ptr().cast());
    }
}

/// 16 words out of halves.
///
/// # Safety
/// 32 bytes can be read at `high` and, if it is there, at `low`, and 64 be written at `to`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn interleave16(low: Option<*const u16>, high: *const u16, to: *mut u32) {
    // SAFETY: the caller's promise.
    let half = |x: *const u16| unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.cast())) };
    let mut words = _mm512_slli_epi32::<16>(half(high));
    if let Some(low) = low {
        words = _mm512_or_si512(words, half(low));
    }
    // SAFETY: the caller's promise.
    unsafe { _mm512_storeu_si512(to.cast(), words) }
}

/// As [`interleave16`], of 8.
///
/// # Safety
/// 16 bytes can be read at `high` and, if it is there, at `low`, and 32 be written at `to`.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn interleave8(low: Option<*const u16>, high: *const u16, to: *mut u32) {
    // SAFETY: the caller's promise.
    let half = |x: *const u16| unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(x.cast())) };
    let mut words = _mm256_slli_epi32::<16>(half(high));
    if let Some(low) = low {
        words = _mm256_or_si256(words, half(low));
    }
    // SAFETY: the caller's promise.
    unsafe { _mm256_storeu_si256(to.cast(), words) }
}

/// As [`transpose`], of 8 rows and columns.
///
/// # Safety
/// 8 rows of 8 elements, `ld` apart, can be read, and 8 rows of 8, `width` apart, be written.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn transpose8(src: *const u32, ld: usize, dst: *mut u32, width: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        for (i, column) in Avx2::turned(src.cast(), ld * size_of::<u32>()).into_iter().enumerate() {
            column.store(dst.add(i * width).cast());
        }
    }
}
