//! Rounding and alignment.

use super::*;

/// Every bf16 value, and every midpoint's neighbours, round as the `half` crate rounds.
#[test]
fn bf16_rounding_agrees_with_half() {
    for hi in 0..=u16::MAX {
        for lo in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(hi) << 16 | lo);
            let (a, b) = (<bf16 as Elem>::round(x), bf16::from_f32(x));
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{x:e}: {a:?} {b:?}");
        }
    }
}

#[test]
fn buffers_are_zeroed_and_aligned() {
    for n in [0usize, 1, 63, 1000] {
        let b = Buf::host_zeros(DType::Bf16, n);
        assert_eq!(b.len(), n);
        assert!(b.view().bf16().iter().all(|x| x.to_bits() == 0));
        if n > 0 {
            assert_eq!(b.view().bf16().as_ptr() as usize % 256, 0);
        }
    }
}
