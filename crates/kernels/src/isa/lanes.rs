//! Vectors of f32, one type per level, and work that is written in them once.

use super::Level;

mod four;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

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
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// Where self > b, self, elsewhere b.
    unsafe fn max(self, b: Self) -> Self;
    /// Where self > b, x, elsewhere y.
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self;
    /// The bits of n, shifted into the exponent's field, are added to those of self.
    unsafe fn raise(self, n: Self) -> Self;
    /// Whether there is [`Lanes::scale`].
    const SCALES: bool = false;
    /// self times 2^n.
    unsafe fn scale(self, _n: Self) -> Self {
        unreachable!("asked for only where SCALES says so")
    }
    /// Whether there is [`Lanes::dot`].
    const PAIRS: bool = false;
    /// With each lane of self and b holding two bf16: c plus the products of both, the second's (in the high half)
    /// added first, each addition rounded.
    unsafe fn dot(self, _b: Self, _c: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
    }
    /// With [`Lanes::PAIRS`]: both rounded to bf16 (subnormal numbers to zero, which is what `dot` takes them for), those of
    /// self in the low halves.
    unsafe fn paired(self, _high: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
    }
    /// With [`Lanes::PAIRS`]: rounded likewise, first self's lanes in their order, then those of next.
    unsafe fn joined(self, _next: Self) -> Self {
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
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as above, here and below.
        Self(unsafe { four::add(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { four::sub(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { four::mul(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { four::greater(self.0, b.0, self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { four::greater(self.0, b.0, x.0, y.0) })
    }
    #[inline(always)]
    unsafe fn raise(self, n: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { four::raise(self.0, n.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Job, Lanes};
    use crate::testing::isas;
    use crate::{Elem, bf16};

    /// What every operation makes of two vectors.
    struct Each<'a>([&'a [f32]; 2], &'a mut Vec<[f32; 7]>);

    impl Job for Each<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            let [a, b] = self.0;
            let mut out = [[0.0; 16]; 7];
            for i in (0..a.len()).step_by(V::N) {
                // SAFETY: compiled for the level; both have whole vectors, and no vector is longer than 16.
                unsafe {
                    let (x, y) = (V::load(a[i..].as_ptr()), V::load(b[i..].as_ptr()));
                    let all = [
                        x.add(y),
                        x.sub(y),
                        x.mul(y),
                        x.max(y),
                        x.greater(y, y, x),
                        V::splat(1.5).raise(y),
                        if V::SCALES { x.scale(y) } else { x },
                    ];
                    all.into_iter().zip(&mut out).for_each(|(x, out)| x.store(out.as_mut_ptr()));
                }
                self.1.extend((0..V::N).map(|lane| out.map(|out| out[lane])));
            }
        }
    }

    #[test]
    fn operations_are_those_of_scalars() {
        let a: Vec<f32> = (0..64).map(|i| (i as f32 - 30.0) * 0.375).collect();
        let mut b: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 32.0).trunc()).collect();
        b[5] = f32::NEG_INFINITY;
        for isa in isas() {
            let mut found = Vec::new();
            isa.run(Each([&a, &b], &mut found));
            for ((&x, &y), found) in a.iter().zip(&b).zip(found) {
                let raised = f32::from_bits(1.5f32.to_bits().wrapping_add(y.to_bits() << 23));
                let (larger, smaller) = if x > y { (x, y) } else { (y, x) };
                let expected = [x + y, x - y, x * y, larger, smaller, raised];
                assert_eq!(
                    found[..6].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                    expected.map(f32::to_bits),
                    "{isa:?}"
                );
                assert!(found[6] == x || found[6] == x * y.exp2(), "{isa:?} {x} times 2^{y}: {}", found[6]);
            }
        }
    }

    /// Cells of the rounded elements of two rows, side by side and one after the other.
    struct Pairs<'a>([&'a [f32; 32]; 2], &'a mut Vec<[bf16; 32]>);

    impl Job for Pairs<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            if !V::PAIRS {
                return;
            }
            let [a, b] = self.0;
            let mut out = [[bf16::ZERO; 32]; 2];
            // SAFETY: compiled for the level, whose vectors have 16 lanes.
            unsafe {
                let (x, y) = (V::load(a.as_ptr()), V::load(b.as_ptr()));
                x.paired(y).store(out[0].as_mut_ptr().cast());
                x.joined(y).store(out[1].as_mut_ptr().cast());
            }
            self.1.extend(out);
        }
    }

    #[test]
    fn pairs_are_rounded() {
        let a: [f32; 32] = std::array::from_fn(|i| 1.0 + i as f32 * 0.001_3);
        let b: [f32; 32] = std::array::from_fn(|i| -3.0 - i as f32 * 0.004_7);
        for isa in isas() {
            let mut found = Vec::new();
            isa.run(Pairs([&a, &b], &mut found));
            if let [paired, joined] = &found[..] {
                let of = |from: &[f32; 32], i: usize| <bf16 as Elem>::round(from[i]);
                assert_eq!(*paired, std::array::from_fn(|i| of(if i % 2 == 0 { &a } else { &b }, i / 2)), "{isa:?}");
                assert_eq!(*joined, std::array::from_fn(|i| of(if i < 16 { &a } else { &b }, i % 16)), "{isa:?}");
            }
        }
    }
}
