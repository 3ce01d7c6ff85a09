//! Typed memory on one device, and the borrowed views that ops take. The set of element types is closed.

mod disjoint;
mod elem;
#[cfg(test)]
mod tests;
mod view;

pub(crate) use disjoint::Disjoint;
pub use elem::{DType, Elem, Pod};
pub(crate) use elem::{words, words_mut};
pub use view::{View, ViewMut, Weight};

use crate::cuda::CudaBuf;
use crate::memory::{Block, Memory};
use hadal_numerics::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

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
