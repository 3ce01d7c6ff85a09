//! From rows of tokens to tiles and back. Rows of 32 tokens lie far apart, often so that they evict one another from the
//! first-level cache: each is read once, whole lines at a time, into two tiles for 32 elements, and written likewise. All
//! other layouts are made from there.

use super::{GROUP, TILE_ROW, TILE_WORDS, Tile, weights};
use crate::bf16;
use crate::isa::{SQUARE, TILE_COLUMNS, transpose_cells, transpose_halves};
use std::arch::x86_64::*;

/// Rows of tokens.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// From the first one's first element on.
    pub of: &'a [bf16],
    /// Elements from one to the next, and those of each that are read.
    pub stride: usize,
    pub width: usize,
}

impl Rows<'_> {
    /// The rows from number `row` on.
    pub fn after(&self, row: usize) -> Self {
        Self { of: self.of.get(row * self.stride..).unwrap_or_default(), ..*self }
    }

    fn hold(&self, count: usize) -> bool {
        count == 0 || (count - 1) * self.stride + self.width <= self.of.len()
    }

    /// Reads `count` rows of a group to the elements from `first` on of tiles `[step][half]`, tokens as rows. What follows
    /// in the last of these steps becomes zero, and so do tokens that are not there; of what lies before `first` in the
    /// first step, of the tokens that are, nothing changes.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn gather(&self, count: usize, first: usize, to: &mut [Tile]) {
        assert!(count <= GROUP && self.hold(count), "{count} rows of {} elements", self.width);
        for step in first / GROUP..(first + self.width).div_ceil(GROUP) {
            let begin = first.saturating_sub(step * GROUP);
            let mask = lanes(begin, first + self.width - step * GROUP);
            let from = self.of.as_ptr().wrapping_add(step * GROUP).wrapping_sub(first);
            let to = to[2 * step..2 * step + 2].as_flattened_mut().as_chunks_mut::<TILE_COLUMNS>().0;
            let (there, missing) = to.split_at_mut(count);
            for (i, to) in there.iter_mut().enumerate() {
                // SAFETY: elements of the mask lie within the row, which is there, as the assert says; a row of a tile has
                // 32 elements.
                unsafe {
                    let x = _mm512_maskz_loadu_epi16(mask, from.wrapping_add(i * self.stride).cast());
                    if begin == 0 {
                        _mm512_storeu_si512(to.as_mut_ptr().cast(), x);
                    } else {
                        _mm512_mask_storeu_epi16(to.as_mut_ptr().cast(), u32::MAX << begin, x);
                    }
                }
            }
            missing.as_flattened_mut().fill(0);
        }
    }
}

/// A mask of the lanes of 32 from `begin` to `end`, which may lie beyond.
fn lanes(begin: usize, end: usize) -> u32 {
    let below = |n: usize| if n < GROUP { (1u32 << n) - 1 } else { u32::MAX };
    below(end) & !below(begin)
}

/// Of gathered rows the tiles with tokens as columns, `[step][half]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn columns(rows: &[Tile], to: &mut [Tile]) {
    rows.iter().zip(to).for_each(|(from, to)| turn(from, to));
}

/// Of a step of gathered rows the tiles of 16 pairs of tokens (rows) by 16 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn pairs(rows: &[Tile; 2], [low, high]: &mut [Tile; 2]) {
    let first = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0,
    );
    let second = _mm512_or_si512(first, _mm512_set1_epi16(16));
    for i in 0..SQUARE {
        let of = |i: usize| _mm512_castps_si512(weights::row(&rows[i / SQUARE], i % SQUARE));
        let (x, y) = (of(2 * i), of(2 * i + 1));
        weights::set_row(low, i, _mm512_permutex2var_epi16(x, first, y));
        weights::set_row(high, i, _mm512_permutex2var_epi16(x, second, y));
    }
}

/// Of gathered rows the tiles of 16 elements (rows) by 16 pairs of tokens, `[step][2]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn turned(rows: &[Tile], to: &mut [Tile]) {
    for (from, to) in rows.as_chunks::<2>().0.iter().zip(to.as_chunks_mut::<2>().0) {
        turn_halves(from, to);
    }
}

/// The transpose of two tiles as 32 rows of 32 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn turn_halves(from: &[Tile; 2], to: &mut [Tile; 2]) {
    // SAFETY: both are 32 rows of 64 bytes.
    unsafe { transpose_halves(from.as_ptr().cast(), TILE_ROW, to.as_mut_ptr().cast()) }
}

/// A tile's transpose.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn turn(from: &Tile, to: &mut Tile) {
    // SAFETY: a tile is 16 rows of 64 bytes.
    unsafe { transpose_cells(from.as_ptr().cast(), TILE_ROW, to.as_mut_ptr(), SQUARE) }
}

/// Of sums `[half of 32 elements][half of the tokens]`, elements as rows, times a factor for each token, the rounded rows
/// of the tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn round_turned(sums: &[Tile; 4], factors: [__m512; 2], to: &mut [Tile; 2]) {
    let mut rounded = [[0; TILE_WORDS]; 2];
    for (sums, to) in sums.as_chunks::<2>().0.iter().zip(&mut rounded) {
        for r in 0..SQUARE {
            let of = |half: usize| _mm512_mul_ps(weights::row(&sums[half], r), factors[half]);
            weights::set_row(to, r, weights::round(of(0), of(1)));
        }
    }
    turn_halves(&rounded, to);
}

/// Writes row `row` of tiles `[step][half]` to `to`, as many elements as it has.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn store_row(tiles: &[Tile], row: usize, to: &mut [bf16]) {
    for (tiles, to) in tiles.as_chunks::<2>().0.iter().zip(to.chunks_mut(GROUP)) {
        let x = _mm512_castps_si512(weights::row(&tiles[row / SQUARE], row % SQUARE));
        // SAFETY: as many elements are written as there are.
        unsafe { _mm512_mask_storeu_epi16(to.as_mut_ptr().cast(), lanes(0, to.len()), x) }
    }
}

/// Writes row `row` of sums `[step][half of the tokens][half of 32 elements]`, tokens as rows, times a factor: what fits
/// into `low` rounded, what follows into `high` as it is.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn store_sums(sums: &[Tile], row: usize, factor: f32, low: &mut [bf16], high: &mut [f32]) {
    let (factor, border) = (_mm512_set1_ps(factor), low.len());
    for (step, sums) in sums.as_chunks::<4>().0.iter().enumerate() {
        let x = [0, 1].map(|j| _mm512_mul_ps(weights::row(&sums[row / SQUARE * 2 + j], row % SQUARE), factor));
        if let Some(to) = low.get_mut(step * GROUP..) {
            // SAFETY: as many elements are written as there are.
            unsafe {
                _mm512_mask_storeu_epi16(to.as_mut_ptr().cast(), lanes(0, to.len()), weights::round(x[0], x[1]));
            }
        }
        for (j, x) in x.into_iter().enumerate() {
            let first = step * GROUP + j * SQUARE;
            let mask = lanes(border.saturating_sub(first), (border + high.len()).saturating_sub(first)) as u16;
            if mask != 0 {
                let to = high.as_mut_ptr().wrapping_add(first).wrapping_sub(border);
                // SAFETY: elements of the mask lie within `high`.
                unsafe { _mm512_mask_storeu_ps(to, mask, x) }
            }
        }
    }
}

/// a . b of up to 16 rows each, in 16 partial sums that are added in order.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn dots(a: Rows<'_>, b: Rows<'_>, count: usize) -> [f32; SQUARE] {
    assert!(count <= SQUARE && a.width == b.width && a.hold(count) && b.hold(count), "{count} rows");
    let (mut sums, mut of_lane) = ([0; TILE_WORDS], [0; TILE_WORDS]);
    for i in 0..count {
        let mut sum = _mm512_setzero_ps();
        for at in (0..a.width).step_by(SQUARE) {
            let mask = lanes(0, a.width - at) as u16;
            // SAFETY: elements of the mask lie within rows, which are there, as the assert says.
            let of = |x: &Rows<'_>| unsafe {
                let x = _mm256_maskz_loadu_epi16(mask, x.of.as_ptr().wrapping_add(i * x.stride + at).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
            };
            sum = _mm512_add_ps(sum, _mm512_mul_ps(of(&a), of(&b)));
        }
        weights::set_row(&mut sums, i, _mm512_castps_si512(sum));
    }
    turn(&sums, &mut of_lane);
    let mut sum = weights::row(&of_lane, 0);
    for lane in 1..SQUARE {
        sum = _mm512_add_ps(sum, weights::row(&of_lane, lane));
    }
    let mut dots = [0.0; SQUARE];
    // SAFETY: 16 numbers are written.
    unsafe { _mm512_storeu_ps(dots.as_mut_ptr(), sum) }
    dots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::isas;
    use crate::{Elem, Level};

    fn skip() -> bool {
        isas().iter().all(|isa| isa.level() < Level::Avx512Bf16)
    }

    /// A number for each row and element, none twice and none zero.
    fn number(row: usize, element: usize) -> bf16 {
        bf16::from_bits((1 + row * 128 + element) as u16)
    }

    /// Element `element` of row `row` of tiles `[step][half]`.
    fn at(tiles: &[Tile], row: usize, element: usize) -> bf16 {
        let cell = tiles[element / GROUP * 2 + row / SQUARE][row % SQUARE * TILE_COLUMNS + element % GROUP / 2];
        bf16::from_bits((cell >> (element % 2 * 16)) as u16)
    }

    /// A row's two parts, the second of which begins within a step, wherever the row ends.
    #[test]
    fn rows_are_gathered_and_laid_out() {
        if skip() {
            return;
        }
        for (low, high, count) in [(40usize, 30, 32), (64, 32, 17), (7, 3, 1), (0, 50, 32), (33, 0, 9), (96, 0, 0)] {
            let (stride, steps) = (low + high + 5, (low + high).div_ceil(GROUP));
            let of: Vec<bf16> = (0..GROUP * stride).map(|i| number(i / stride, i % stride)).collect();
            let mut rows = vec![[u32::MAX; TILE_WORDS]; 2 * steps];
            // SAFETY: the CPU has the level.
            unsafe {
                Rows { of: &of, stride, width: low }.gather(count, 0, &mut rows);
                Rows { of: &of[low..], stride, width: high }.gather(count, low, &mut rows);
            }
            let expected =
                |row, element| if row < count && element < low + high { number(row, element) } else { bf16::ZERO };
            let mut turned_rows = rows.clone();
            // SAFETY: as above.
            unsafe { turned(&rows, &mut turned_rows) }
            for (row, element) in (0..GROUP).flat_map(|row| (0..steps * GROUP).map(move |e| (row, e))) {
                assert_eq!(at(&rows, row, element), expected(row, element), "{low} {high} {count}: {row}, {element}");
                let (step, e) = (element / GROUP, element % GROUP);
                assert_eq!(at(&turned_rows[2 * step..], e, row), expected(row, element), "turned {row}, {element}");
            }
            let mut to = vec![bf16::ONE; low + high];
            // SAFETY: as above.
            unsafe { store_row(&rows, 16, &mut to) }
            assert!(to.iter().enumerate().all(|(i, x)| *x == expected(16, i)), "{low} {high} {count}");
        }
    }

    /// What is rounded and what is not meet within a step.
    #[test]
    fn sums_are_stored_in_two_parts() {
        if skip() {
            return;
        }
        for (low, high) in [(40usize, 30), (64, 32), (7, 3), (0, 50), (33, 0)] {
            let value = |row: usize, element: usize| (1 + row * 131 + element) as f32 / 7.0;
            let mut sums = vec![[0; TILE_WORDS]; 4 * (low + high).div_ceil(GROUP)];
            for (row, element) in (0..GROUP).flat_map(|row| (0..low + high).map(move |e| (row, e))) {
                let tile = element / GROUP * 4 + row / SQUARE * 2 + element % GROUP / SQUARE;
                sums[tile][row % SQUARE * TILE_COLUMNS + element % SQUARE] = value(row, element).to_bits();
            }
            for row in [0, 15, 16, 31] {
                let (mut to_low, mut to_high) = (vec![bf16::ZERO; low], vec![0.0; high]);
                // SAFETY: the CPU has the level.
                unsafe { store_sums(&sums, row, 3.0, &mut to_low, &mut to_high) }
                for (i, x) in to_low.iter().enumerate() {
                    assert_eq!(*x, bf16::round(value(row, i) * 3.0), "{low} {high}: {row}, {i}");
                }
                for (i, x) in to_high.iter().enumerate() {
                    assert_eq!(*x, value(row, low + i) * 3.0, "{low} {high}: {row}, {i}");
                }
            }
        }
    }

    /// Products are summed as the scalar function does.
    #[test]
    fn dots_have_the_bits_of_the_scalar_function() {
        if skip() {
            return;
        }
        let isa = isas()[0];
        for (width, count) in [(64, 16), (5, 3), (33, 16), (128, 0)] {
            let of = |seed: usize| -> Vec<bf16> {
                (0..SQUARE * width).map(|i| bf16::round(((i * 37 + seed) % 101) as f32 / 33.0 - 1.5)).collect()
            };
            let (a, b) = (of(1), of(58));
            let rows = |of| Rows { of, stride: width, width };
            // SAFETY: the CPU has the level.
            let found = unsafe { dots(rows(&a), rows(&b), count) };
            for (i, (a, b)) in a.chunks(width).zip(b.chunks(width)).enumerate() {
                let expected = if i < count { super::super::super::backward::dot(isa, a, b) } else { 0.0 };
                assert_eq!(found[i].to_bits(), expected.to_bits(), "{width}: {i}");
            }
        }
    }
}
