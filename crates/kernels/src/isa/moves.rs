//! What plain loops do not compile to: transposes in registers, rounding, and prefetching.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::Level;
use crate::bf16;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// A square of this many lanes and steps is transposed at once, in registers.
pub(crate) const SQUARE: usize = 16;

/// Writes the transpose of the square at the head of `src` (rows `ld` apart) to the head of `dst` (rows `width` apart),
/// but only its first `lines` rows.
#[inline(always)]
pub(crate) fn transpose(isa: Isa, src: &[u32], ld: usize, dst: &mut [u32], width: usize, lines: usize) {
    assert!(lines <= SQUARE && src.len() >= (SQUARE - 1) * ld + SQUARE);
    assert!(lines == 0 || dst.len() >= (lines - 1) * width + SQUARE);
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 {
        // SAFETY: an Isa is a level that this CPU has, and the asserts above are what the function asks for.
        return unsafe { x86::transpose(src.as_ptr().cast(), 4 * ld, dst.as_mut_ptr(), width, lines) };
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

/// Writes to `dst` the transpose of 16 rows of 16 cells, `stride` bytes apart and aligned or not: 16 rows, `ld` cells apart.
///
/// # Safety
/// The CPU has AVX-512. The rows at `src` can be read, and those at `dst` be written.
#[inline(always)]
pub(crate) unsafe fn transpose_cells(src: *const u8, stride: usize, dst: *mut u32, ld: usize) {
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::transpose(src, stride, dst, ld, SQUARE);
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..SQUARE * SQUARE {
        // SAFETY: the caller's promise.
        unsafe {
            let (row, column) = (i / SQUARE, i % SQUARE);
            *dst.add(row * ld + column) = src.add(column * stride).cast::<u32>().add(row).read_unaligned();
        }
    }
}

/// Writes to `dst` the transpose of 32 rows of 32 halves of cells, `stride` bytes apart and aligned or not: 32 rows close
/// together.
///
/// # Safety
/// The CPU has AVX-512. The rows at `src` can be read, and as many halves be written at `dst`.
#[inline(always)]
pub(crate) unsafe fn transpose_halves(src: *const u8, stride: usize, dst: *mut u16) {
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::transpose_halves(src, stride, dst.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..4 * SQUARE * SQUARE {
        let (row, column) = (i % (2 * SQUARE), i / (2 * SQUARE));
        // SAFETY: the caller's promise.
        unsafe { *dst.add(i) = src.add(row * stride).cast::<u16>().add(column).read_unaligned() }
    }
}

/// Writes the pairs of elements of two rows of 32 halves, 64 bytes each and aligned or not: the first 16 pairs to `low`, the
/// others to `high`. A loop over elements takes longer.
///
/// # Safety
/// The CPU has AVX-512. Both rows can be read, and 16 cells each be written at `low` and `high`.
#[inline(always)]
pub(crate) unsafe fn pair_rows(rows: [*const u8; 2], low: *mut u32, high: *mut u32) {
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::pair_rows(rows, low, high);
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..2 * SQUARE {
        // SAFETY: the caller's promise.
        unsafe {
            let [x, y] = rows.map(|row| u32::from(row.cast::<u16>().add(i).read_unaligned()));
            *if i < SQUARE { low.add(i) } else { high.add(i - SQUARE) } = x | y << 16;
        }
    }
}

/// Writes a row past the caches, which saves reading its lines first. Another thread may read it after a
/// [`finish_streams`] of this one.
///
/// # Safety
/// The CPU has AVX-512. The row begins with a line.
#[inline(always)]
pub(crate) unsafe fn stream_row(from: &[f32; 2 * SQUARE], to: &mut [f32; 2 * SQUARE]) {
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::stream_row(from, to);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        *to = *from;
    }
}

/// Puts what was streamed before whatever this thread writes next.
#[inline(always)]
pub(crate) fn finish_streams() {
    // SAFETY: part of x86-64.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// Rounds to nearest even, as [`crate::Elem::round`] does but for subnormal numbers, which become zeros.
///
/// # Safety
/// The CPU has AVX-512 BF16.
#[inline(always)]
pub(crate) unsafe fn round_row(from: &[f32; 2 * SQUARE], to: &mut [bf16; 2 * SQUARE]) {
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::round_row(from, to);
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        *to = from.map(crate::Elem::round);
    }
}

/// The cache that a line is to be in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cache {
    First,
    Second,
}

/// Asks for the line at `at` to be in a cache soon. A hint: any address will do.
#[inline(always)]
pub(crate) fn ask(cache: Cache, at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: reads nothing that could be seen, and does not fault.
        unsafe {
            match cache {
                Cache::First => _mm_prefetch::<_MM_HINT_T0>(at.cast()),
                Cache::Second => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (cache, at);
}

/// Asks for the line at `at` to be this core's to write soon. As above; for code on AVX-512, whose CPUs have the
/// instruction.
#[inline(always)]
pub(crate) fn prefetch_line_to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: changes nothing that could be seen, and does not fault. There is an intrinsic, but it is this instruction
    // only where the compiler is told that the CPU has it, for which there is no stable name.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Writes a word for each element of `high`, which becomes its high half; the low half is that of `low`, or zero. Loops
/// over arrays of elements are taken apart into scalars before they could become vectors.
#[inline(always)]
pub(crate) fn interleave<const N: usize>(isa: Isa, low: Option<&[bf16; N]>, high: &[bf16; N], to: &mut [u32; N]) {
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 && N == 32 {
        let to = to.as_mut_ptr();
        // SAFETY: an Isa is a level that this CPU has; all arrays have 32 elements.
        unsafe {
            match low {
                Some(low) => x86::pair_rows([low.as_ptr().cast(), high.as_ptr().cast()], to, to.add(16)),
                None => {
                    x86::interleave16(None, high.as_ptr().cast(), to);
                    x86::interleave16(None, high.as_ptr().add(16).cast(), to.add(16));
                }
            }
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx512 && N == 16 {
        // SAFETY: an Isa is a level that this CPU has; all arrays have 16 elements.
        return unsafe { x86::interleave16(low.map(|x| x.as_ptr().cast()), high.as_ptr().cast(), to.as_mut_ptr()) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx2 && N.is_multiple_of(8) {
        for i in (0..N).step_by(8) {
            // SAFETY: as above, of eight elements from a place that has as many left.
            unsafe {
                let low = low.map(|x| x.as_ptr().add(i).cast());
                x86::interleave8(low, high.as_ptr().add(i).cast(), to.as_mut_ptr().add(i));
            }
        }
        return;
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    for (i, to) in to.iter_mut().enumerate() {
        *to = u32::from(high[i].to_bits()) << 16 | low.map_or(0, |x| u32::from(x[i].to_bits()));
    }
}

/// Asks for all lines of `x`.
#[inline(always)]
pub(crate) fn ask_for<T>(cache: Cache, x: &[T]) {
    for x in x.chunks(LINE / size_of::<T>()) {
        ask(cache, x.as_ptr().cast());
    }
}

/// Asks for `x` to be in the second-level cache soon.
#[inline(always)]
pub(crate) fn prefetch<T>(x: &[T]) {
    ask_for(Cache::Second, x);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;
    use crate::testing::isas;

    #[test]
    fn transposes_cells_at_any_distance() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512) {
            return;
        }
        let src: Vec<u8> = (0..15 * 77 + 64 + 3).map(|i| (i * 7 % 251) as u8).collect();
        for (stride, from) in [(64, 0), (66, 1), (77, 3)] {
            let mut dst = [0u32; SQUARE * SQUARE];
            // SAFETY: the CPU has the level; 16 rows are there, and as many cells.
            unsafe { transpose_cells(src[from..].as_ptr(), stride, dst.as_mut_ptr(), SQUARE) }
            for (i, found) in dst.into_iter().enumerate() {
                let at = from + i % SQUARE * stride + i / SQUARE * 4;
                assert_eq!(found.to_le_bytes(), src[at..at + 4], "stride {stride}, cell {i}");
            }
        }
    }

    #[test]
    fn transposes_halves_at_any_distance() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512) {
            return;
        }
        let src: Vec<u8> = (0..31 * 77 + 64 + 3).map(|i| (i * 7 % 251) as u8).collect();
        for (stride, from) in [(64, 0), (66, 1), (77, 3)] {
            let mut dst = [0u16; 4 * SQUARE * SQUARE];
            // SAFETY: the CPU has the level; 32 rows are there, and as many halves.
            unsafe { transpose_halves(src[from..].as_ptr(), stride, dst.as_mut_ptr()) }
            for (i, found) in dst.into_iter().enumerate() {
                let at = from + i % (2 * SQUARE) * stride + i / (2 * SQUARE) * 2;
                assert_eq!(found.to_le_bytes(), src[at..at + 2], "stride {stride}, half {i}");
            }
        }
    }

    #[test]
    fn pairs_rows() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512) {
            return;
        }
        let src: Vec<u8> = (0..200).map(|i| (i * 7 % 251) as u8).collect();
        for (first, second) in [(0, 64), (3, 130), (70, 1)] {
            let mut cells = [0u32; 2 * SQUARE];
            let (low, high) = cells.split_at_mut(SQUARE);
            let rows = [first, second].map(|at| src[at..at + 64].as_ptr());
            // SAFETY: the CPU has the level; both rows are there, and 16 cells each.
            unsafe { pair_rows(rows, low.as_mut_ptr(), high.as_mut_ptr()) }
            for (i, cell) in cells.into_iter().enumerate() {
                let half = |row: usize| u32::from(u16::from_le_bytes([src[row + 2 * i], src[row + 2 * i + 1]]));
                assert_eq!(cell, half(first) | half(second) << 16, "rows {first} and {second}, cell {i}");
            }
        }
    }

    #[test]
    fn streams_rows() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512) {
            return;
        }
        #[repr(align(64))]
        struct Line([f32; 2 * SQUARE]);
        let (from, mut to) = (std::array::from_fn(|i| i as f32), Line([0.0; 2 * SQUARE]));
        // SAFETY: the CPU has the level; the row begins with a line.
        unsafe { stream_row(&from, &mut to.0) }
        finish_streams();
        assert_eq!(to.0, from);
    }

    /// Every bit pattern of the upper half with ties, and numbers just above and below them; NaNs stay NaNs.
    #[test]
    fn rows_are_rounded_like_elements() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512Bf16) {
            return;
        }
        let all = (0..=u16::MAX).flat_map(|high| [0, 0x7fff, 0x8000, 0x8001].map(|low| u32::from(high) << 16 | low));
        let all: Vec<f32> = all.map(f32::from_bits).filter(|x| !x.is_subnormal()).collect();
        for from in all.as_chunks().0 {
            let mut to = [bf16::ZERO; 2 * SQUARE];
            // SAFETY: the CPU has the level.
            unsafe { round_row(from, &mut to) };
            let expected: [bf16; 2 * SQUARE] = from.map(crate::Elem::round);
            assert_eq!(to.map(bf16::to_bits), expected.map(bf16::to_bits), "{from:?}");
        }
        let mut to = [bf16::ONE; 2 * SQUARE];
        // SAFETY: as above.
        unsafe { round_row(&[-f32::MIN_POSITIVE / 4.0; 2 * SQUARE], &mut to) };
        assert_eq!(to, [bf16::NEG_ZERO; 2 * SQUARE]);
    }

    #[test]
    fn interleaves_halves() {
        let half = |i: usize| bf16::from_bits((i * 40503 % 65521) as u16);
        let (low, high): ([bf16; 16], [bf16; 16]) = (std::array::from_fn(half), std::array::from_fn(|i| half(i + 16)));
        for isa in isas() {
            let mut words = [0; 16];
            interleave(isa, Some(&low), &high, &mut words);
            let expected = |i: usize| u32::from(low[i].to_bits()) | u32::from(high[i].to_bits()) << 16;
            assert_eq!(words, std::array::from_fn(expected), "{isa:?}");
            interleave(isa, None, &high, &mut words);
            assert_eq!(words, std::array::from_fn(|i| u32::from(high[i].to_bits()) << 16), "{isa:?}");
            let (low, high): ([bf16; 32], [bf16; 32]) =
                (std::array::from_fn(half), std::array::from_fn(|i| half(i + 32)));
            let mut words = [0; 32];
            interleave(isa, Some(&low), &high, &mut words);
            let expected = |i: usize| u32::from(low[i].to_bits()) | u32::from(high[i].to_bits()) << 16;
            assert_eq!(words, std::array::from_fn(expected), "{isa:?}");
            interleave(isa, None, &high, &mut words);
            assert_eq!(words, std::array::from_fn(|i| u32::from(high[i].to_bits()) << 16), "{isa:?}");
        }
    }

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
