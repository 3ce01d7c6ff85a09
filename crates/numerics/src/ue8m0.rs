//! UE8M0: a byte that is a power of two, 2^(byte - 127); 255 is NaN. There is no sign, no zero and no infinity. Scales of
//! blocks are kept in it, so that multiplying by them rounds nothing.

/// The byte that means NaN.
pub const NAN: u8 = 255;

/// The number that a byte means; exact (2^-127 is subnormal in f32).
#[inline]
pub fn decode(byte: u8) -> f32 {
    match byte {
        NAN => f32::NAN,
        0 => f32::from_bits(1 << 22),
        e => f32::from_bits(u32::from(e) << 23),
    }
}

/// The byte of a power of two from 2^-127 to 2^127; None for any other number.
#[inline]
pub fn encode(x: f32) -> Option<u8> {
    let bits = x.to_bits();
    match (bits >> 23, bits & 0x7f_ffff) {
        (0, 0x40_0000) => Some(0),
        (e @ 1..=254, 0) => Some(e as u8),
        _ => None,
    }
}

/// 2^ceil(log2 x): the least power of two that is not below `x`, a positive normal number of at most 2^127.
#[inline]
pub fn ceil(x: f32) -> f32 {
    debug_assert!((f32::MIN_POSITIVE..=f32::from_bits(254 << 23)).contains(&x), "no power of two to round {x:e} to");
    f32::from_bits((x.to_bits() + 0x7f_ffff) & 0x7f80_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte() {
        for byte in 0..=254u8 {
            let x = decode(byte);
            assert_eq!(f64::from(x), 2f64.powi(i32::from(byte) - 127), "{byte}");
            assert_eq!(encode(x), Some(byte));
        }
        assert!(decode(NAN).is_nan());
        for x in [0.0, -1.0, 3.0, f32::NAN, f32::INFINITY, 1.5, 1e-45, f32::MIN_POSITIVE / 4.0] {
            assert_eq!(encode(x), None, "{x:e}");
        }
    }

    #[test]
    fn rounding_goes_up_to_the_next_power() {
        for e in -126..=126 {
            let x = 2f32.powi(e);
            assert_eq!((ceil(x), ceil(x.next_up()), ceil(1.99 * x)), (x, 2.0 * x, 2.0 * x), "2^{e}");
        }
        assert_eq!(ceil(2f32.powi(127)), 2f32.powi(127));
    }
}
