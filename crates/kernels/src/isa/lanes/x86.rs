//! Vectors of AVX2 and AVX-512.

use super::{Job, Lanes, Level, TURNED};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn run_avx512<J: Job>(job: J) {
    job.run::<Avx512>();
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn run_avx512bf16<J: Job>(job: J) {
    job.run::<Avx512Bf16>();
}

#[target_feature(enable = "avx2,fma")]
pub fn run_avx2<J: Job>(job: J) {
    job.run::<Avx2>();
}

#[derive(Clone, Copy)]
pub struct Avx512(__m512);

// SAFETY: reached only through functions compiled for AVX-512, `run_avx512` and `run_avx512bf16`.
unsafe impl Lanes for Avx512 {
    const LEVEL: Level = Level::Avx512;
    const N: usize = 16;
    const FMA: bool = true;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller is compiled for AVX512F.
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above, and the caller vouches for 16 elements.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above, and the caller vouches for 16 elements.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32) {
        // SAFETY: as above, in a line of their own.
        unsafe { _mm512_stream_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller is compiled for AVX512F.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, b.0), y.0, x.0) })
    }
    #[inline(always)]
    unsafe fn raise(self, n: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(n.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)))
        }
    }
    const SCALES: bool = true;
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    const TURNS: bool = true;
    /// Rows are read to vectors in pairs, so that three rounds of merging do what takes four for whole rows.
    #[inline(always)]
    unsafe fn turned(rows: *const u8, apart: usize) -> [Self; TURNED] {
        // SAFETY: the caller is compiled for AVX512F, and vouches for 32 bytes of 16 rows.
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
    #[inline(always)]
    unsafe fn halves(self) -> [Self; 2] {
        // SAFETY: the caller is compiled for AVX512F.
        unsafe {
            let words = _mm512_castps_si512(self.0);
            let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_slli_epi32::<16>(words), high].map(|x| Self(_mm512_castsi512_ps(x)))
        }
    }
}

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

/// [`Avx512`] on a CPU that also multiplies pairs of bf16.
#[derive(Clone, Copy)]
pub struct Avx512Bf16(Avx512);

// SAFETY: reached only through `run_avx512bf16`.
unsafe impl Lanes for Avx512Bf16 {
    const LEVEL: Level = Level::Avx512Bf16;
    const N: usize = 16;
    const FMA: bool = true;
    const PAIRS: bool = true;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: passed on from the caller, here and below.
        Self(unsafe { Avx512::splat(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { Avx512::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.0.store(p) }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { self.0.stream(p) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.mul_add(b.0, c.0) })
    }
    const SCALES: bool = true;
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.add(b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.sub(b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.mul(b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.max(b.0) })
    }
    #[inline(always)]
    unsafe fn raise(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.raise(b.0) })
    }
    #[inline(always)]
    unsafe fn scale(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.scale(b.0) })
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { self.0.greater(b.0, x.0, y.0) })
    }
    #[inline(always)]
    unsafe fn dot(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller is compiled for AVX512-BF16; the casts only name the bits anew.
        let pairs = |x: Avx512| unsafe { std::mem::transmute::<__m512, __m512bh>(x.0) };
        // SAFETY: as above.
        Self(Avx512(unsafe { _mm512_dpbf16_ps(c.0.0, pairs(self.0), pairs(b.0)) }))
    }
    #[inline(always)]
    unsafe fn paired(self, high: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let both = _mm512_castps_si512(self.joined(high).0.0);
            let turned = _mm512_permutexvar_epi16(_mm512_loadu_si512(ALTERNATELY.as_ptr().cast()), both);
            Self(Avx512(_mm512_castsi512_ps(turned)))
        }
    }
    #[inline(always)]
    unsafe fn joined(self, next: Self) -> Self {
        // SAFETY: as above; the second operand is the lower half.
        unsafe {
            let both = _mm512_cvtne2ps_pbh(next.0.0, self.0.0);
            Self(Avx512(_mm512_castsi512_ps(std::mem::transmute::<__m512bh, __m512i>(both))))
        }
    }
    const TURNS: bool = true;
    #[inline(always)]
    unsafe fn turned(rows: *const u8, apart: usize) -> [Self; TURNED] {
        // SAFETY: as above.
        unsafe { Avx512::turned(rows, apart) }.map(Self)
    }
    #[inline(always)]
    unsafe fn halves(self) -> [Self; 2] {
        // SAFETY: as above.
        unsafe { self.0.halves() }.map(Self)
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

// SAFETY: reached only through `run_avx2`.
unsafe impl Lanes for Avx2 {
    const LEVEL: Level = Level::Avx2;
    const N: usize = 8;
    const FMA: bool = true;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller is compiled for AVX2.
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above, and the caller vouches for 8 elements.
        Self(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above, and the caller vouches for 8 elements.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller is compiled for FMA.
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_blendv_ps(y.0, x.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, b.0)) })
    }
    #[inline(always)]
    unsafe fn raise(self, n: Self) -> Self {
        // SAFETY: as above.
        unsafe {
            let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(n.0));
            Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), shifted)))
        }
    }
    const TURNS: bool = true;
    /// As for AVX-512, of eight rows: two rounds are left.
    #[inline(always)]
    unsafe fn turned(rows: *const u8, apart: usize) -> [Self; TURNED] {
        // SAFETY: the caller is compiled for AVX2, and vouches for 32 bytes of 8 rows.
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
    #[inline(always)]
    unsafe fn halves(self) -> [Self; 2] {
        // SAFETY: the caller is compiled for AVX2.
        unsafe {
            let words = _mm256_castps_si256(self.0);
            let high = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_slli_epi32::<16>(words), high].map(|x| Self(_mm256_castsi256_ps(x)))
        }
    }
}
