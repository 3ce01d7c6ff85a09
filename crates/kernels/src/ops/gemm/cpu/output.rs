//! Where products go.

use crate::buffer::Disjoint;
use crate::panel::Pointer;
use crate::{ViewMut, bf16};

/// The output, written by many tasks at once, each its own elements.
pub enum Output<'a> {
    F32(Disjoint<'a, f32>),
    Bf16(Disjoint<'a, bf16>),
}

/// Consecutive elements of the output.
pub enum Segment<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> Output<'a> {
    pub fn new(v: ViewMut<'a>) -> Self {
        match v {
            ViewMut::F32(x) => Self::F32(Disjoint::new(x)),
            ViewMut::Bf16(x) => Self::Bf16(Disjoint::new(x)),
            ViewMut::I32(_) | ViewMut::Cuda(_) => panic!("expected a float output in host memory"),
        }
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(c) => c.len() * size_of::<f32>(),
            Self::Bf16(c) => c.len() * size_of::<bf16>(),
        }
    }

    /// Where `rows` rows of `len` elements begin, `stride` apart; whoever writes them promises that nobody else has these
    /// elements meanwhile. They are those of a product, whose end [`super::run`] has computed with checks: what is added up here
    /// does not overflow.
    #[inline(always)]
    pub fn at(&self, at: usize, len: usize, rows: usize, stride: usize) -> Pointer {
        let end = at + rows.saturating_sub(1) * stride + len;
        let (to, all) = match self {
            Self::F32(c) => (Pointer::F32(c.at(at)), c.len()),
            Self::Bf16(c) => (Pointer::Bf16(c.at(at)), c.len()),
        };
        assert!(end <= all, "{rows} rows of {len} at {at}, {stride} apart, of {all}");
        to
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// Nothing else refers to any of them while the segment lives.
    pub unsafe fn segment(&self, at: usize, len: usize) -> Segment<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32(c) => Segment::F32(c.part(at, len)),
                Self::Bf16(c) => Segment::Bf16(c.part(at, len)),
            }
        }
    }
}
