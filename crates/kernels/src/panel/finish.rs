//! Finished sums on their way to the output: rounded to its type, after its old elements were added where they are kept.

use crate::isa::{LINE, prefetch_line_to_write};
use crate::{Elem, bf16};

/// An element of the output.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pointer {
    F32(*mut f32),
    Bf16(*mut bf16),
}

/// Where the finished sums of some rows and columns go.
#[derive(Debug)]
pub(crate) struct Finish {
    to: Pointer,
    rows: usize,
    /// Elements from one row to the next.
    apart: usize,
    columns: usize,
    accumulate: bool,
    /// Whole groups are written past the caches.
    streamed: bool,
}

impl Finish {
    /// `rows` rows of `columns` elements from `to`, `apart` elements from one to the next.
    ///
    /// # Safety
    /// All of them may be read and written while this lives, and nobody else does.
    pub unsafe fn new(to: Pointer, (rows, apart): (usize, usize), columns: usize, accumulate: bool) -> Self {
        Self { to, rows, apart, columns, accumulate, streamed: false }
    }

    /// Writes whole groups of sums past the caches if they fill lines; then [`crate::isa::finish_streams`] has to follow.
    pub fn past_caches(mut self) -> Self {
        self.streamed = match self.to {
            Pointer::F32(c) => {
                !self.accumulate && c.addr().is_multiple_of(LINE) && self.apart.is_multiple_of(LINE / size_of::<f32>())
            }
            Pointer::Bf16(_) => false,
        };
        self
    }

    /// Whether what [`Self::plain`] gives is to be streamed.
    #[inline(always)]
    pub fn streamed(&self) -> bool {
        self.streamed
    }

    /// The output's row `i` if it takes `width` sums as they are, and whether they are added to it.
    #[inline(always)]
    pub fn plain(&self, i: usize, width: usize) -> Option<(*mut f32, bool)> {
        match self.to {
            Pointer::F32(c) if self.columns == width => Some((c.wrapping_add(i * self.apart), self.accumulate)),
            _ => None,
        }
    }

    /// Rows.
    pub fn count(&self) -> usize {
        self.rows
    }

    /// Elements from one row to the next.
    #[inline(always)]
    pub fn apart(&self) -> usize {
        self.apart
    }

    /// Moves the sums `[row][width]` of the rows from `first` on.
    #[inline(always)]
    pub fn rows(&self, first: usize, sums: &[f32], width: usize) {
        assert!(self.columns <= width && first + sums.len() / width <= self.rows);
        for (i, sums) in (first..).zip(sums.chunks_exact(width)) {
            // SAFETY: a row of those that `new` was promised, as just asserted.
            unsafe {
                match self.to {
                    Pointer::F32(c) => self.row(c.add(i * self.apart), sums),
                    Pointer::Bf16(c) => self.row(c.add(i * self.apart), sums),
                }
            }
        }
    }

    /// # Safety
    /// `c` is the first element of a row.
    #[inline(always)]
    unsafe fn row<T: Elem>(&self, c: *mut T, sums: &[f32]) {
        // SAFETY: the caller's promise, and that of `new`.
        let c = unsafe { std::slice::from_raw_parts_mut(c, self.columns) };
        // Without a loop where there are as many elements as a group of lanes mostly has.
        if let (Ok(c), Ok(sums)) = (<&mut [T; 32]>::try_from(&mut *c), <&[f32; 32]>::try_from(sums)) {
            finish(c, sums, self.accumulate);
        } else {
            finish(c, sums, self.accumulate);
        }
    }

    /// Asks for the lines of `count` rows from `first` on to be this core's to write soon.
    #[inline(always)]
    pub fn ask(&self, first: usize, count: usize) {
        if self.streamed {
            return;
        }
        for i in first..first + count {
            let (at, bytes) = match self.to {
                Pointer::F32(c) => (c.wrapping_add(i * self.apart).cast::<u8>(), self.columns * size_of::<f32>()),
                Pointer::Bf16(c) => (c.wrapping_add(i * self.apart).cast(), self.columns * size_of::<bf16>()),
            };
            for line in (0..bytes).step_by(LINE) {
                prefetch_line_to_write(at.wrapping_add(line));
            }
        }
    }
}

/// Moves finished sums to the output.
#[inline(always)]
pub(crate) fn finish<T: Elem>(c: &mut [T], sums: &[f32], accumulate: bool) {
    if accumulate {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(c.f32() + s));
    } else {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(*s));
    }
}
