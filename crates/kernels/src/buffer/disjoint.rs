//! Memory that several tasks write at once, each its own parts of it.

use std::marker::PhantomData;

/// A slice, borrowed for as long as tasks write parts of it. That they do not overlap is what whoever asks for one promises.
pub(crate) struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: access is only through `part`, and through what `at` returns: in both cases the caller promises that no other task
// has the same elements.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(all: &'a mut [T]) -> Self {
        Self { ptr: all.as_mut_ptr(), len: all.len(), life: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where element `at` is or would be: to ask for its line, or to write what the caller knows to be there and its own.
    #[inline(always)]
    pub fn at(&self, at: usize) -> *mut T {
        self.ptr.wrapping_add(at)
    }

    /// Elements `at .. at + len`.
    ///
    /// # Safety
    /// Nothing else refers to any of them while the part lives: no two tasks hold parts that overlap.
    #[allow(clippy::mut_from_ref, reason = "disjoint by the caller's contract")]
    pub unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at} + {len} of {}", self.len);
        // SAFETY: inside the borrowed slice, and disjoint from every other part by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }
}
