//! Elementary functions as straight-line arithmetic, which LLVM turns into vector code inside a loop: a call into the
//! C library per element would cost more than all else a softmax does.

use crate::isa::{Lanes, fma};

// The ends of the range in which e^x is a normal number; beyond them exponent arithmetic would wrap.
const LOWEST: f32 = -87.336_54;
const HIGHEST: f32 = 88.722_83;
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
// ln 2 in two parts, the first of 9 bits: its product with an integer below 2^9 is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;
// Of r^4, r^3, ... in P.
const P: [f32; 5] = [1.393_403_5e-3, 8.369_464e-3, 4.166_647_5e-2, 1.666_651_3e-1, 0.5];

/// e^x with an error below 1.5 units in the last place. Results below the smallest normal number are zero, those above
/// the largest are infinite, and a NaN stays one. Multiplications and additions are never fused, so that the result has
/// the same bits whatever instructions the loop around it is compiled to.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    exp_fused(false, x)
}

/// As [`exp`], with multiply-adds that round once if `fused`: faster where they are instructions, in other bits.
#[inline(always)]
pub(crate) fn exp_fused(fused: bool, x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln(2) / 2.
    let shifted = fma(fused, x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(fused, n, -LN2_LOW, fma(fused, n, -LN2_HIGH, x));
    // e^r = 1 + r + r^2 P(r): P interpolates at nodes chosen so that the relative error stays below 4.1e-9.
    let mut p = P[0];
    for c in &P[1..] {
        p = fma(fused, p, r, *c);
    }
    let y = fma(fused, p, r * r, r) + 1.0;
    // Times 2^n: n moves into the exponent field, and what the shift pushes out is the rounding constant's.
    let y = f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < LOWEST {
        0.0
    } else if x <= HIGHEST {
        y
    } else {
        x + f32::INFINITY
    }
}

/// [`exp_fused`] of vectors, in their level's bits, of all up to 1e38. In instructions by name: loops over
/// arrays of a group's scores leave them in memory.
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
pub(crate) unsafe fn exp_of<V: Lanes>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let shifted = x.mul_add(V::splat(std::f32::consts::LOG2_E), V::splat(ROUND));
        let n = shifted.sub(V::splat(ROUND));
        let r = n.mul_add(V::splat(-LN2_LOW), n.mul_add(V::splat(-LN2_HIGH), x));
        let mut p = V::splat(P[0]);
        for c in &P[1..] {
            p = p.mul_add(r, V::splat(*c));
        }
        let y = p.mul_add(r.mul(r), r).add(V::splat(1.0));
        let y = if V::SCALES {
            y.scale(n)
        } else {
            V::splat(HIGHEST.next_up()).greater(x, y.raise(shifted), x.add(V::splat(f32::INFINITY)))
        };
        V::splat(LOWEST).greater(x, V::splat(0.0), y)
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    sigmoid_fused(false, x)
}

/// As [`sigmoid`], of [`exp_fused`].
#[inline(always)]
pub(crate) fn sigmoid_fused(fused: bool, x: f32) -> f32 {
    1.0 / (1.0 + exp_fused(fused, -x))
}

// Of r^4, r^3, ... in 2^r, with a relative error below 3e-6, a thousandth of BF16's rounding, and exactly 1 at zero, which
// infinity needs.
const POWERS: [f32; 5] = [9.582_853e-3, 5.590_642_6e-2, 2.402_409_9e-1, 6.931_242e-1, 1.0];

/// 2^r for |r| <= 1/2.
#[inline(always)]
unsafe fn power_of<V: Lanes>(r: V) -> V {
    // SAFETY: the caller is compiled for the level.
    unsafe {
        let mut p = V::splat(POWERS[0]);
        for c in &POWERS[1..] {
            p = p.mul_add(r, V::splat(*c));
        }
        p
    }
}

/// e^-x for results that are rounded to BF16: with a relative error below 1e-5 where it is a normal number; below, at most
/// the least of those, and beyond, infinity. Of a NaN anything.
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
unsafe fn rough_exp_neg_of<V: Lanes>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        // e^-x = 2^t = 2^n 2^r.
        let t = x.mul(V::splat(-std::f32::consts::LOG2_E));
        if V::SCALES {
            let r = t.rest();
            power_of(r).scale(t.sub(r))
        } else {
            // Clamped, so that 2^n is a normal number or, at 128, infinity; there the rest is zero, for what is larger is
            // clamped to 128 itself.
            let t = t.min(V::splat(128.0)).max(V::splat(-126.0));
            let shifted = t.add(V::splat(ROUND));
            power_of(t.sub(shifted.sub(V::splat(ROUND)))).raise(shifted)
        }
    }
}

/// 1 / (1 + e^-x), as near as [`rough_exp_neg_of`].
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
pub(crate) unsafe fn rough_sigmoid_of<V: Lanes>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let one = V::splat(1.0);
        one.div(one.add(rough_exp_neg_of(x)))
    }
}

/// Sine and cosine of an angle up to 2^31, a few units of the last place of 1 off. A call into the C library for each
/// angle costs more than the rotation of all heads by it. Nothing is fused, as in [`exp`].
#[inline(always)]
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits of the sum.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    // pi / 2 in three parts, the first two of 22 bits: their products with an integer below 2^31 are exact.
    const HIGH: f64 = 3_294_198.0 / 2_097_152.0;
    const MIDDLE: f64 = 1_380_619.0 / 4_398_046_511_104.0;
    const LOW: f64 = 6.223_372_171_896_613e-14;

    // x = n pi / 2 + r with |r| <= pi / 4.
    let shifted = x * std::f64::consts::FRAC_2_PI + ROUND;
    let n = shifted - ROUND;
    let r = ((x - n * HIGH) - n * MIDDLE) - n * LOW;
    // Both series as far as r^16 / 16! < 1.1e-15.
    let square = r * r;
    let (mut s, mut c) = (-1.0 / 1_307_674_368_000.0, -1.0 / 87_178_291_200.0);
    for (odd, even) in [
        (6_227_020_800.0, 479_001_600.0),
        (-39_916_800.0, -3_628_800.0),
        (362_880.0, 40_320.0),
        (-5_040.0, -720.0),
        (120.0, 24.0),
        (-6.0, -2.0),
    ] {
        s = s * square + 1.0 / odd;
        c = c * square + 1.0 / even;
    }
    let (s, c) = (r + r * square * s, 1.0 + square * c);
    // Quarter turns exchange them and change their signs.
    let quarters = shifted.to_bits();
    let (sin, cos) = if quarters & 1 == 0 { (s, c) } else { (c, s) };
    let sign = |x: f64, quarters: u64| f64::from_bits(x.to_bits() ^ (quarters & 2) << 62);
    (sign(sin, quarters), sign(cos, quarters.wrapping_add(1)))
}

#[cfg(test)]
mod tests {
    use super::{exp, exp_fused, exp_of, rough_exp_neg_of, rough_sigmoid_of, sigmoid, sin_cos};
    use crate::Isa;
    use crate::isa::{Job, Lanes, vectorised};
    use crate::testing::isas;
    use std::hint::black_box;

    vectorised! {
        fn exp_all(isa: Isa, x: &mut [f32]) {
            x.iter_mut().for_each(|x| *x = exp(*x));
        }
    }

    struct ExpAll<'a>(&'a mut [f32], &'a mut bool);

    impl Job for ExpAll<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            *self.1 = V::FMA;
            self.0.iter_mut().for_each(|x| *x = exp_fused(V::FMA, *x));
        }
    }

    /// The vector loops give the bits of single calls.
    #[test]
    fn exp_in_a_loop_has_the_same_bits() {
        let x: Vec<f32> = (0..100_003).map(|i| -100.0 + 2e-3 * i as f32).collect();
        for isa in isas() {
            let (mut y, mut z, mut fused) = (x.clone(), x.clone(), false);
            exp_all(isa, &mut y);
            isa.run(ExpAll(&mut z, &mut fused));
            for ((x, y), z) in x.iter().zip(&y).zip(&z) {
                assert_eq!(black_box(exp(black_box(*x))).to_bits(), y.to_bits(), "{isa:?} {x}");
                assert_eq!(exp_fused(fused, *x).to_bits(), z.to_bits(), "{isa:?} {x}");
            }
        }
    }

    struct ExpOf<'a>(&'a mut [f32]);

    impl Job for ExpOf<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            for some in self.0.chunks_exact_mut(V::N) {
                // SAFETY: compiled for the level; a vector is read and written.
                unsafe { exp_of(V::load(some.as_ptr())).store(some.as_mut_ptr()) }
            }
        }
    }

    /// Vectors give the bits of single calls, beyond the normal range too.
    #[test]
    fn exp_of_vectors_has_the_same_bits() {
        let mut x: Vec<f32> = (0..200_000).map(|i| -100.0 + 1e-3 * i as f32).collect();
        x.extend([-87.336_54_f32, 88.722_83].iter().flat_map(|x| [*x, x.next_up(), x.next_down(), 0.0]));
        x.extend([f32::NEG_INFINITY, -3e38, -1e30, -1e4, -0.0, 1e-30, 200.0, f32::NAN]);
        for isa in isas() {
            let (mut y, mut z, mut fused) = (x.clone(), x.clone(), false);
            isa.run(ExpAll(&mut y, &mut fused));
            isa.run(ExpOf(&mut z));
            for ((x, y), z) in x.iter().zip(&y).zip(&z) {
                assert!(y.to_bits() == z.to_bits() || y.is_nan() && z.is_nan(), "{isa:?} {x}: {y}, {z}");
            }
        }
    }

    struct Rough<'a>(&'a mut [f32], &'a mut [f32]);

    impl Job for Rough<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            let Self(x, y) = self;
            for (x, y) in x.chunks_exact_mut(V::N).zip(y.chunks_exact_mut(V::N)) {
                // SAFETY: compiled for the level; vectors are read and written.
                unsafe {
                    let v = V::load(x.as_ptr());
                    rough_exp_neg_of(v).store(x.as_mut_ptr());
                    rough_sigmoid_of(v).store(y.as_mut_ptr());
                }
            }
        }
    }

    /// e^-x and sigmoid(x) for all x, of which there are whole vectors on every level.
    fn rough(isa: Isa, x: &[f32]) -> [Vec<f32>; 2] {
        assert!(x.len().is_multiple_of(16));
        let (mut exp, mut sigmoid) = (x.to_vec(), vec![0.0; x.len()]);
        isa.run(Rough(&mut exp, &mut sigmoid));
        [exp, sigmoid]
    }

    #[test]
    fn rough_exponentials_and_sigmoids_are_close_and_saturate() {
        let x: Vec<f32> = (0..400_000).map(|i| -88.0 + 4.4e-4 * i as f32).collect();
        let ends = [88.9, 100.0, 1e4, 1e10, 1e20, 1e30, f32::MAX, f32::INFINITY];
        let ends = ends.map(|x| [x, -x]).concat();
        for isa in isas() {
            let [exp, sigmoid] = rough(isa, &x);
            for ((&x, exp), sigmoid) in x.iter().zip(exp).zip(sigmoid) {
                let exact = (-f64::from(x)).exp();
                if x < 87.0 {
                    assert!((f64::from(exp) / exact - 1.0).abs() < 1e-5, "{isa:?} e^-{x} is {exp}");
                }
                assert!((f64::from(sigmoid) * (1.0 + exact) - 1.0).abs() < 1e-5, "{isa:?} sigmoid({x}) is {sigmoid}");
            }
            let [exp, sigmoid] = rough(isa, &ends);
            for (exp, sigmoid) in exp.as_chunks::<2>().0.iter().zip(sigmoid.as_chunks::<2>().0) {
                assert!((0.0..2e-38).contains(&exp[0]) && exp[1] == f32::INFINITY, "{isa:?} {exp:?}");
                assert_eq!(*sigmoid, [1.0, 0.0], "{isa:?}");
            }
            let zeros = [[0.0f32, -0.0]; 8].concat();
            assert_eq!(rough(isa, &zeros), [vec![1.0; 16], vec![0.5; 16]], "{isa:?}");
        }
    }

    /// Distance from e^x in units of the last place of the nearest f32.
    fn error(fused: bool, x: f32) -> f64 {
        let exact = f64::from(x).exp();
        let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
        (f64::from(exp_fused(fused, x)) - exact).abs() / ulp
    }

    #[test]
    fn exp_is_accurate_over_the_normal_range() {
        for fused in [false, true] {
            let error = |x| error(fused, x);
            let worst = (0..2_000_000).map(|i| error(-87.33 + 8.802_5e-5 * i as f32)).fold(0.0, f64::max);
            assert!(worst < 1.5, "{worst} ulp");
            // Between the integers and halves of the reduction, and near zero, where the result is near 1.
            let near_zero = (0..200_000).map(|i| error(1e-5 * (i - 100_000) as f32)).fold(0.0, f64::max);
            assert!(near_zero < 1.5, "{near_zero} ulp");
            assert_eq!(exp_fused(fused, 0.0), 1.0);
            assert_eq!(exp_fused(fused, -0.0), 1.0);
        }
    }

    /// The last arguments on both sides of each end of the normal range.
    #[test]
    fn exp_at_its_ends() {
        for fused in [false, true] {
            let exp = |x| exp_fused(fused, x);
            let lowest = -87.336_54_f32;
            assert!(exp(lowest).is_normal() && error(fused, lowest) < 1.5, "{}", exp(lowest));
            assert_eq!(exp(lowest.next_down()), 0.0);
            let highest = 88.722_83_f32;
            assert!(exp(highest).is_finite() && error(fused, highest) < 1.5, "{}", exp(highest));
            assert_eq!(exp(highest.next_up()), f32::INFINITY);
            for x in [-88.0, -1e4, -1e30, -3e38, f32::NEG_INFINITY] {
                assert_eq!(exp(x), 0.0, "{x}");
            }
            for x in [89.0, 1e4, 3e38, f32::INFINITY] {
                assert_eq!(exp(x), f32::INFINITY, "{x}");
            }
            assert!(exp(f32::NAN).is_nan());
        }
    }

    #[test]
    fn sigmoid_at_its_ends() {
        assert_eq!((sigmoid(0.0), sigmoid(200.0), sigmoid(-200.0)), (0.5, 1.0, 0.0));
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(sigmoid(f32::NAN).is_nan());
    }

    /// Angles of all sizes that a position times a frequency of at most 1 can have, both signs.
    #[test]
    fn sin_cos_is_that_of_the_library() {
        let mut worst = 0.0f64;
        for i in 0..400_000 {
            let f = f64::from(i) / 400_000.0;
            for x in [8.0 * f, 1000.0 * f, 2e5 * f, 2_147_483_648.0 * f, -7.0 * f, -2_147_483_648.0 * f] {
                let (sin, cos) = sin_cos(black_box(x));
                worst = worst.max((sin - x.sin()).abs()).max((cos - x.cos()).abs());
            }
        }
        assert!(worst < 2e-15, "{worst}");
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
        assert!(sin_cos(f64::NAN).0.is_nan() && sin_cos(f64::INFINITY).1.is_nan());
    }
}
