//! Element types: what a number is in memory, and how it is widened and rounded.

use super::{View, ViewMut};
use hadal_numerics::bf16;

/// Element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// Token ids, indices, counts, offsets.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for i32 {}
    impl Sealed for u32 {}
}

/// A plain element type: any bit pattern is valid, zero bytes are zero.
pub trait Pod: sealed::Sealed + Copy + Send + Sync + 'static {}
impl Pod for f32 {}
impl Pod for bf16 {}
impl Pod for i32 {}
impl Pod for u32 {}

/// An activation type: f32 or bf16. Arithmetic is in f32, one rounding on store.
pub trait Elem: Pod + bytemuck::Pod {
    /// Its tag.
    const DTYPE: DType;
    /// Exact widening.
    fn f32(self) -> f32;
    /// Rounds to nearest even.
    fn round(x: f32) -> Self;
    /// Elements in a word of 32 bits.
    const PARTS: usize;
    /// Element `i` of a word, widened: for a vector of words a shift or a mask, where a vector of elements is taken apart.
    fn part(word: u32, i: usize) -> f32;
    /// The first [`Elem::PARTS`], rounded, as a word.
    fn word(parts: [f32; 2]) -> u32;
    /// The view's elements; panics on another dtype (a contract breach).
    fn of(v: View<'_>) -> &[Self];
    /// As `of`, to write.
    fn of_mut(v: ViewMut<'_>) -> &mut [Self];
    /// A view of these elements.
    fn view(x: &[Self]) -> View<'_>;
    /// The bytes of these elements.
    fn bytes(x: &[Self]) -> &[u8];
}

impl Elem for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
    const PARTS: usize = 1;
    #[inline(always)]
    fn part(word: u32, _: usize) -> f32 {
        f32::from_bits(word)
    }
    #[inline(always)]
    fn word([x, _]: [f32; 2]) -> u32 {
        x.to_bits()
    }
    fn of(v: View<'_>) -> &[Self] {
        v.f32()
    }
    fn of_mut(v: ViewMut<'_>) -> &mut [Self] {
        v.f32()
    }
    fn view(x: &[Self]) -> View<'_> {
        View::F32(x)
    }
    fn bytes(x: &[Self]) -> &[u8] {
        bytemuck::cast_slice(x)
    }
}

impl Elem for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        // The choice between NaN and number is made before the bits are narrowed, so that a vector is narrowed once.
        bf16::from_bits((rounded_bits(x) >> 16) as u16)
    }
    const PARTS: usize = 2;
    #[inline(always)]
    fn part(word: u32, i: usize) -> f32 {
        f32::from_bits(if i == 0 { word << 16 } else { word & 0xffff_0000 })
    }
    #[inline(always)]
    fn word([low, high]: [f32; 2]) -> u32 {
        rounded_bits(low) >> 16 | rounded_bits(high) & 0xffff_0000
    }
    fn of(v: View<'_>) -> &[Self] {
        v.bf16()
    }
    fn of_mut(v: ViewMut<'_>) -> &mut [Self] {
        v.bf16()
    }
    fn view(x: &[Self]) -> View<'_> {
        View::Bf16(x)
    }
    fn bytes(x: &[Self]) -> &[u8] {
        bytemuck::cast_slice(x)
    }
}

/// Words of 32 bits of whatever alignment, and the elements behind the last whole one.
#[inline(always)]
pub(crate) fn words<T: Elem>(x: &[T]) -> (&[[u8; 4]], &[T]) {
    let (words, tail) = x.split_at(x.len() / T::PARTS * T::PARTS);
    (bytemuck::cast_slice(words), tail)
}

/// As [`words`].
#[inline(always)]
pub(crate) fn words_mut<T: Elem>(x: &mut [T]) -> (&mut [[u8; 4]], &mut [T]) {
    let (words, tail) = x.split_at_mut(x.len() / T::PARTS * T::PARTS);
    (bytemuck::cast_slice_mut(words), tail)
}

/// The bits of x rounded to bf16's 16 upper ones, to nearest even; a NaN keeps its sign and stays a NaN. The lower ones
/// are of no use.
#[inline(always)]
fn rounded_bits(x: f32) -> u32 {
    let b = x.to_bits();
    let rounded = b.wrapping_add(0x7fff + ((b >> 16) & 1));
    if x.is_nan() { b | 0x40_0000 } else { rounded }
}
