//! From blocks of scores, four tiles `[half of the keys][half of the queries]` of f32, to weights in cells.

use super::{GROUP, Tile};
use crate::isa::{SQUARE, TILE_COLUMNS};
use std::arch::x86_64::*;

/// 2^x for x <= 128 with a relative error of 2e-7; exactly 0 from -127 down.
#[inline]
#[target_feature(enable = "avx512f")]
#[expect(clippy::approx_constant, reason = "the best polynomial's first coefficient is near ln 2, not ln 2")]
pub fn exp2(x: __m512) -> __m512 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
    let round = _mm512_set1_ps(12_582_912.0);
    // At -127 the remainder is 0, the power of it 1, and the exponent field becomes 0. A NaN stays one.
    let x = _mm512_max_ps(_mm512_set1_ps(-127.0), x);
    let shifted = _mm512_add_ps(x, round);
    let r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
    // 2^r = 1 + r P(r), P of the least relative error for |r| <= 1/2.
    let mut p = _mm512_set1_ps(1.326_472_7e-3);
    for c in [9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    let y = _mm512_castps_si512(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0)));
    // What the shift pushes out is the rounding constant's.
    _mm512_castsi512_ps(_mm512_add_epi32(y, _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted))))
}

/// Row `row` of a tile, as f32.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn row(tile: &Tile, row: usize) -> __m512 {
    // SAFETY: 16 words are read.
    unsafe { _mm512_loadu_ps(tile[row * TILE_COLUMNS..][..TILE_COLUMNS].as_ptr().cast()) }
}

/// Writes a row.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn set_row(tile: &mut Tile, row: usize, x: __m512i) {
    // SAFETY: 16 words are written.
    unsafe { _mm512_storeu_si512(tile[row * TILE_COLUMNS..][..TILE_COLUMNS].as_mut_ptr().cast(), x) }
}

/// Rounds 32 numbers to bf16, `low` first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the same bits under another name.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Sets the scores of keys that a query does not see to minus infinity: query i of the block sees the keys before
/// `visible + i` of the block's.
#[target_feature(enable = "avx512f")]
pub fn hide(scores: &mut [Tile; 4], visible: i64) {
    let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let least = visible.clamp(-(GROUP as i64), GROUP as i64) as i32;
    for (i, tile) in scores.iter_mut().enumerate() {
        let seen = _mm512_add_epi32(lanes, _mm512_set1_epi32(least + (i % 2 * SQUARE) as i32));
        for r in 0..SQUARE {
            let key = _mm512_set1_epi32((i / 2 * SQUARE + r) as i32);
            let mask = _mm512_cmpgt_epi32_mask(seen, key);
            let x = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), mask, row(tile, r));
            set_row(tile, r, _mm512_castps_si512(x));
        }
    }
}

/// How far, as a power of two, scores may rise above a query's base before the base follows.
const SLACK: f32 = 8.0;

/// The online softmax of 32 queries. Scores are measured from a base, the largest when it was taken; it follows only
/// once scores rise far above it, so that sums are seldom scaled. All is in powers of two.
#[derive(Clone, Copy)]
pub struct Softmax {
    /// Scores times this are powers of two.
    factor: f32,
    base: [__m512; 2],
    sum: [__m512; 2],
}

impl Softmax {
    /// No keys seen.
    #[target_feature(enable = "avx512f")]
    pub fn new(scale: f32) -> Self {
        Self {
            factor: scale * std::f32::consts::LOG2_E,
            base: [_mm512_set1_ps(f32::NEG_INFINITY); 2],
            sum: [_mm512_setzero_ps(); 2],
        }
    }

    /// Takes in a block's largest scores. Where a base has to follow, what former weights and sums of them are to be
    /// multiplied by; a query whose base stays gets 1.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn raise(&mut self, scores: &[Tile; 4]) -> Option<[__m512; 2]> {
        let mut top = [_mm512_setzero_ps(); 2];
        let mut over = [0; 2];
        for (j, (top, over)) in top.iter_mut().zip(&mut over).enumerate() {
            let mut max = [row(&scores[j], 0), row(&scores[j], 1), row(&scores[2 + j], 0), row(&scores[2 + j], 1)];
            for r in (2..SQUARE).step_by(2) {
                for (i, max) in max.iter_mut().enumerate() {
                    *max = _mm512_max_ps(*max, row(&scores[i / 2 * 2 + j], r + i % 2));
                }
            }
            let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
            *top = _mm512_mul_ps(max, _mm512_set1_ps(self.factor));
            let limit = _mm512_add_ps(self.base[j], _mm512_set1_ps(SLACK));
            *over = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(*top, limit);
        }
        if over == [0; 2] {
            return None;
        }
        let mut alpha = [_mm512_set1_ps(1.0); 2];
        for j in 0..2 {
            let base = _mm512_mask_mov_ps(self.base[j], over[j], top[j]);
            alpha[j] = _mm512_mask_mov_ps(alpha[j], over[j], exp2(_mm512_sub_ps(self.base[j], base)));
            self.base[j] = base;
            self.sum[j] = _mm512_mul_ps(self.sum[j], alpha[j]);
        }
        Some(alpha)
    }

    /// From where to measure: a query that has seen no key keeps its base of -inf, and from 0 its weights are 0, not NaN.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn from(&self) -> [__m512; 2] {
        let finite = |x| {
            let mask = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, _mm512_set1_ps(f32::NEG_INFINITY));
            _mm512_maskz_mov_ps(mask, x)
        };
        [finite(self.base[0]), finite(self.base[1])]
    }

    /// Weights of the keys 2i and 2i + 1 into row i of both tiles of cells.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub fn weigh(&mut self, from: &[__m512; 2], scores: &[Tile; 4], weights: &mut [Tile; 2], i: usize) {
        let cells = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0,
        );
        let factor = _mm512_set1_ps(self.factor);
        let (half, r) = (i / 8 * 2, i % 8 * 2);
        for j in 0..2 {
            let x = exp2(_mm512_fmsub_ps(row(&scores[half + j], r), factor, from[j]));
            let y = exp2(_mm512_fmsub_ps(row(&scores[half + j], r + 1), factor, from[j]));
            self.sum[j] = _mm512_add_ps(_mm512_add_ps(self.sum[j], x), y);
            set_row(&mut weights[j], i, _mm512_permutexvar_epi16(cells, round(x, y)));
        }
    }

    /// What each query's sum of weighted values is to be multiplied by, and its log-sum-exp: 0 and -inf without keys.
    #[target_feature(enable = "avx512f")]
    pub fn finish(&self) -> [(f32, f32); GROUP] {
        let (mut base, mut sum) = ([0f32; GROUP], [0f32; GROUP]);
        for j in 0..2 {
            // SAFETY: 16 elements of the 32.
            unsafe {
                _mm512_storeu_ps(base[j * SQUARE..].as_mut_ptr(), self.base[j]);
                _mm512_storeu_ps(sum[j * SQUARE..].as_mut_ptr(), self.sum[j]);
            }
        }
        std::array::from_fn(|i| {
            if sum[i] == 0.0 {
                return (0.0, f32::NEG_INFINITY);
            }
            (1.0 / sum[i], base[i].mul_add(std::f32::consts::LN_2, sum[i].ln()))
        })
    }
}
