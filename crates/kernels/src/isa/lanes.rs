//! Vectors of f32, one type per level, and work that is written in them once.

use super::Level;

/// A vector of f32 of one level.
///
/// # Safety
/// An implementor may be used only inside a function compiled for its level (see [`super::Isa::run`]), `load` and `store`
/// reach `N` elements from the pointer, and `turned` 32 bytes of each of `N` rows.
pub(crate) unsafe trait Lanes: Copy {
    /// The level it belongs to.
    const LEVEL: Level;
    /// Lanes.
    const N: usize;
    /// Multiply-add rounds once (and is an instruction).
    const FMA: bool;
    /// All lanes x.
    unsafe fn splat(x: f32) -> Self;
    /// N elements, unaligned.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes N elements, unaligned.
    unsafe fn store(self, p: *mut f32);
    /// As `store`, past the caches where the level has it for whole lines; p begins with a line. Another thread may read
    /// them after a [`super::finish_streams`] of this one.
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.store(p) }
    }
    /// self * b + c.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Whether there is [`Lanes::dot`].
    const PAIRS: bool = false;
    /// With each lane of self and b holding two bf16: c plus the products of both, the second's (in the high half)
    /// added first, each addition rounded.
    unsafe fn dot(self, _b: Self, _c: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
    }
    /// Whether there are [`Lanes::turned`] and [`Lanes::halves`].
    const TURNS: bool = false;
    /// The transpose of `N` rows of eight words, `apart` bytes from one to the next, aligned or not: vector i has word i
    /// of every row.
    unsafe fn turned(_rows: *const u8, _apart: usize) -> [Self; TURNED] {
        unreachable!("asked for only where TURNS says so")
    }
    /// Both bf16 of each lane, widened: those in the low halves, then those in the high halves.
    unsafe fn halves(self) -> [Self; 2] {
        unreachable!("asked for only where TURNS says so")
    }
}

/// Words of a row that [`Lanes::turned`] takes.
pub(crate) const TURNED: usize = 8;

/// Work that is compiled once per level. `run` must be `#[inline(always)]`, as must all it calls.
pub(crate) trait Job {
    /// Does it.
    fn run<V: Lanes>(self);
}

/// a * b + c, rounded once if `fused`: of use as [`Lanes::FMA`] says, for a call into libm is many times slower.
#[inline(always)]
pub(crate) fn fma(fused: bool, a: f32, b: f32, c: f32) -> f32 {
    if fused { a.mul_add(b, c) } else { a * b + c }
}

/// Four floats as every CPU of the build's target has them.
#[derive(Clone, Copy)]
pub(crate) struct Portable(four::Four);

// SAFETY: nothing beyond the build's own target is needed.
unsafe impl Lanes for Portable {
    const LEVEL: Level = Level::Portable;
    const N: usize = 4;
    const FMA: bool = four::FMA;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: part of the build's target.
        Self(unsafe { four::splat(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as above, and the caller vouches for four elements.
        Self(unsafe { four::load(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above, and the caller vouches for four elements.
        unsafe { four::store(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: part of the build's target.
        Self(unsafe { four::mul_add(self.0, b.0, c.0) })
    }
}

// Intrinsics, because arrays of four are taken apart into scalars when many of them should stay in registers.

/// SSE2.
#[cfg(target_arch = "x86_64")]
mod four {
    pub use std::arch::x86_64::{
        __m128 as Four, _mm_add_ps, _mm_loadu_ps as load, _mm_mul_ps, _mm_set1_ps as splat, _mm_storeu_ps as store,
    };
    pub const FMA: bool = false;
    #[inline(always)]
    pub unsafe fn mul_add(a: Four, b: Four, c: Four) -> Four {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_add_ps(_mm_mul_ps(a, b), c) }
    }
}

/// NEON.
#[cfg(target_arch = "aarch64")]
mod four {
    pub use std::arch::aarch64::{
        float32x4_t as Four, vdupq_n_f32 as splat, vfmaq_f32, vld1q_f32 as load, vst1q_f32 as store,
    };
    pub const FMA: bool = true;
    #[inline(always)]
    pub unsafe fn mul_add(a: Four, b: Four, c: Four) -> Four {
        // SAFETY: NEON is part of aarch64.
        unsafe { vfmaq_f32(c, a, b) }
    }
}

/// Whatever there is.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod four {
    pub type Four = [f32; 4];
    pub const FMA: bool = false;
    #[inline(always)]
    pub unsafe fn splat(x: f32) -> Four {
        [x; 4]
    }
    #[inline(always)]
    pub unsafe fn load(p: *const f32) -> Four {
        // SAFETY: the caller vouches for four elements.
        unsafe { p.cast::<Four>().read_unaligned() }
    }
    #[inline(always)]
    pub unsafe fn store(p: *mut f32, x: Four) {
        // SAFETY: the caller vouches for four elements.
        unsafe { p.cast::<Four>().write_unaligned(x) }
    }
    #[inline(always)]
    pub unsafe fn mul_add(a: Four, b: Four, c: Four) -> Four {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
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
        #[inline(always)]
        unsafe fn dot(self, b: Self, c: Self) -> Self {
            // SAFETY: the caller is compiled for AVX512-BF16; the casts only name the bits anew.
            let pairs = |x: Avx512| unsafe { std::mem::transmute::<__m512, __m512bh>(x.0) };
            // SAFETY: as above.
            Self(Avx512(unsafe { _mm512_dpbf16_ps(c.0.0, pairs(self.0), pairs(b.0)) }))
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
}
