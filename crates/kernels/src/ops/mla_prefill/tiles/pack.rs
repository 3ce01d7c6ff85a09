//! From rows of tokens to tiles and back.

use super::{GROUP, TILE_ROW, TILE_WORDS, Tile, weights};
use crate::bf16;
use crate::isa::{SQUARE, TILE_COLUMNS, transpose_cells};
use std::arch::x86_64::*;

/// A group of 32 tokens, row by row, with zeros up to whole steps and for tokens that are not there.
pub struct Stage {
    rows: Vec<bf16>,
    /// Elements of a row: not a power of two apart, so that rows do not evict one another.
    ld: usize,
    steps: usize,
}

impl Stage {
    /// For rows of so many steps of 32 elements.
    pub fn new(steps: usize) -> Self {
        let ld = (steps + 1) * GROUP;
        Self { rows: vec![bf16::ZERO; ld * GROUP], ld, steps }
    }

    /// Takes `count` rows that `copy` writes, all of a stage's rows of one width; the others are zero.
    pub fn fill(&mut self, count: usize, width: usize, mut copy: impl FnMut(usize, &mut [bf16])) {
        for (i, row) in self.rows.chunks_exact_mut(self.ld).enumerate() {
            if i < count { copy(i, &mut row[..width]) } else { row[..width].fill(bf16::ZERO) }
        }
    }

    fn row(&self, i: usize, step: usize) -> *const u8 {
        self.rows[i * self.ld + step * GROUP..][..GROUP].as_ptr().cast()
    }

    /// Tiles of 16 tokens (rows) by 32 elements: `[half][step]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn rows(&self, tiles: &mut [Tile]) {
        for (i, tile) in tiles[..2 * self.steps].iter_mut().enumerate() {
            for (r, to) in tile.as_chunks_mut::<TILE_COLUMNS>().0.iter_mut().enumerate() {
                let from = self.row(i / self.steps * SQUARE + r, i % self.steps);
                // SAFETY: both are 64 bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_loadu_si512(from.cast())) }
            }
        }
    }

    /// The same with tokens as columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn columns(&self, tiles: &mut [Tile]) {
        for (i, tile) in tiles[..2 * self.steps].iter_mut().enumerate() {
            let from = self.row(i / self.steps * SQUARE, i % self.steps);
            // SAFETY: rows are `ld` elements apart, 16 of them from there on.
            unsafe { transpose_cells(from, 2 * self.ld, tile.as_mut_ptr()) }
        }
    }

    /// Tiles of 16 pairs of tokens (rows) by 16 elements. Neighbours are handed out together, by number.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn pairs(&self, step: usize, [low, high]: &mut [Tile; 2]) {
        let first = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33,
            1, 32, 0,
        );
        let second = _mm512_or_si512(first, _mm512_set1_epi16(16));
        for i in 0..SQUARE {
            // SAFETY: each is 64 bytes.
            unsafe {
                let x = _mm512_loadu_si512(self.row(2 * i, step).cast());
                let y = _mm512_loadu_si512(self.row(2 * i + 1, step).cast());
                _mm512_storeu_si512(
                    low[i * TILE_COLUMNS..].as_mut_ptr().cast(),
                    _mm512_permutex2var_epi16(x, first, y),
                );
                _mm512_storeu_si512(
                    high[i * TILE_COLUMNS..].as_mut_ptr().cast(),
                    _mm512_permutex2var_epi16(x, second, y),
                );
            }
        }
    }

    /// Tiles of 16 elements (rows) by 16 pairs of tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn turned(&self, tiles: &mut [Tile]) {
        let mut pairs = [[0; TILE_WORDS]; 2];
        for (step, to) in tiles[..2 * self.steps].as_chunks_mut::<2>().0.iter_mut().enumerate() {
            self.pairs(step, &mut pairs);
            for (from, to) in pairs.iter().zip(to) {
                turn(from, to);
            }
        }
    }
}

/// A tile's transpose.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn turn(from: &Tile, to: &mut Tile) {
    // SAFETY: a tile is 16 rows of 64 bytes.
    unsafe { transpose_cells(from.as_ptr().cast(), TILE_ROW, to.as_mut_ptr()) }
}

/// Rounds 32 numbers times a factor, 16 of a row of each of two tiles, to the elements of `to` from `at` on, as many as
/// there are.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn round_row([low, high]: [&Tile; 2], row: usize, factor: f32, to: &mut [bf16], at: usize) {
    let Some(to) = to.get_mut(at..) else { return };
    let factor = _mm512_set1_ps(factor);
    let of = |tile| _mm512_mul_ps(weights::row(tile, row), factor);
    let x = weights::round(of(low), of(high));
    // SAFETY: as many elements are written as there are.
    unsafe {
        if to.len() >= GROUP {
            _mm512_storeu_si512(to.as_mut_ptr().cast(), x);
        } else {
            _mm512_mask_storeu_epi16(to.as_mut_ptr().cast(), (1 << to.len()) - 1, x);
        }
    }
}
