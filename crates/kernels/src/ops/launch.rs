//! What the CUDA launches of several operations share: typed addresses, alignment, grids.

use crate::{DType, View, ViewMut};

/// The address of a view's memory on a GPU; panics on another dtype (a contract breach).
#[track_caller]
pub(super) fn ptr(v: View<'_>, dtype: DType) -> u64 {
    assert_eq!(v.dtype(), dtype, "expected a buffer of {dtype:?}, found {:?}", v.dtype());
    v.ptr()
}

/// As [`ptr`], to write.
#[track_caller]
pub(super) fn ptr_mut(v: &mut ViewMut<'_>, dtype: DType) -> u64 {
    assert_eq!(v.dtype(), dtype, "expected a buffer of {dtype:?}, found {:?}", v.dtype());
    v.ptr()
}

/// Panics unless the dtype is one of activations (a contract breach).
#[track_caller]
pub(super) fn float(dtype: DType) -> DType {
    assert!(dtype != DType::I32, "expected a float buffer, found I32");
    dtype
}

/// Whether every one of the sizes and addresses is a multiple of `bytes`.
pub(super) fn aligned(bytes: usize, of: &[u64]) -> bool {
    of.iter().all(|x| x.is_multiple_of(bytes as u64))
}

/// Blocks along the first dimension of a grid, `each` items a block.
#[track_caller]
pub(super) fn blocks(items: usize, each: usize) -> u32 {
    let blocks = items.div_ceil(each);
    assert!(i32::try_from(blocks).is_ok(), "{items} items are too many for one launch");
    blocks as u32
}

/// A count that kernels take as an i32.
#[track_caller]
pub(super) fn int(n: usize) -> i32 {
    i32::try_from(n).unwrap_or_else(|_| panic!("{n} is more than one launch can count"))
}
