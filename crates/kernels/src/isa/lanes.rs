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
    unsafe fn div(self, b: Self) -> Self;
    /// Where self > b, self, elsewhere b.
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the caller's promise.
        unsafe { self.greater(b, self, b) }
    }
    /// Where self < b, self, elsewhere b.
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the caller's promise.
        unsafe { b.greater(self, self, b) }
    }
    /// Where self > b, x, elsewhere y.
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self;
    /// The bits of n, shifted into the exponent's field, are added to those of self.
    unsafe fn raise(self, n: Self) -> Self;
    /// Whether there are [`Lanes::scale`] and [`Lanes::rest`].
    const SCALES: bool = false;
    /// self times 2^n for whole n; beyond f32's range it saturates.
    unsafe fn scale(self, _n: Self) -> Self {
        unreachable!("asked for only where SCALES says so")
    }
    /// self less the nearest whole number, 0 of an infinity.
    unsafe fn rest(self) -> Self {
        unreachable!("asked for only where SCALES says so")
    }
    /// Whether lanes may hold words of two bf16: [`Lanes::halves`], [`Lanes::paired`], [`Lanes::turned`]. From
    /// [`Level::Avx2`] on.
    const WORDS: bool = false;
    /// Both bf16 of each lane, widened: those in the low halves, then those in the high halves.
    unsafe fn halves(self) -> [Self; 2] {
        unreachable!("asked for only where WORDS says so")
    }
    /// Both rounded to bf16, to nearest even, those of self in the low halves. Subnormal numbers may become zeros, and do
    /// with [`Lanes::PAIRS`], whose `dot` takes them for such. Without, a NaN is sure to stay one only if its lower 16
    /// bits are zero: bf16 and arithmetic on them make no others.
    unsafe fn paired(self, _high: Self) -> Self {
        unreachable!("asked for only where WORDS says so")
    }
    /// The transpose of `N` rows of eight words, `apart` bytes from one to the next, aligned or not: vector i has word i
    /// of every row.
    unsafe fn turned(_rows: *const u8, _apart: usize) -> [Self; TURNED] {
        unreachable!("asked for only where WORDS says so")
    }
    /// Whether there are [`Lanes::dot`] and [`Lanes::joined`].
    const PAIRS: bool = false;
    /// With each lane of self and b holding two bf16: c plus the products of both, the second's (in the high half)
    /// added first, each addition rounded.
    unsafe fn dot(self, _b: Self, _c: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
    }
    /// As [`Lanes::paired`], but first self's lanes in their order, then those of next.
    unsafe fn joined(self, _next: Self) -> Self {
        unreachable!("asked for only where PAIRS says so")
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

/// The methods of [`Lanes`] that are a function of the level each, by the function's name.
macro_rules! by_name {
    (splat: $splat:path, load: $load:path, store: $store:path, mul_add: $mul_add:path, $($of_two:ident: $name:path),*) => {
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            // SAFETY: the caller is compiled for the level, here and below.
            Self(unsafe { $splat(x) })
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: as above, and the caller vouches for N elements.
            Self(unsafe { $load(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: as above, and the caller vouches for N elements.
            unsafe { $store(p, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { $mul_add(self.0, b.0, c.0) })
        }
        $(#[inline(always)]
        unsafe fn $of_two(self, b: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { $name(self.0, b.0) })
        })*
    };
}
#[cfg(target_arch = "x86_64")]
use by_name;

/// Four floats as every CPU of the build's target has them.
#[derive(Clone, Copy)]
pub(crate) struct Portable(four::Four);

// SAFETY: nothing beyond the build's own target is needed.
unsafe impl Lanes for Portable {
    const LEVEL: Level = Level::Portable;
    const N: usize = 4;
    const FMA: bool = four::FMA;
    by_name! {
        splat: four::splat, load: four::load, store: four::store, mul_add: four::mul_add,
        add: four::add, sub: four::sub, mul: four::mul, div: four::div, raise: four::raise
    }
    #[inline(always)]
    unsafe fn greater(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: part of the build's target.
        Self(unsafe { four::greater(self.0, b.0, x.0, y.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Job, Lanes};
    use crate::testing::isas;
    use crate::{Elem, bf16};

    /// What every operation makes of two vectors.
    struct Each<'a>([&'a [f32]; 2], &'a mut Vec<[f32; 10]>);

    impl Job for Each<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            let [a, b] = self.0;
            let mut out = [[0.0; 16]; 10];
            for i in (0..a.len()).step_by(V::N) {
                // SAFETY: compiled for the level; both have whole vectors, and no vector is longer than 16.
                unsafe {
                    let (x, y) = (V::load(a[i..].as_ptr()), V::load(b[i..].as_ptr()));
                    let all = [
                        x.add(y),
                        x.sub(y),
                        x.mul(y),
                        x.div(y),
                        x.max(y),
                        x.min(y),
                        x.greater(y, y, x),
                        V::splat(1.5).raise(y),
                        if V::SCALES { x.scale(y) } else { x },
                        if V::SCALES { x.rest() } else { x },
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
                let expected = [x + y, x - y, x * y, x / y, larger, smaller, smaller, raised];
                assert_eq!(
                    found[..8].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                    expected.map(f32::to_bits),
                    "{isa:?}"
                );
                assert!(found[8] == x || found[8] == x * y.exp2(), "{isa:?} {x} times 2^{y}: {}", found[8]);
                assert!(found[9] == x || found[9] == x - x.round_ties_even(), "{isa:?} rest of {x}: {}", found[9]);
            }
        }
    }

    /// Words of the rounded elements of two rows: side by side, split again and, if there is such a thing, one row after
    /// the other.
    struct Rounded<'a>([&'a [f32; 16]; 2], &'a mut Vec<[f32; 2]>, &'a mut Vec<[bf16; 32]>);

    impl Job for Rounded<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            let Self([a, b], halves, joined) = self;
            if !V::WORDS {
                return;
            }
            for i in (0..16).step_by(V::N) {
                let mut out = [[0.0; 16]; 2];
                // SAFETY: compiled for the level; both have whole vectors, and no vector is longer than 16.
                unsafe {
                    let (x, y) = (V::load(a[i..].as_ptr()), V::load(b[i..].as_ptr()));
                    x.paired(y).halves().into_iter().zip(&mut out).for_each(|(x, out)| x.store(out.as_mut_ptr()));
                    if V::PAIRS {
                        let mut both = [bf16::ZERO; 32];
                        x.joined(y).store(both.as_mut_ptr().cast());
                        joined.push(both);
                    }
                }
                halves.extend((0..V::N).map(|lane| out.map(|out| out[lane])));
            }
        }
    }

    /// Every bf16 with what is just below, at and just above half a unit of its last place, side by side with another.
    #[test]
    fn words_are_rounded() {
        let of = |x: f32| <bf16 as Elem>::round(x);
        let all = (0..=u16::MAX).flat_map(|high| [0, 0x7fff, 0x8000, 0x8001].map(|low| u32::from(high) << 16 | low));
        // Of NaNs only those that bf16 has, and of subnormal numbers none, as the trait says.
        let all = all.filter(|&bits| !f32::from_bits(bits).is_subnormal());
        let all: Vec<_> = all.map(f32::from_bits).filter(|x| !x.is_nan() || x.to_bits() & 0xffff == 0).collect();
        for isa in isas() {
            for (a, b) in all.as_chunks().0.iter().zip(all.as_chunks().0.iter().rev()) {
                let (mut halves, mut joined) = (Vec::new(), Vec::new());
                isa.run(Rounded([a, b], &mut halves, &mut joined));
                for (i, found) in halves.into_iter().enumerate() {
                    let same = |x: f32, y: f32| x.to_bits() == of(y).f32().to_bits() || x.is_nan() && y.is_nan();
                    assert!(same(found[0], a[i]) && same(found[1], b[i]), "{isa:?} {} {}: {found:?}", a[i], b[i]);
                }
                for joined in joined {
                    let expected: [bf16; 32] = std::array::from_fn(|i| of(if i < 16 { a[i] } else { b[i - 16] }));
                    let same = joined
                        .iter()
                        .zip(expected)
                        .all(|(x, y)| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan());
                    assert!(same, "{isa:?} {a:?} {b:?}: {joined:?}");
                }
            }
        }
    }
}
