//! What is done beside products of tiles, a little in each step: finished sums are moved to the output, and what comes next
//! is asked for.

use super::cpu::{Output, Product};
use crate::isa::{LINE, finish_streams, round_row, stream_row};
use crate::panel::blocks::{self, BLOCK};
use crate::panel::{Lines, Pointer, finish};
use crate::{Elem, bf16};

/// Sums of a block on their way to the output, and lines that are asked for.
pub(super) struct Beside<'a> {
    p: &'a Product<'a>,
    out: &'a Output<'a>,
    accumulate: bool,
    /// Whole rows of blocks are written past the caches: those of a weight gradient, which nothing reads before all others
    /// are computed. They begin with lines.
    streamed: bool,
    /// Sums of the rows that are not in the output yet, where they go, and how many rows and columns there are.
    sums: *const [f32; BLOCK],
    to: Pointer,
    rows: usize,
    columns: usize,
    /// Rows that are moved in a step.
    share: usize,
    /// The sums were stored just now: who read them would wait.
    fresh: bool,
    /// What is to be in the cache soon: where the sums go that are computed now and next, and what is multiplied next.
    output: Lines<'a>,
    pub left: Lines<'a>,
    pub right: Lines<'a>,
}

impl blocks::Beside for Beside<'_> {
    #[inline(always)]
    fn step(&mut self) {
        self.output.step_to_write();
        self.left.step();
        self.right.step();
        if self.rows > 0 && !std::mem::take(&mut self.fresh) {
            self.finish(self.share);
        }
    }
}

impl<'a> Beside<'a> {
    pub fn new(p: &'a Product<'a>, out: &'a Output<'a>, accumulate: bool) -> Self {
        let (sums, to) = (std::ptr::null(), out.at(0, 0, 0, 0));
        let streamed = match out.at(p.c, 0, 0, 0) {
            Pointer::F32(c) => {
                !accumulate && !p.a.k_contiguous && c.addr().is_multiple_of(LINE) && p.ldc.is_multiple_of(LINE / 4)
            }
            Pointer::Bf16(_) => false,
        };
        let (output, left, right) = (Lines::NONE, Lines::NONE, Lines::NONE);
        Self {
            p,
            out,
            accumulate,
            streamed,
            sums,
            to,
            rows: 0,
            columns: 0,
            share: 0,
            fresh: false,
            output,
            left,
            right,
        }
    }

    /// Steps that a block has: its rows are shared out among all but the first.
    pub fn spread(&mut self, steps: usize) {
        self.share = BLOCK.div_ceil(steps.saturating_sub(1).max(1));
    }

    /// Blocks of so many steps begin, side by side, whose first element is (row, column) of the product.
    #[inline(always)]
    pub fn expect(&mut self, (row, rows): (usize, usize), (column, columns): (usize, usize), steps: usize) {
        let to = self.out.at(self.p.c + row * self.p.ldc + column, columns, rows, self.p.ldc);
        if !self.streamed {
            self.output = Lines::of_output(to, (rows, self.p.ldc), columns, steps);
        }
    }

    /// A block is finished whose first element is (row, column) of the product.
    ///
    /// # Safety
    /// Its sums are not written before they are all in the output, whose elements are this task's.
    #[inline(always)]
    pub unsafe fn done(&mut self, sums: *const f32, (row, rows): (usize, usize), (column, columns): (usize, usize)) {
        debug_assert_eq!(self.rows, 0);
        (self.sums, self.rows, self.columns, self.fresh) = (sums.cast(), rows, columns, true);
        self.to = self.out.at(self.p.c + row * self.p.ldc + column, columns, rows, self.p.ldc);
    }

    /// Moves what is left to the output, for all threads to see.
    pub fn end(&mut self) {
        self.finish(BLOCK);
        if self.streamed {
            finish_streams();
        }
    }

    /// Moves up to `most` rows of the finished block to the output.
    #[inline(always)]
    pub fn finish(&mut self, most: usize) {
        let rows = most.min(self.rows);
        // SAFETY: `done` promises both, and `Output::at` has seen that all rows are in the output.
        unsafe {
            self.to = match self.to {
                Pointer::F32(c) => Pointer::F32(self.to_rows(c, rows)),
                Pointer::Bf16(c) => Pointer::Bf16(self.to_rows(c, rows)),
            };
            self.sums = self.sums.add(rows);
        }
        self.rows -= rows;
    }

    /// Returns where the row after them goes.
    ///
    /// # Safety
    /// So many rows of sums are there and so many rows of the output this task's, the first at `c`.
    #[inline(always)]
    unsafe fn to_rows<E: Row>(&self, mut c: *mut E, rows: usize) -> *mut E {
        for r in 0..rows {
            // SAFETY: the caller's promise.
            let sums = unsafe { &*self.sums.add(r) };
            if self.columns == BLOCK {
                // SAFETY: as above, of whole rows.
                let c = unsafe { &mut *c.cast::<[E; BLOCK]>() };
                // SAFETY: blocks begin 32 columns apart, so that their rows begin with lines if the first does.
                unsafe { whole(c, sums, self.accumulate, self.streamed) }
            } else {
                // SAFETY: as above.
                finish(unsafe { std::slice::from_raw_parts_mut(c, self.columns) }, sums, self.accumulate);
            }
            // Behind the last row there may be nothing.
            c = c.wrapping_add(self.p.ldc);
        }
        c
    }
}

/// A row of known length is read before it is written, so that it is moved in whole vectors.
///
/// # Safety
/// A row that is streamed begins with a line.
#[inline(always)]
unsafe fn whole<E: Row>(c: &mut [E; BLOCK], sums: &[f32; BLOCK], accumulate: bool, streamed: bool) {
    let (old, sums) = (*c, *sums);
    if accumulate {
        *c = std::array::from_fn(|i| E::round(old[i].f32() + sums[i]));
    } else {
        // SAFETY: the caller's promise.
        unsafe { E::round_row(&sums, c, streamed) }
    }
}

/// Elements of an output.
trait Row: Elem {
    /// Rounds a row of a block, whose sums the CPU's tiles leave without subnormal numbers. Only f32 are streamed.
    ///
    /// # Safety
    /// A row that is streamed begins with a line.
    unsafe fn round_row(sums: &[f32; BLOCK], to: &mut [Self; BLOCK], streamed: bool);
}

impl Row for f32 {
    #[inline(always)]
    unsafe fn round_row(sums: &[f32; BLOCK], to: &mut [Self; BLOCK], streamed: bool) {
        if streamed {
            // SAFETY: what has tiles has AVX-512; the caller's promise.
            return unsafe { stream_row(sums, to) };
        }
        *to = *sums;
    }
}

impl Row for bf16 {
    #[inline(always)]
    unsafe fn round_row(sums: &[f32; BLOCK], to: &mut [Self; BLOCK], _: bool) {
        // SAFETY: what has tiles has AVX-512 BF16.
        unsafe { round_row(sums, to) }
    }
}
