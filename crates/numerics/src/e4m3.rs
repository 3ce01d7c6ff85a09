//! E4M3 as machine learning has it (the "fn" variant of Micikevicius et al., 2022, and OCP 8-bit floating point): a sign,
//! 4 bits of exponent with bias 7, 3 bits of fraction. There are no infinities; the largest number is 448 and the only
//! NaNs are 0x7f and 0xff. The smallest normal number is 2^-6, the smallest subnormal one 2^-9.

/// Largest number.
pub const MAX: f32 = 448.0;

/// What each code means; exact.
pub const TABLE: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = value(code as u8);
        code += 1;
    }
    table
};

const fn value(code: u8) -> f32 {
    let (sign, exponent, fraction) = ((code as u32 >> 7) << 31, (code as u32 >> 3) & 15, code as u32 & 7);
    let magnitude = match (exponent, fraction) {
        (15, 7) => 0x7fc0_0000,
        // Subnormal: fraction * 2^-9, exact in f32.
        (0, f) => (f as f32 * f32::from_bits((127 - 9) << 23)).to_bits(),
        (e, f) => (e + 120) << 23 | f << 20,
    };
    f32::from_bits(sign | magnitude)
}

/// The number that a code means.
#[inline]
pub fn decode(code: u8) -> f32 {
    TABLE[code as usize]
}

/// The nearest code, ties to the even one. It saturates: what lies beyond 448 becomes 448 with its sign, infinities too.
/// NaN becomes NaN (0x7f or 0xff).
#[inline]
pub fn encode(x: f32) -> u8 {
    /// Numbers between 2^14 and 2^15 are 2^-9 apart in f32: adding rounds to a multiple of the smallest subnormal.
    const SHIFT: f32 = 16384.0;
    /// 2^-6, below which codes are subnormal.
    const NORMAL: u32 = 121 << 23;
    let bits = x.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = (bits & 0x7fff_ffff).min(MAX.to_bits());
    // Half of the last place that stays, less one where that place is even: ties then round to even.
    let normal = ((magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    let subnormal = (f32::from_bits(magnitude) + SHIFT).to_bits() - SHIFT.to_bits();
    let code = if magnitude < NORMAL { subnormal } else { normal };
    sign | if x.is_nan() { 0x7f } else { code as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Every code against the definition, in f64.
    #[test]
    fn every_code_means_what_the_format_says() {
        for code in 0..=255u8 {
            let (sign, e, f) = (code >> 7, i32::from(code >> 3 & 15), f64::from(code & 7));
            let found = decode(code);
            if code & 0x7f == 0x7f {
                assert!(found.is_nan(), "{code:#04x}");
                continue;
            }
            let magnitude = if e == 0 { f / 8.0 * 2f64.powi(-6) } else { (1.0 + f / 8.0) * 2f64.powi(e - 7) };
            let expected = if sign == 1 { -magnitude } else { magnitude };
            assert_eq!(f64::from(found).to_bits(), expected.to_bits(), "{code:#04x}");
        }
        assert_eq!((decode(0x7e), decode(0x01), decode(0x08)), (448.0, 2f32.powi(-9), 2f32.powi(-6)));
    }

    #[test]
    fn codes_come_back() {
        for code in 0..=255u8 {
            assert_eq!(encode(decode(code)) & 0x7f, code & 0x7f, "{code:#04x}");
            if code & 0x7f != 0x7f {
                assert_eq!(encode(decode(code)), code, "the sign of {code:#04x}");
            }
        }
        assert_eq!((encode(f32::NAN), encode(-f32::NAN)), (0x7f, 0xff));
    }

    /// The obvious way: of all numbers the nearest, of two as near the one with the even code.
    fn nearest(x: f32) -> u8 {
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let distance = |code: u8| (f64::from(decode(code)) - f64::from(x.abs().min(MAX))).abs();
        let better = |a: u8, b: u8| match distance(a).total_cmp(&distance(b)) {
            std::cmp::Ordering::Equal if a.is_multiple_of(2) => a,
            std::cmp::Ordering::Less => a,
            _ => b,
        };
        sign | (1..0x7f).fold(0, |best, code| better(code, best))
    }

    /// All bf16 numbers.
    #[test]
    fn every_bf16_goes_to_the_nearest() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits).to_f32();
            if !x.is_nan() {
                assert_eq!(encode(x), nearest(x), "{x:e}");
            }
        }
    }

    /// The middle between neighbours, and the f32 numbers on both sides of it.
    #[test]
    fn ties_go_to_even_and_nothing_else_does() {
        for code in 0..0x7eu8 {
            let middle = (decode(code) + decode(code + 1)) / 2.0;
            let (below, above) = (middle.next_down(), middle.next_up());
            for sign in [1.0, -1.0] {
                let mark = if sign < 0.0 { 0x80 } else { 0 };
                assert_eq!(encode(sign * middle), mark | (code + code % 2), "{middle:e}");
                assert_eq!(encode(sign * below), mark | code, "below {middle:e}");
                assert_eq!(encode(sign * above), mark | (code + 1), "above {middle:e}");
            }
        }
    }

    #[test]
    fn beyond_the_largest_it_saturates() {
        for x in [448.0, 448.1, 463.9, 464.0, 480.0, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!((encode(x), encode(-x)), (0x7e, 0xfe), "{x:e}");
        }
        assert_eq!((encode(0.0), encode(-0.0), encode(1e-45), encode(-1e-45)), (0, 0x80, 0, 0x80));
    }
}
