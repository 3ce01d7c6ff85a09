//! Borrowed memory, which is what ops take: to read, to write, and as a weight.

use super::{DType, Elem, Pod};
use crate::cuda::{CudaView, CudaViewMut};
use hadal_numerics::bf16;
use std::ops::Range;

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
