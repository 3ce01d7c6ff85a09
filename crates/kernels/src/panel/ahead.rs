//! Lines of memory that are asked for before they are needed, a few in each step of a product.

use super::{Operand, Pointer};
use crate::Elem;
use crate::isa::{Cache, ask, prefetch_line_to_write};
use crate::ops::by_dtype;
use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of bytes, `apart` bytes from one to the next, that are asked for line by line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines {
    row: *const u8,
    len: usize,
    apart: usize,
    /// Rows that are left, and the byte that is next in the first of them.
    rows: usize,
    next: usize,
    /// Lines asked for in a step.
    each: usize,
}

impl Lines {
    /// None.
    pub const NONE: Self = Self { row: std::ptr::null(), len: 0, apart: 0, rows: 0, next: 0, each: 0 };

    /// All in about `steps` steps.
    fn new(row: *const u8, (rows, apart): (usize, usize), len: usize, steps: usize) -> Self {
        let lines = rows * len.div_ceil(LINE);
        Self { row, len, apart, rows: if len == 0 { 0 } else { rows }, next: 0, each: lines.div_ceil(steps.max(1)) }
    }

    /// A part of an operand.
    pub fn of_operand(op: Operand<'_>, outer: &Range<usize>, k: &Range<usize>, steps: usize) -> Self {
        fn of<E: Elem>(op: Operand<'_>, rows: &Range<usize>, along: &Range<usize>, steps: usize) -> Lines {
            let row = E::of(op.data)[rows.start * op.ld + along.start..].as_ptr().cast();
            Lines::new(row, (rows.len(), op.ld * size_of::<E>()), along.len() * size_of::<E>(), steps)
        }
        let (rows, along) = if op.k_contiguous { (outer, k) } else { (k, outer) };
        if rows.is_empty() || along.is_empty() {
            return Self::NONE;
        }
        by_dtype!(op.data.dtype(), E => of::<E>(op, rows, along, steps))
    }

    /// Consecutive words, and as many again at each of some more places, `apart` bytes from one to the next.
    pub fn of_words(words: &[u32], (places, apart): (usize, usize), steps: usize) -> Self {
        Self::new(words.as_ptr().cast(), (places, apart), size_of_val(words), steps)
    }

    /// `rows` rows of an output, `apart` elements from one to the next.
    pub fn of_output(at: Pointer, (rows, apart): (usize, usize), columns: usize, steps: usize) -> Self {
        fn of<E: Elem>(at: *mut E, (rows, apart): (usize, usize), columns: usize, steps: usize) -> Lines {
            Lines::new(at.cast(), (rows, apart * size_of::<E>()), columns * size_of::<E>(), steps)
        }
        match at {
            Pointer::F32(at) => of(at, (rows, apart), columns, steps),
            Pointer::Bf16(at) => of(at, (rows, apart), columns, steps),
        }
    }

    /// Asks for those of a step, to read them.
    #[inline(always)]
    pub fn step(&mut self) {
        self.each_of_a_step(|at| ask(Cache::Second, at));
    }

    /// Asks for those of a step, to write them.
    #[inline(always)]
    pub fn step_to_write(&mut self) {
        self.each_of_a_step(prefetch_line_to_write);
    }

    #[inline(always)]
    fn each_of_a_step(&mut self, ask: impl Fn(*const u8)) {
        for _ in 0..self.each {
            if self.rows == 0 {
                return;
            }
            ask(self.row.wrapping_add(self.next));
            self.next += LINE;
            if self.next >= self.len {
                (self.next, self.rows) = (0, self.rows - 1);
                self.row = self.row.wrapping_add(self.apart);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{View, bf16};
    use std::cell::RefCell;

    /// Every line once, in the order of the rows, as many in each step as were meant.
    #[test]
    fn every_line_is_asked_for() {
        let data = vec![bf16::ZERO; 100 * 50];
        let at = |i: usize| data[i..].as_ptr().addr();
        for (k_contiguous, first, apart) in [(true, 3 * 100 + 10, 100), (false, 10 * 50 + 3, 50)] {
            let op = Operand { data: View::Bf16(&data), ld: apart, k_contiguous };
            let (rows, lines): (usize, usize) = if k_contiguous { (5, 2) } else { (40, 1) };
            let mut all = Lines::of_operand(op, &(3..8), &(10..50), 4);
            let seen = RefCell::new(vec![]);
            for step in 1..=6 {
                all.each_of_a_step(|at| seen.borrow_mut().push(at.addr()));
                assert_eq!(seen.borrow().len(), (step * (rows * lines).div_ceil(4)).min(rows * lines));
            }
            let expected = (0..rows).flat_map(|r| (0..lines).map(move |l| at(first + r * apart) + l * LINE));
            assert_eq!(seen.into_inner(), expected.collect::<Vec<_>>());
        }
    }

    #[test]
    fn nothing_is_no_line() {
        let op = Operand { data: View::Bf16(&[]), ld: 7, k_contiguous: true };
        for mut none in [Lines::NONE, Lines::of_operand(op, &(0..0), &(0..5), 3)] {
            none.each_of_a_step(|_| panic!("nothing was to be asked for"));
        }
    }
}
