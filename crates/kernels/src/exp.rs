//! The exponential as straight-line f32 arithmetic, so that loops over it become vector code on any ISA, and so that its
//! bits depend on no system library. Within 2 units in the last place of the true value, subnormal results included.

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts: the first has 9 significant bits, so that its product with any exponent is exact.
const LN2_HI: f32 = 0.693_359_375;
const LN2_LO: f32 = (std::f64::consts::LN_2 - 0.693_359_375) as f32;
/// 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// e^x. Overflows to infinity above 88.73, underflows to zero below -103.98; a NaN stays one.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons that are false for a NaN let it through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let t = x * LOG2_E + ROUNDER;
    let n = t - ROUNDER;
    let r = (x - n * LN2_HI) - n * LN2_LO;
    // |r| <= ln(2) / 2: the first term left out of the series is below 6e-9.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    // 2^n in two factors: n reaches 128 and -150, which no single f32 exponent holds.
    let n = (t.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_two_units_in_the_last_place() {
        for i in -104_000..89_000 {
            let x = i as f32 * 1e-3 + 3.3e-4;
            let (found, expected) = (exp(x), f64::from(x).exp());
            if expected > f64::from(f32::MAX) {
                assert_eq!(found, f32::INFINITY, "exp({x})");
                continue;
            }
            let rounded = expected as f32;
            let unit = f64::from(f32::from_bits(rounded.to_bits() + 1) - rounded);
            let error = (f64::from(found) - expected).abs() / unit;
            assert!(error <= 2.0, "exp({x}): {found}, expected {expected}, {error} units");
        }
    }

    #[test]
    fn ends_and_specials() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-f32::NAN).is_nan());
        assert_eq!(sigmoid(200.0), 1.0);
        assert_eq!(sigmoid(-200.0), 0.0);
        assert_eq!(sigmoid(0.0), 0.5);
        assert!(sigmoid(f32::NAN).is_nan());
    }
}
