//! Vectors of AVX2 and AVX-512.

use super::{Job, Lanes, Level, TURNED, by_name};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn run_avx512<J: Job>(job: J) {
    job.run::<Avx512<false>>();
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn run_avx512bf16<J: Job>(job: J) {
    job.run::<Avx512<true>>();
}

#[target_feature(enable = "avx2,fma")]
pub fn run_avx2<J: Job>(job: J) {
    job.run::<Avx2>();
}

/// The high half of a word.
const HIGH: i32 = 0xffff_0000_u32.cast_signed();

/// With the instructions of AVX-512 BF16, or without.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>(__m512);

/// One of the first half, one of the second.
const ALTERNATELY: [u16; 32] = {
    let mut from = [0; 32];
    let mut i = 0;
    while i < 32 {
        from[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    from
};

// SAFETY: reached only through functions compiled for AVX-512, `run_avx512`, or with BF16 `run_avx512bf16`. In all of it
// the caller is compiled for the level and vouches for the memory, which is what every block below asks for.
unsafe impl<const BF16: bool> Lanes for Avx512<BF16> {
    const LEVEL: Level = if BF16 { Level::Avx512Bf16 } else { Level::Avx512 };
    const N: usize = 16;
    const FMA: bool = true;
    by_name! {
        splat: _mm512_set1_ps, load: _mm512_loadu_ps, store: _mm512_storeu_ps, mul_add: _mm512_fmadd_ps,
        add: _mm512_add_ps, sub: _mm512_sub_ps, mul: _mm512_mul_ps, div: _mm512_div_ps, max: _mm512_max_ps,
        min: _mm512_min_ps, scale: _mm512_scalef_ps
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32) {
        // SAFETY: see above; in a line of their own.
        unsafe { _mm512_stream_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, b.0), y.0, x.0) })
    }
    #[inline(always)]
    unsafe fn raise(self, n: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(n.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)))
        }
    }
    const SCALES: bool = true;
    #[inline(always)]
    unsafe fn rest(self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm512_reduce_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0) })
    }
    const WORDS: bool = true;
    #[inline(always)]
    unsafe fn halves(self) -> [Self; 2] {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_castps_si512(self.0);
            let high = _mm512_and_si512(words, _mm512_set1_epi32(HIGH));
            [_mm512_slli_epi32::<16>(words), high].map(|x| Self(_mm512_castsi512_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn paired(self, high: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            if BF16 {
                let both = _mm512_castps_si512(self.joined(high).0);
                let turned = _mm512_permutexvar_epi16(_mm512_loadu_si512(ALTERNATELY.as_ptr().cast()), both);
                return Self(_mm512_castsi512_ps(turned));
            }
            let rounded = |x: Self| {
                let bits = _mm512_castps_si512(x.0);
                let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
                let half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
                _mm512_add_epi32(bits, half)
            };
            let low = _mm512_srli_epi32::<16>(rounded(self));
            Self(_mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaa_aaaa, low, rounded(high))))
        }
    }
    /// Rows are read to vectors in pairs, so that three rounds of merging do what takes four for whole rows.
    #[inline(always)]
    unsafe fn turned(rows: *const u8, apart: usize) -> [Self; TURNED] {
        // SAFETY: see above; 32 bytes of 16 rows.
        unsafe {
            let mut x = [_mm512_setzero_si512(); 8];
            for (i, x) in x.iter_mut().enumerate() {
                // Row i of the first or the last eight, and the row four later.
                let row = rows.add((i / 4 * 8 + i % 4) * apart);
                let half = |row: *const u8| _mm256_loadu_si256(row.cast());
                *x = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(row)), half(row.add(4 * apart)));
            }
            let mut y = [_mm512_setzero_si512(); 8];
            for (x, y) in x.chunks_exact(4).zip(y.chunks_exact_mut(4)) {
                let (a, b) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
                let (c, d) = (_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
                y[0] = _mm512_unpacklo_epi64(a, c);
                y[1] = _mm512_unpackhi_epi64(a, c);
                y[2] = _mm512_unpacklo_epi64(b, d);
                y[3] = _mm512_unpackhi_epi64(b, d);
            }
            // Quarters of y[i]: word i of rows 0 to 3, word 4 + i of them, then the same of rows 4 to 7.
            let mut words = [Self(_mm512_setzero_ps()); TURNED];
            for i in 0..4 {
                let (first, last) = (_mm512_castsi512_ps(y[i]), _mm512_castsi512_ps(y[4 + i]));
                words[i].0 = _mm512_shuffle_f32x4::<0b10_00_10_00>(first, last);
                words[4 + i].0 = _mm512_shuffle_f32x4::<0b11_01_11_01>(first, last);
            }
            words
        }
    }
    const PAIRS: bool = BF16;
    #[inline(always)]
    unsafe fn dot(self, b: Self, c: Self) -> Self {
        assert!(BF16, "asked for only where PAIRS says so");
        // SAFETY: see above; the casts only name the bits anew.
        let pairs = |x: Self| unsafe { std::mem::transmute::<__m512, __m512bh>(x.0) };
        // SAFETY: as above.
        Self(unsafe { _mm512_dpbf16_ps(c.0, pairs(self), pairs(b)) })
    }
    #[inline(always)]
    unsafe fn joined(self, next: Self) -> Self {
        assert!(BF16, "asked for only where PAIRS says so");
        // SAFETY: see above; the second operand is the lower half.
        Self(unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(next.0, self.0)) })
    }
}

/// AMD's vdpbf16ps does twice the work of an f32 multiply-add in the same time; Intel's before AMX does less.
pub fn is_amd() -> bool {
    let v = __cpuid(0);
    let name = [v.ebx, v.edx, v.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"AuthenticAMD"
}

#[derive(Clone, Copy)]
pub struct Avx2(__m256);

// SAFETY: reached only through `run_avx2`, and as above.
unsafe impl Lanes for Avx2 {
    const LEVEL: Level = Level::Avx2;
    const N: usize = 8;
    const FMA: bool = true;
    by_name! {
        splat: _mm256_set1_ps, load: _mm256_loadu_ps, store: _mm256_storeu_ps, mul_add: _mm256_fmadd_ps,
        add: _mm256_add_ps, sub: _mm256_sub_ps, mul: _mm256_mul_ps, div: _mm256_div_ps, max: _mm256_max_ps,
        min: _mm256_min_ps
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: see above.
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, b.0)) })
    }
    #[inline(always)]
    unsafe fn raise(self, n: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(n.0));
            Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), shifted)))
        }
    }
    const WORDS: bool = true;
    #[inline(always)]
    unsafe fn halves(self) -> [Self; 2] {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_castps_si256(self.0);
            let high = _mm256_and_si256(words, _mm256_set1_epi32(HIGH));
            [_mm256_slli_epi32::<16>(words), high].map(|x| Self(_mm256_castsi256_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn paired(self, high: Self) -> Self {
        // SAFETY: see above.
        unsafe {
            let rounded = |x: Self| {
                let bits = _mm256_castps_si256(x.0);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
            };
            let low = _mm256_srli_epi32::<16>(rounded(self));
            Self(_mm256_castsi256_ps(_mm256_blend_epi16::<0xaa>(low, rounded(high))))
        }
    }
    /// As for AVX-512, of eight rows: two rounds are left.
    #[inline(always)]
    unsafe fn turned(rows: *const u8, apart: usize) -> [Self; TURNED] {
        // SAFETY: see above; 32 bytes of 8 rows.
        unsafe {
            let mut words = [Self(_mm256_setzero_ps()); TURNED];
            for (half, words) in words.chunks_exact_mut(4).enumerate() {
                let mut x = [_mm256_setzero_si256(); 4];
                for (i, x) in x.iter_mut().enumerate() {
                    let of = |row: usize| _mm_loadu_si128(rows.add(row * apart + 16 * half).cast());
                    *x = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(of(i)), of(i + 4));
                }
                let (a, b) = (_mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[0], x[1]));
                let (c, d) = (_mm256_unpacklo_epi32(x[2], x[3]), _mm256_unpackhi_epi32(x[2], x[3]));
                words[0].0 = _mm256_castsi256_ps(_mm256_unpacklo_epi64(a, c));
                words[1].0 = _mm256_castsi256_ps(_mm256_unpackhi_epi64(a, c));
                words[2].0 = _mm256_castsi256_ps(_mm256_unpacklo_epi64(b, d));
                words[3].0 = _mm256_castsi256_ps(_mm256_unpackhi_epi64(b, d));
            }
            words
        }
    }
}
