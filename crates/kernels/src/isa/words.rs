//! Vectors of words of 32 bits, two BF16 each, and the arithmetic of gates on both halves. In instructions by name: what
//! the compiler makes of plain loops over e^x clamps and selects where an instruction saturates by itself, and asks for
//! nothing ahead of time, without which such loops wait for memory two thirds of their time.

use super::Isa;

/// Bytes of a cache line, which a job takes in at a time.
pub(crate) const LINE: usize = 64;
/// Elements of BF16 in a line.
pub(crate) const LINE_ELEMENTS: usize = LINE / 2;
/// A line is asked for so many bytes before its turn, at least where rows are short and at most where they are long.
const AHEAD: [usize; 2] = [4 << 10, 8 << 10];

/// Vectors of one level: of f32, and of as many words.
///
/// # Safety
/// An implementor may be used only inside a function compiled for its level; `load` and `store` reach `4 * N` bytes from
/// the pointer, aligned or not.
pub(crate) unsafe trait Words: Copy {
    /// Lanes.
    const N: usize;
    /// N words.
    type Pairs: Copy;
    unsafe fn load(from: *const u8) -> Self::Pairs;
    unsafe fn store(words: Self::Pairs, to: *mut u8);
    /// The first of every word's elements, widened.
    unsafe fn low(words: Self::Pairs) -> Self;
    /// The second ones.
    unsafe fn high(words: Self::Pairs) -> Self;
    /// Both, rounded to nearest even. A NaN whose lower 16 bits are zero stays one, and BF16 and arithmetic on them make no
    /// others. Subnormal numbers may become zeros.
    unsafe fn pack(low: Self, high: Self) -> Self::Pairs;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// self * b + c, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// -x log2 e as a whole number and a rest within half of 1. Where the power is beyond f32, the number is one that
    /// [`Words::scale`] makes zero, or next to it, or infinity.
    unsafe fn split(self) -> (Self::Whole, Self);
    /// What `split` and `scale` pass on.
    type Whole: Copy;
    /// self, within 1/sqrt(2) and sqrt(2), times 2^n.
    unsafe fn scale(self, n: Self::Whole) -> Self;
    /// Writes the lanes.
    unsafe fn lanes(self, to: &mut [f32; 16]);

    /// e^-x with a relative error below 1e-5 where it is a normal number; below, at most the least of those, and beyond,
    /// infinity. Of a NaN anything.
    #[inline(always)]
    unsafe fn exp_neg(self) -> Self {
        // SAFETY: the caller is compiled for the level, here and below.
        unsafe {
            let (n, r) = self.split();
            // 2^r = 1 + r P(r) with a relative error below 3e-6, a thousandth of BF16's rounding, and exactly 1 at zero,
            // which infinity needs.
            let mut p = Self::splat(POWERS[3]);
            for c in [POWERS[2], POWERS[1], POWERS[0], 1.0] {
                p = p.mul_add(r, Self::splat(c));
            }
            p.scale(n)
        }
    }

    /// 1 / (1 + e^-x).
    #[inline(always)]
    unsafe fn sigmoid(self) -> Self {
        // SAFETY: as above.
        unsafe {
            let one = Self::splat(1.0);
            one.div(one.add(self.exp_neg()))
        }
    }
}

/// Of r, r^2, ... in 2^r.
const POWERS: [f32; 4] = [6.931_242e-1, 2.402_409_9e-1, 5.590_642_6e-2, 9.582_853e-3];

/// Work on vectors of words; `run` must be `#[inline(always)]`, as must all it calls.
pub(crate) trait WordJob {
    fn run<W: Words>(self);
}

/// The distance at which lines of rows `row` bytes long are asked for: whole rows, if one is not too far.
pub(crate) fn ahead(row: usize) -> usize {
    let [least, most] = AHEAD;
    (row * (least / row.max(1)).max(1)).min(most)
}

impl Isa {
    /// Does the job, compiled for this level, if the level has vectors of words.
    #[inline(always)]
    pub(crate) fn run_words(self, job: impl WordJob) {
        #[cfg(target_arch = "x86_64")]
        match self.level() {
            // SAFETY: this CPU has the level.
            super::Level::Amx | super::Level::Avx512Bf16 => unsafe { x86::run_avx512bf16(job) },
            // SAFETY: as above.
            super::Level::Avx512 => unsafe { x86::run_avx512(job) },
            // SAFETY: as above.
            super::Level::Avx2 => unsafe { x86::run_avx2(job) },
            super::Level::Portable => unreachable!("asked for only where has_words says so"),
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = job;
            unreachable!("asked for only where has_words says so")
        }
    }

    /// Whether there is [`Isa::run_words`].
    #[inline(always)]
    pub(crate) fn has_words(self) -> bool {
        self.level() >= super::Level::Avx2
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{WordJob, Words};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn run_avx512bf16(job: impl WordJob) {
        job.run::<Avx512<true>>();
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub fn run_avx512(job: impl WordJob) {
        job.run::<Avx512<false>>();
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn run_avx2(job: impl WordJob) {
        job.run::<Avx2>();
    }

    const HIGH: i32 = 0xffff_0000_u32 as i32;

    /// With the instruction that rounds to BF16, or without.
    #[derive(Clone, Copy)]
    pub struct Avx512<const ROUNDS: bool>(__m512);

    /// [`Words::pack`]'s order of what vcvtne2ps2bf16 leaves: all low ones, then all high ones.
    const TURNS: [u16; 32] = {
        let mut turns = [0; 32];
        let mut i = 0;
        while i < 32 {
            turns[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        turns
    };

    // SAFETY: reached only through functions compiled for AVX-512, with BF16 where ROUNDS says so. In all of it the caller
    // is compiled for the level and vouches for the memory, which is what every block below asks for.
    unsafe impl<const ROUNDS: bool> Words for Avx512<ROUNDS> {
        const N: usize = 16;
        type Pairs = __m512i;
        type Whole = __m512;
        #[inline(always)]
        unsafe fn load(from: *const u8) -> __m512i {
            // SAFETY: see above.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store(words: __m512i, to: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_si512(to.cast(), words) }
        }
        #[inline(always)]
        unsafe fn low(words: __m512i) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)) })
        }
        #[inline(always)]
        unsafe fn high(words: __m512i) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(HIGH))) })
        }
        #[inline(always)]
        unsafe fn pack(low: Self, high: Self) -> __m512i {
            // SAFETY: see above; the transmute only names the bits anew.
            unsafe {
                if ROUNDS {
                    let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high.0, low.0));
                    return _mm512_permutexvar_epi16(_mm512_loadu_si512(TURNS.as_ptr().cast()), both);
                }
                let rounded = |x: Self| {
                    let bits = _mm512_castps_si512(x.0);
                    let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
                    let half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
                    _mm512_add_epi32(bits, half)
                };
                _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(rounded(low)), rounded(high))
            }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_div_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        /// The rest of an infinity is zero, and vscalefps saturates.
        #[inline(always)]
        unsafe fn split(self) -> (__m512, Self) {
            // SAFETY: see above.
            unsafe {
                let t = _mm512_mul_ps(self.0, _mm512_set1_ps(-std::f32::consts::LOG2_E));
                let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(t);
                (_mm512_sub_ps(t, r), Self(r))
            }
        }
        #[inline(always)]
        unsafe fn scale(self, n: __m512) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_scalef_ps(self.0, n) })
        }
        #[inline(always)]
        unsafe fn lanes(self, to: &mut [f32; 16]) {
            // SAFETY: see above; all 16 are written.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
    }

    #[derive(Clone, Copy)]
    pub struct Avx2(__m256);

    // SAFETY: reached only through `run_avx2`, and as above.
    unsafe impl Words for Avx2 {
        const N: usize = 8;
        type Pairs = __m256i;
        type Whole = __m256;
        #[inline(always)]
        unsafe fn load(from: *const u8) -> __m256i {
            // SAFETY: see above.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store(words: __m256i, to: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_si256(to.cast(), words) }
        }
        #[inline(always)]
        unsafe fn low(words: __m256i) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)) })
        }
        #[inline(always)]
        unsafe fn high(words: __m256i) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(HIGH))) })
        }
        #[inline(always)]
        unsafe fn pack(low: Self, high: Self) -> __m256i {
            // SAFETY: see above.
            unsafe {
                let rounded = |x: Self| {
                    let bits = _mm256_castps_si256(x.0);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
                };
                _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(rounded(low)), rounded(high))
            }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_set1_ps(x) })
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_div_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
        }
        /// The number is in the low bits of what is passed on. Clamped, so that 2^n is a normal number or, at 128,
        /// infinity; there the rest is zero, for what is larger is clamped to 128 itself.
        #[inline(always)]
        unsafe fn split(self) -> (__m256, Self) {
            // SAFETY: see above.
            unsafe {
                // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
                let round = _mm256_set1_ps(12_582_912.0);
                let t = _mm256_mul_ps(self.0, _mm256_set1_ps(-std::f32::consts::LOG2_E));
                let t = _mm256_max_ps(_mm256_min_ps(t, _mm256_set1_ps(128.0)), _mm256_set1_ps(-126.0));
                let shifted = _mm256_add_ps(t, round);
                (shifted, Self(_mm256_sub_ps(t, _mm256_sub_ps(shifted, round))))
            }
        }
        #[inline(always)]
        unsafe fn scale(self, n: __m256) -> Self {
            // SAFETY: see above.
            unsafe {
                let exponents = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                Self(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(self.0), exponents)))
            }
        }
        #[inline(always)]
        unsafe fn lanes(self, to: &mut [f32; 16]) {
            // SAFETY: see above; the first eight are written.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), self.0) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::testing::isas;

    /// The result of `f` for every element of a line.
    struct Each<'a> {
        x: &'a [f32],
        exp: &'a mut Vec<f32>,
        sigmoid: &'a mut Vec<f32>,
    }

    impl WordJob for Each<'_> {
        #[inline(always)]
        fn run<W: Words>(self) {
            for &x in self.x {
                let (mut exp, mut sigmoid) = ([f32::NAN; 16], [f32::NAN; 16]);
                // SAFETY: the caller is compiled for the level.
                unsafe {
                    W::splat(x).exp_neg().lanes(&mut exp);
                    W::splat(x).sigmoid().lanes(&mut sigmoid);
                }
                assert!(exp[..W::N].iter().all(|y| y.to_bits() == exp[0].to_bits()));
                self.exp.push(exp[0]);
                self.sigmoid.push(sigmoid[0]);
            }
        }
    }

    fn each(isa: Isa, x: &[f32]) -> [Vec<f32>; 2] {
        let (mut exp, mut sigmoid) = (Vec::new(), Vec::new());
        isa.run_words(Each { x, exp: &mut exp, sigmoid: &mut sigmoid });
        [exp, sigmoid]
    }

    #[test]
    fn exponentials_and_sigmoids_are_close_and_saturate() {
        let x: Vec<f32> = (0..400_000).map(|i| -88.0 + 4.4e-4 * i as f32).collect();
        let ends = [88.9, 100.0, 1e4, 1e30, f32::MAX, f32::INFINITY];
        for isa in isas().into_iter().filter(|isa| isa.has_words()) {
            let [exp, sigmoid] = each(isa, &x);
            for ((&x, exp), sigmoid) in x.iter().zip(exp).zip(sigmoid) {
                let exact = (-f64::from(x)).exp();
                if x < 87.0 {
                    assert!((f64::from(exp) / exact - 1.0).abs() < 1e-5, "{isa:?} e^-{x} is {exp}");
                }
                assert!((f64::from(sigmoid) * (1.0 + exact) - 1.0).abs() < 1e-5, "{isa:?} sigmoid({x}) is {sigmoid}");
            }
            let [exp, sigmoid] = each(isa, &ends);
            assert!(
                exp.iter().all(|&y| (0.0..2e-38).contains(&y)) && sigmoid == [1.0; 6],
                "{isa:?} {exp:?} {sigmoid:?}"
            );
            let [exp, sigmoid] = each(isa, &ends.map(|x| -x));
            assert!(exp == [f32::INFINITY; 6] && sigmoid == [0.0; 6], "{isa:?} {exp:?} {sigmoid:?}");
            assert_eq!(each(isa, &[0.0, -0.0]), [vec![1.0; 2], vec![0.5; 2]], "{isa:?}");
        }
    }
}
