//! Typed memory on one device, and the borrowed views that ops take. The set of element types is closed.

#[cfg(test)]
mod tests;

use crate::cuda::{CudaBuf, CudaView, CudaViewMut};
use crate::memory::{Block, Memory};
use hadal_numerics::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

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

/// Memory aligned to 256 bytes, the alignment of every tensor in an arena.
pub struct AlignedVec<T: Pod> {
    block: Block,
    len: usize,
    /// Where the block goes when it is dropped; None for the system.
    home: Option<Arc<Memory>>,
    elements: PhantomData<T>,
}

impl<T: Pod> AlignedVec<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self { block: Block::zeros(Self::size(len)), len, home: None, elements: PhantomData }
    }

    /// `len` elements of whatever value, from memory to which they return.
    pub(crate) fn of(home: &Arc<Memory>, len: usize) -> Self {
        Self { block: home.take(Self::size(len)), len, home: Some(home.clone()), elements: PhantomData }
    }

    fn size(len: usize) -> usize {
        len.checked_mul(size_of::<T>()).expect("a buffer's size fits the address space")
    }
}

impl<T: Pod> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.give(std::mem::replace(&mut self.block, Block::EMPTY));
        }
    }
}

impl<T: Pod> Deref for AlignedVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the block has at least len elements' bytes, aligned for any Pod, initialised (any bits are valid).
        unsafe { std::slice::from_raw_parts(self.block.ptr().as_ptr().cast(), self.len) }
    }
}

impl<T: Pod> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in deref, and &mut self makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.block.ptr().as_ptr().cast(), self.len) }
    }
}

impl<T: Pod> Clone for AlignedVec<T> {
    fn clone(&self) -> Self {
        let mut out = self.home.as_ref().map_or_else(|| Self::zeros(self.len), |home| Self::of(home, self.len));
        out.copy_from_slice(self);
        out
    }
}

/// Owned memory of one dtype on one device. Shapes live with the code that knows them.
#[derive(Clone)]
pub enum Buf {
    /// f32 in host memory.
    F32(AlignedVec<f32>),
    /// bf16 in host memory.
    Bf16(AlignedVec<bf16>),
    /// i32 in host memory.
    I32(AlignedVec<i32>),
    /// Of any type in a GPU's memory.
    Cuda(CudaBuf),
}

impl Buf {
    /// `len` zeros of `dtype` in host memory. Model code allocates through [`crate::Ctx::zeros`].
    pub fn host_zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(AlignedVec::zeros(len)),
            DType::Bf16 => Self::Bf16(AlignedVec::zeros(len)),
            DType::I32 => Self::I32(AlignedVec::zeros(len)),
        }
    }

    /// `len` elements of `dtype` of whatever value, from memory to which they return.
    pub(crate) fn of(home: &Arc<Memory>, dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(AlignedVec::of(home, len)),
            DType::Bf16 => Self::Bf16(AlignedVec::of(home, len)),
            DType::I32 => Self::I32(AlignedVec::of(home, len)),
        }
    }

    /// It, or a copy of it, in host memory; from a GPU it waits.
    pub fn host(&self) -> Cow<'_, Self> {
        if self.view().is_host() { Cow::Borrowed(self) } else { Cow::Owned(self.to_host()) }
    }

    /// A copy in host memory; from a GPU it waits.
    pub fn to_host(&self) -> Self {
        match self {
            Self::Cuda(b) => {
                let (view, mut out) = (self.view(), Self::host_zeros(b.dtype(), b.len()));
                match &mut out {
                    Self::F32(v) => b.device().read(view.ptr(), bytemuck::cast_slice_mut(v)),
                    Self::Bf16(v) => b.device().read(view.ptr(), bytemuck::cast_slice_mut(v)),
                    Self::I32(v) => b.device().read(view.ptr(), bytemuck::cast_slice_mut(v)),
                    Self::Cuda(_) => unreachable!("host_zeros is in host memory"),
                }
                out
            }
            host => host.clone(),
        }
    }

    /// A copy, in host memory, of a view of host memory.
    pub(crate) fn copy_of(view: View<'_>) -> Self {
        let mut out = Self::host_zeros(view.dtype(), view.len());
        match view {
            View::F32(v) => out.view_mut().f32().copy_from_slice(v),
            View::Bf16(v) => out.view_mut().bf16().copy_from_slice(v),
            View::I32(v) => out.view_mut().i32().copy_from_slice(v),
            View::Cuda(_) => panic!("expected a view of host memory"),
        }
        out
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.view().len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.view().dtype()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// Makes every element zero.
    pub fn clear(&mut self) {
        self.view_mut().clear();
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_> {
        match self {
            Self::F32(v) => View::F32(v),
            Self::Bf16(v) => View::Bf16(v),
            Self::I32(v) => View::I32(v),
            Self::Cuda(b) => View::Cuda(b.view()),
        }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Self::F32(v) => ViewMut::F32(v),
            Self::Bf16(v) => ViewMut::Bf16(v),
            Self::I32(v) => ViewMut::I32(v),
            Self::Cuda(b) => ViewMut::Cuda(b.view_mut()),
        }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({:?}, {})", self.dtype(), self.len())
    }
}

/// Borrowed memory to read.
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    /// f32 in host memory.
    F32(&'a [f32]),
    /// bf16 in host memory.
    Bf16(&'a [bf16]),
    /// i32 in host memory.
    I32(&'a [i32]),
    /// Of any type in a GPU's memory.
    Cuda(CudaView<'a>),
}

/// Borrowed memory to write.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// f32 in host memory.
    F32(&'a mut [f32]),
    /// bf16 in host memory.
    Bf16(&'a mut [bf16]),
    /// i32 in host memory.
    I32(&'a mut [i32]),
    /// Of any type in a GPU's memory.
    Cuda(CudaViewMut<'a>),
}

impl<'a> View<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::Cuda(v) => v.len(),
        }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::I32(_) => DType::I32,
            Self::Cuda(v) => v.dtype(),
        }
    }

    /// A part of it, in elements.
    pub fn slice(self, r: Range<usize>) -> View<'a> {
        match self {
            Self::F32(v) => View::F32(&v[r]),
            Self::Bf16(v) => View::Bf16(&v[r]),
            Self::I32(v) => View::I32(&v[r]),
            Self::Cuda(v) => View::Cuda(v.slice(r)),
        }
    }

    /// The elements as f32; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn f32(self) -> &'a [f32] {
        match self {
            Self::F32(v) => v,
            other => panic!("expected an f32 buffer{}, found {:?}", other.place(), other.dtype()),
        }
    }

    /// The elements as bf16; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn bf16(self) -> &'a [bf16] {
        match self {
            Self::Bf16(v) => v,
            other => panic!("expected a bf16 buffer{}, found {:?}", other.place(), other.dtype()),
        }
    }

    /// The elements as i32; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn i32(self) -> &'a [i32] {
        match self {
            Self::I32(v) => v,
            other => panic!("expected an i32 buffer{}, found {:?}", other.place(), other.dtype()),
        }
    }

    /// The elements widened to f32 (i32 is refused), from a GPU too, which waits: for tests and for files.
    #[track_caller]
    pub fn to_f32(self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.to_vec(),
            Self::Bf16(v) => v.iter().map(|x| Elem::f32(*x)).collect(),
            Self::Cuda(v) if v.dtype() == DType::F32 => self.read(),
            Self::Cuda(v) if v.dtype() == DType::Bf16 => self.read::<bf16>().into_iter().map(Elem::f32).collect(),
            Self::I32(_) | Self::Cuda(_) => panic!("expected a float buffer, found I32"),
        }
    }

    /// The elements (of an i32 buffer), from a GPU too, which waits.
    #[track_caller]
    pub fn to_i32(self) -> Vec<i32> {
        match self {
            Self::Cuda(v) if v.dtype() == DType::I32 => self.read(),
            other => other.i32().to_vec(),
        }
    }

    /// A copy of what a GPU's memory holds; T must be its type.
    fn read<T: Pod + bytemuck::Pod>(self) -> Vec<T> {
        let Self::Cuda(v) = self else { panic!("expected a buffer of a GPU") };
        assert_eq!(v.dtype().size(), size_of::<T>(), "reading {:?}", v.dtype());
        let mut out = vec![T::zeroed(); v.len()];
        v.device().read(v.ptr(), bytemuck::cast_slice_mut(&mut out));
        out
    }

    /// True for memory that the host can read.
    pub fn is_host(&self) -> bool {
        !matches!(self, Self::Cuda(_))
    }

    /// Where a message says that a buffer was expected.
    fn place(&self) -> &'static str {
        if self.is_host() { "" } else { " in host memory" }
    }

    /// As [`View::ptr`], of elements of `dtype`; panics on another (a contract breach).
    #[track_caller]
    pub(crate) fn typed_ptr(&self, dtype: DType) -> u64 {
        assert_eq!(self.dtype(), dtype, "a buffer's type");
        self.ptr()
    }

    /// Address in the GPU's memory; panics for host memory (a contract breach).
    #[track_caller]
    pub(crate) fn ptr(&self) -> u64 {
        match self {
            Self::Cuda(v) => v.ptr(),
            other => panic!("expected a buffer of a GPU, found {:?} in host memory", other.dtype()),
        }
    }
}

impl<'a> ViewMut<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_view().len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.as_view().dtype()
    }

    /// To read.
    pub fn as_view(&self) -> View<'_> {
        match self {
            Self::F32(v) => View::F32(v),
            Self::Bf16(v) => View::Bf16(v),
            Self::I32(v) => View::I32(v),
            Self::Cuda(v) => View::Cuda(v.as_view()),
        }
    }

    /// True for memory that the host can write.
    pub fn is_host(&self) -> bool {
        self.as_view().is_host()
    }

    /// Address in the GPU's memory; panics for host memory (a contract breach).
    #[track_caller]
    pub(crate) fn ptr(&mut self) -> u64 {
        self.as_view().ptr()
    }

    /// As [`View::typed_ptr`].
    #[track_caller]
    pub(crate) fn typed_ptr(&mut self, dtype: DType) -> u64 {
        self.as_view().typed_ptr(dtype)
    }

    /// Overwrites all with these elements, in a GPU's memory too.
    #[track_caller]
    pub fn write<T: Elem>(&mut self, values: &[T]) {
        assert!(values.len() == self.len() && self.dtype() == T::DTYPE, "{} values to {self:?}", values.len());
        match self {
            Self::Cuda(v) => v.as_view().device().write(v.as_view().ptr(), T::bytes(values)),
            host => T::of_mut(host.reborrow()).copy_from_slice(values),
        }
    }

    /// Makes every element zero.
    pub fn clear(self) {
        match self {
            Self::F32(v) => v.fill(0.0),
            Self::Bf16(v) => v.fill(bf16::ZERO),
            Self::I32(v) => v.fill(0),
            Self::Cuda(v) => {
                let cuda = v.as_view().device();
                cuda.zero(Self::Cuda(v));
            }
        }
    }

    /// As [`ViewMut::write`], of i32.
    #[track_caller]
    pub fn write_i32(&mut self, values: &[i32]) {
        assert!(values.len() == self.len() && self.dtype() == DType::I32, "{} values to {self:?}", values.len());
        match self {
            Self::Cuda(v) => v.as_view().device().write(v.as_view().ptr(), bytemuck::cast_slice(values)),
            host => host.reborrow().i32().copy_from_slice(values),
        }
    }

    /// A shorter borrow of the same memory.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        match self {
            Self::F32(v) => ViewMut::F32(v),
            Self::Bf16(v) => ViewMut::Bf16(v),
            Self::I32(v) => ViewMut::I32(v),
            Self::Cuda(v) => ViewMut::Cuda(v.reborrow()),
        }
    }

    /// A part of it, in elements.
    pub fn slice(self, r: Range<usize>) -> ViewMut<'a> {
        match self {
            Self::F32(v) => ViewMut::F32(&mut v[r]),
            Self::Bf16(v) => ViewMut::Bf16(&mut v[r]),
            Self::I32(v) => ViewMut::I32(&mut v[r]),
            Self::Cuda(v) => ViewMut::Cuda(v.slice(r)),
        }
    }

    /// The elements as f32; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn f32(self) -> &'a mut [f32] {
        match self {
            Self::F32(v) => v,
            other => panic!("expected an f32 buffer{}, found {:?}", other.as_view().place(), other.dtype()),
        }
    }

    /// The elements as bf16; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn bf16(self) -> &'a mut [bf16] {
        match self {
            Self::Bf16(v) => v,
            other => panic!("expected a bf16 buffer{}, found {:?}", other.as_view().place(), other.dtype()),
        }
    }

    /// The elements as i32; panics on another dtype (a contract breach).
    #[track_caller]
    pub fn i32(self) -> &'a mut [i32] {
        match self {
            Self::I32(v) => v,
            other => panic!("expected an i32 buffer{}, found {:?}", other.as_view().place(), other.dtype()),
        }
    }
}

/// A weight as ops see it: `experts` matrices `[rows, cols]` = `[out, in]`, one after another, in one format.
/// It may point into an arena, a mapped file or a derived form; ops never see an offset.
/// Later formats (FP8 with scales, packed tiles) become variants of `data` with their scales beside.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// `[experts, rows, cols]`, row-major; its dtype is the format.
    pub data: View<'a>,
    /// Matrices stacked; 1 for a plain linear.
    pub experts: usize,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl<'a> Weight<'a> {
    /// One matrix `[rows, cols]`; panics if the data has another size (a contract breach).
    #[track_caller]
    pub fn new(data: View<'a>, rows: usize, cols: usize) -> Self {
        Self::stacked(data, 1, rows, cols)
    }

    /// `experts` matrices `[rows, cols]`; panics if the data has another size (a contract breach).
    #[track_caller]
    pub fn stacked(data: View<'a>, experts: usize, rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), experts * rows * cols, "weight of {experts} x [{rows}, {cols}]");
        Self { data, experts, rows, cols }
    }

    /// The weight of one expert.
    pub fn expert(&self, e: usize) -> Weight<'a> {
        let n = self.rows * self.cols;
        Self::new(self.data.slice(e * n..(e + 1) * n), self.rows, self.cols)
    }
}
