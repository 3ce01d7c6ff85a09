//! Vectors of f32, one type per level, and work that is written in them once.

use super::Level;

/// A vector of f32 of one level.
///
/// # Safety
/// An implementor may be used only inside a function compiled for its level (see [`super::Isa::run`]), and `load` and
/// `store` reach `N` elements from the pointer.
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
    /// self * b + c.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Whether there is [`Lanes::dot`].
    const PAIRS: bool = false;
    /// With each lane of self and b holding two bf16: c plus the products of both, the second's (in the high half)
    /// added first, each addition rounded.
    unsafe fn dot(self, _b: Self, _c: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
    }
}

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
    use super::{Job, Lanes, Level};
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
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: the caller is compiled for AVX512F.
            Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
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
    }
}
