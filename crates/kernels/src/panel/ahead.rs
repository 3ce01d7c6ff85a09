//! Lines of memory that are asked for before they are needed, a few in each step of a product.

use super::{Operand, Pointer, Tokens};
use crate::Elem;
use crate::isa::{Cache, LINE, ask, prefetch_line_to_write};
use crate::ops::by_dtype;
use std::ops::Range;

/// Rows of bytes, `apart` bytes from one to the next, that are asked for line by line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines<'a> {
    row: *const u8,
    len: usize,
    apart: usize,
    /// Where they are of tokens: where the first token's begins, the tokens, and of which of them the last row is.
    tokens: Option<(*const u8, Tokens<'a>, usize)>,
    /// Rows that are left, and the byte that is next in the first of them.
    rows: usize,
    next: usize,
    /// Lines asked for in a step.
    each: usize,
}

impl<'a> Lines<'a> {
    /// None.
    pub const NONE: Self = Self { row: std::ptr::null(), len: 0, apart: 0, tokens: None, rows: 0, next: 0, each: 0 };

    /// All in about `steps` steps.
    fn new(row: *const u8, (rows, apart): (usize, usize), len: usize, steps: usize) -> Self {
        let lines = rows * len.div_ceil(LINE);
        Self::each(row, (rows, apart), len, lines.div_ceil(steps.max(1)))
    }

    /// So many lines in a step.
    fn each(row: *const u8, (rows, apart): (usize, usize), len: usize, each: usize) -> Self {
        let rows = if len == 0 { 0 } else { rows };
        Self { row, len, apart, tokens: None, rows, next: 0, each }
    }

    /// `rows` rows of `width` elements, `apart` elements from one to the next, `each` lines in a step.
    pub fn of_rows<T>(at: *const T, (rows, apart): (usize, usize), width: usize, each: usize) -> Self {
        Self::each(at.cast(), (rows, apart * size_of::<T>()), width * size_of::<T>(), each)
    }

    /// Whether all were asked for.
    pub fn done(&self) -> bool {
        self.rows == 0
    }

    /// A part of an operand.
    pub fn of_operand(op: Operand<'a>, outer: &Range<usize>, k: &Range<usize>, steps: usize) -> Self {
        fn of<'a, E: Elem>(op: Operand<'a>, rows: &Range<usize>, along: &Range<usize>, steps: usize) -> Lines<'a> {
            let at = |row: usize| E::of(op.data)[row + along.start..].as_ptr().cast();
            let apart = op.ld * size_of::<E>();
            let lines = Lines::new(at(op.row(rows.start)), (rows.len(), apart), along.len() * size_of::<E>(), steps);
            Lines { tokens: op.tokens.map(|tokens| (at(0), tokens, rows.end - 1)), ..lines }
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
        fn of<'a, E: Elem>(at: *mut E, (rows, apart): (usize, usize), columns: usize, steps: usize) -> Lines<'a> {
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
                self.row = match self.tokens {
                    None => self.row.wrapping_add(self.apart),
                    Some((first, tokens, last)) if self.rows > 0 => {
                        first.wrapping_add(tokens.of(last + 1 - self.rows) * self.apart)
                    }
                    Some(_) => return,
                };
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
            let op = Operand::new(View::Bf16(&data), apart, k_contiguous);
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
    fn lines_of_tokens_are_asked_for() {
        let data = vec![bf16::ZERO; 6 * 100];
        let slots = [3, 0, 1, 8, 11, 2];
        let tokens = Some(Tokens::new(&slots, 2));
        let tokens_of_rows = [1, 0, 0, 4, 5, 1];
        for k_contiguous in [true, false] {
            let op = Operand { tokens, ..Operand::new(View::Bf16(&data), 100, k_contiguous) };
            let (rows, along) = (1..5, 10..75);
            let (outer, k) = if k_contiguous { (&rows, &along) } else { (&along, &rows) };
            let mut all = Lines::of_operand(op, outer, k, 1);
            let seen = RefCell::new(vec![]);
            all.each_of_a_step(|at| seen.borrow_mut().push(at.addr()));
            let line = |r: usize, l: usize| data[tokens_of_rows[r] * 100 + 10..].as_ptr().addr() + l * LINE;
            assert_eq!(seen.into_inner(), rows.flat_map(|r| (0..3).map(move |l| line(r, l))).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nothing_is_no_line() {
        let op = Operand::new(View::Bf16(&[]), 7, true);
        for mut none in [Lines::NONE, Lines::of_operand(op, &(0..0), &(0..5), 3)] {
            none.each_of_a_step(|_| panic!("nothing was to be asked for"));
        }
    }
}
