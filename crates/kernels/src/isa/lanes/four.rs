//! Four floats, in intrinsics: arrays of four are taken apart into scalars when many of them should stay in registers.

#[cfg(target_arch = "aarch64")]
pub use neon::*;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use plain::*;
#[cfg(target_arch = "x86_64")]
pub use sse2::*;

/// SSE2.
#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::*;
    pub use std::arch::x86_64::{
        __m128 as Four, _mm_add_ps as add, _mm_div_ps as div, _mm_loadu_ps as load, _mm_mul_ps as mul,
        _mm_set1_ps as splat, _mm_storeu_ps as store, _mm_sub_ps as sub,
    };
    pub const FMA: bool = false;
    #[inline(always)]
    pub unsafe fn mul_add(a: Four, b: Four, c: Four) -> Four {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { add(mul(a, b), c) }
    }
    #[inline(always)]
    pub unsafe fn greater(a: Four, b: Four, x: Four, y: Four) -> Four {
        // SAFETY: as above.
        unsafe {
            let is = _mm_cmpgt_ps(a, b);
            _mm_or_ps(_mm_and_ps(is, x), _mm_andnot_ps(is, y))
        }
    }
    #[inline(always)]
    pub unsafe fn raise(a: Four, n: Four) -> Four {
        // SAFETY: as above.
        unsafe { _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a), _mm_slli_epi32::<23>(_mm_castps_si128(n)))) }
    }
}

/// NEON.
#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;
    pub use std::arch::aarch64::{
        float32x4_t as Four, vaddq_f32 as add, vdivq_f32 as div, vdupq_n_f32 as splat, vld1q_f32 as load,
        vmulq_f32 as mul, vst1q_f32 as store, vsubq_f32 as sub,
    };
    pub const FMA: bool = true;
    #[inline(always)]
    pub unsafe fn mul_add(a: Four, b: Four, c: Four) -> Four {
        // SAFETY: NEON is part of aarch64.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    pub unsafe fn greater(a: Four, b: Four, x: Four, y: Four) -> Four {
        // SAFETY: as above.
        unsafe { vbslq_f32(vcgtq_f32(a, b), x, y) }
    }
    #[inline(always)]
    pub unsafe fn raise(a: Four, n: Four) -> Four {
        // SAFETY: as above.
        unsafe {
            let shifted = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a), shifted))
        }
    }
}

/// Whatever there is.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod plain {
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
    #[inline(always)]
    pub unsafe fn add(a: Four, b: Four) -> Four {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    pub unsafe fn sub(a: Four, b: Four) -> Four {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    pub unsafe fn mul(a: Four, b: Four) -> Four {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    pub unsafe fn div(a: Four, b: Four) -> Four {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    pub unsafe fn greater(a: Four, b: Four, x: Four, y: Four) -> Four {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    pub unsafe fn raise(a: Four, n: Four) -> Four {
        std::array::from_fn(|i| f32::from_bits(a[i].to_bits().wrapping_add(n[i].to_bits() << 23)))
    }
}
