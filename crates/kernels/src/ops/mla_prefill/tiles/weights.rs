//! From blocks of scores, four tiles `[half of the keys][half of the queries]` of f32, to weights in cells.

use super::{GROUP, Tile};
use crate::isa::{SQUARE, TILE_COLUMNS};
use std::arch::x86_64::*;
use std::ops::Range;

/// 2^x for x <= 128 with a relative error of 3e-6; 0 of minus infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub fn exp2(x: __m512) -> __m512 {
    // x less its floor; 0 if x is infinite.
    let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
    // The polynomial of the least relative error for 0 <= r < 1.
    let mut p = _mm512_set1_ps(1.353_416_8e-2);
    for c in [5.201_146e-2, 2.414_427_6e-1, 6.930_038e-1, 1.000_002_6] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    // Times a power of two, of the floor of x.
    _mm512_scalef_ps(p, x)
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

/// How large a block's sum of weights may be before the base follows.
const SLACK: f32 = 256.0;

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

    /// Lets the bases of some queries (a bit each) follow the block's largest scores. What former weights and sums of them
    /// are to be multiplied by; a query whose base stays gets 1.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn raise(&mut self, scores: &[Tile; 4], over: [u16; 2]) -> [__m512; 2] {
        let mut alpha = [_mm512_set1_ps(1.0); 2];
        for j in 0..2 {
            let mut max = [row(&scores[j], 0), row(&scores[j], 1), row(&scores[2 + j], 0), row(&scores[2 + j], 1)];
            for r in (2..SQUARE).step_by(2) {
                for (i, max) in max.iter_mut().enumerate() {
                    *max = _mm512_max_ps(*max, row(&scores[i / 2 * 2 + j], r + i % 2));
                }
            }
            let max = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
            let top = _mm512_mul_ps(max, _mm512_set1_ps(self.factor));
            let base = _mm512_mask_mov_ps(self.base[j], over[j], top);
            let fall = _mm512_sub_ps(self.base[j], base);
            // A query that has seen no key yet has no sums.
            let over = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(over[j], fall, _mm512_setzero_ps());
            alpha[j] = _mm512_mask_mov_ps(alpha[j], over, exp2(fall));
            self.base[j] = base;
            self.sum[j] = _mm512_mul_ps(self.sum[j], alpha[j]);
        }
        alpha
    }

    /// Ends a block, of whose weights these are the sums: they are taken in, unless some are so large that bases must
    /// follow first, of which queries is said then.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn settle(&mut self, block: [__m512; 2]) -> Option<[u16; 2]> {
        let over = block.map(|x| _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, _mm512_set1_ps(SLACK)));
        if over != [0; 2] {
            return Some(over);
        }
        self.accept(block);
        None
    }

    /// Takes a block's weights into the sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn accept(&mut self, block: [__m512; 2]) {
        for (sum, block) in self.sum.iter_mut().zip(block) {
            *sum = _mm512_add_ps(*sum, block);
        }
    }

    /// The weights of a block, to be computed beside some number of products.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn weigh<'a>(&self, scores: &'a [Tile; 4], weights: &'a mut [Tile; 2], products: usize) -> Weighing<'a> {
        let from = self.from();
        let zero = _mm512_setzero_ps();
        Weighing {
            scores,
            weights,
            factor: _mm512_set1_ps(self.factor),
            from: from[0],
            next: from[1],
            sum: zero,
            first: zero,
            pace: Pace::new(products),
        }
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

    /// What each query's sum of weighted values is to be multiplied by, and its log-sum-exp: 0 and -inf without keys.
    #[target_feature(enable = "avx512f")]
    pub fn finish(&self) -> ([__m512; 2], [f32; GROUP]) {
        let (mut base, mut sum) = ([0f32; GROUP], [0f32; GROUP]);
        for j in 0..2 {
            // SAFETY: 16 elements of the 32.
            unsafe {
                _mm512_storeu_ps(base[j * SQUARE..].as_mut_ptr(), self.base[j]);
                _mm512_storeu_ps(sum[j * SQUARE..].as_mut_ptr(), self.sum[j]);
            }
        }
        let factors = self.sum.map(|sum| {
            let any = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(sum, _mm512_setzero_ps());
            _mm512_maskz_div_ps(any, _mm512_set1_ps(1.0), sum)
        });
        let lse = std::array::from_fn(|i| {
            if sum[i] == 0.0 { f32::NEG_INFINITY } else { base[i].mul_add(std::f32::consts::LN_2, sum[i].ln()) }
        });
        (factors, lse)
    }
}

/// Equal parts of what is done of a block beside products.
const PARTS: usize = 16;

/// How a block's parts are spread over a number of products.
pub struct Pace {
    done: usize,
    at_once: usize,
}

impl Pace {
    /// Nothing is done.
    pub fn new(products: usize) -> Self {
        Self { done: 0, at_once: PARTS.div_ceil(products.max(1)) }
    }

    /// The parts that are due after a product.
    #[inline(always)]
    pub fn due(&mut self) -> Range<usize> {
        let from = self.done;
        self.done = (from + self.at_once).min(PARTS);
        from..self.done
    }

    /// All that are left.
    #[inline(always)]
    pub fn rest(&self) -> Range<usize> {
        self.done..PARTS
    }
}

/// A block's scores on their way to weights, four keys and 16 queries at a time.
pub struct Weighing<'a> {
    scores: &'a [Tile; 4],
    weights: &'a mut [Tile; 2],
    factor: __m512,
    /// From where to measure, of these queries and of the other 16.
    from: __m512,
    next: __m512,
    /// Sums of weights, of these queries and of the first 16 once these are the others.
    sum: __m512,
    first: __m512,
    pace: Pace,
}

impl Weighing<'_> {
    /// What is due after a product.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub fn beside(&mut self) {
        for part in self.pace.due() {
            self.part(part);
        }
    }

    /// What is left. The sums of weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub fn rest(mut self) -> [__m512; 2] {
        for part in self.pace.rest() {
            self.part(part);
        }
        [self.first, self.sum]
    }

    /// The first half of the parts are the first 16 queries'.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    fn part(&mut self, part: usize) {
        let cells = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0,
        );
        let (j, half, at) = (part / 8 % 2, part / 4 % 2, part % 4);
        let scores = &self.scores[half * 2 + j];
        for i in 0..2 {
            let x = exp2(_mm512_fmsub_ps(row(scores, 4 * at + 2 * i), self.factor, self.from));
            let y = exp2(_mm512_fmsub_ps(row(scores, 4 * at + 2 * i + 1), self.factor, self.from));
            self.sum = _mm512_add_ps(self.sum, _mm512_add_ps(x, y));
            set_row(&mut self.weights[j], 8 * half + 2 * at + i, _mm512_permutexvar_epi16(cells, round(x, y)));
        }
        if part == PARTS / 2 - 1 {
            (self.first, self.from, self.sum) = (self.sum, self.next, _mm512_setzero_ps());
        }
    }
}
