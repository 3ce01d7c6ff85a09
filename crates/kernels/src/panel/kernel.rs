//! The microkernels: panels in, sums out. A block of sums stays in registers while k passes by.
//!
//! Every sum is one chain: it starts at zero or where the panels before left it, and takes in one cell after the other
//! in order of k, each by the same instruction. How rows and lanes are blocked decides which sums are computed together,
//! never how one is computed; so a row's bits depend on nothing but the row, the other operand and k.

use super::{Cell, ROW_CELLS};
use crate::isa::{Isa, Job, Lanes, Level};

/// Lanes of a group on the widest level.
pub(crate) const WIDEST_GROUP: usize = 32;

/// Lanes of a group: what the widest block of the level takes.
pub(crate) fn group_width(level: Level) -> usize {
    if level >= Level::Avx512 { WIDEST_GROUP } else { WIDEST_GROUP / 2 }
}

/// Rows that the level computes at once.
pub(crate) fn block_rows(isa: Isa) -> usize {
    match isa.level() {
        Level::Portable => 2,
        Level::Avx2 => 6,
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => 12,
    }
}

/// Words from one cell to the next in blocks of so many rows: they fill a part of a cache line that does not straddle two.
pub(crate) const fn block_width(rows: usize) -> usize {
    rows.next_power_of_two()
}

/// How a panel of rows is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// `[row][ROW_CELLS]`: what k runs along is copied as it is.
    Single,
    /// `[block][cell][row]`, blocks of [`block_rows`] in lines of [`block_width`]: what k runs across is never turned.
    Blocks,
}

/// `sums[row][lane]` (+)= rows . lanes, over all cells.
pub(crate) struct Multiply<'a> {
    /// `[group][cells][width]`, of the level's width.
    pub lanes: &'a [u32],
    /// Lanes, whole groups of them.
    pub width: usize,
    pub rows: &'a [u32],
    /// How they lie.
    pub form: Rows,
    pub count: usize,
    pub cells: usize,
    /// `[count][width]`.
    pub sums: &'a mut [f32],
    /// Continue the sums instead of starting at zero.
    pub add: bool,
}

impl Multiply<'_> {
    /// Computes it.
    pub fn run(self, isa: Isa, cell: Cell) {
        isa.run(OnVectors(self, cell));
    }

    /// That panels hold whole groups of lanes and all rows, in blocks of `block` if they are.
    fn check(&self, group: usize, block: usize) {
        assert!(self.width.is_multiple_of(group) && self.cells <= ROW_CELLS);
        let held = match self.form {
            Rows::Single => self.count * ROW_CELLS,
            Rows::Blocks => self.count.div_ceil(block) * self.cells * block_width(block),
        };
        assert!(self.lanes.len() >= self.width * self.cells && self.rows.len() >= held);
        assert!(self.sums.len() >= self.count * self.width);
    }
}

struct OnVectors<'a>(Multiply<'a>, Cell);

impl Job for OnVectors<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let pairs = self.1 == Cell::Pair;
        assert!(V::PAIRS || !pairs, "pairs on {}", V::LEVEL.name());
        if V::PAIRS && pairs { self.0.groups::<V, true>() } else { self.0.groups::<V, false>() }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn groups<V: Lanes, const PAIRS: bool>(&mut self) {
        match V::LEVEL {
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => self.forms::<V, PAIRS, 12, 2>(),
            Level::Avx2 => self.forms::<V, PAIRS, 6, 2>(),
            Level::Portable => self.forms::<V, PAIRS, 2, 4>(),
        }
    }

    #[inline(always)]
    fn forms<V: Lanes, const PAIRS: bool, const MR: usize, const NV: usize>(&mut self) {
        match self.form {
            Rows::Single => self.blocks::<V, PAIRS, false, MR, NV>(),
            Rows::Blocks => self.blocks::<V, PAIRS, true, MR, NV>(),
        }
    }

    /// All groups; within one, all rows, `MR` at a time, then the rest in powers of two.
    #[inline(always)]
    fn blocks<V: Lanes, const PAIRS: bool, const BLOCKS: bool, const MR: usize, const NV: usize>(&mut self) {
        let group = NV * V::N;
        self.check(group, MR);
        for first in (0..self.width).step_by(group) {
            let mut i = 0;
            while i < self.count {
                let rows = if BLOCKS { i / MR * self.cells * block_width(MR) + i % MR } else { i * ROW_CELLS };
                // SAFETY: V is used inside a function compiled for it. The rows of each block are below count and its
                // lanes below width, and `check` bounds all three panels by these; a block of rows begins at a multiple
                // of MR, and what is left of the last stays within it.
                unsafe {
                    let rows = self.rows.as_ptr().add(rows);
                    i += match self.count - i {
                        left if left >= MR => self.block::<V, PAIRS, BLOCKS, MR, MR, NV>(rows, i, first),
                        left if left >= 8 && MR > 8 => self.block::<V, PAIRS, BLOCKS, MR, 8, NV>(rows, i, first),
                        left if left >= 4 && MR > 4 => self.block::<V, PAIRS, BLOCKS, MR, 4, NV>(rows, i, first),
                        left if left >= 2 && MR > 2 => self.block::<V, PAIRS, BLOCKS, MR, 2, NV>(rows, i, first),
                        _ => self.block::<V, PAIRS, BLOCKS, MR, 1, NV>(rows, i, first),
                    };
                }
            }
        }
    }

    /// Rows i .. i + R, whose cells begin at `rows`, of the group at lane `first`; returns R.
    #[inline(always)]
    unsafe fn block<
        V: Lanes,
        const PAIRS: bool,
        const BLOCKS: bool,
        const MR: usize,
        const R: usize,
        const NV: usize,
    >(
        &mut self,
        rows: *const u32,
        i: usize,
        first: usize,
    ) -> usize {
        debug_assert!(i + R <= self.count && first + NV * V::N <= self.width);
        // From one row to the next, and from one cell to the next.
        let (row_step, cell_step) = if BLOCKS { (1, block_width(MR)) } else { (ROW_CELLS, 1) };
        // SAFETY: the caller's promise.
        unsafe {
            let lanes = self.lanes.as_ptr().add(first * self.cells).cast::<f32>();
            let rows = rows.cast::<f32>();
            let sums = self.sums.as_mut_ptr().add(i * self.width + first);
            let mut sum = [[V::splat(0.0); NV]; R];
            if self.add {
                for (r, row) in sum.iter_mut().enumerate() {
                    for (v, s) in row.iter_mut().enumerate() {
                        *s = V::load(sums.add(r * self.width + v * V::N));
                    }
                }
            }
            for c in 0..self.cells {
                let mut right = [V::splat(0.0); NV];
                for (v, x) in right.iter_mut().enumerate() {
                    *x = V::load(lanes.add((c * NV + v) * V::N));
                }
                for (r, row) in sum.iter_mut().enumerate() {
                    let left = V::splat(*rows.add(r * row_step + c * cell_step));
                    for (s, x) in row.iter_mut().zip(right) {
                        *s = if PAIRS { left.dot(x, *s) } else { left.mul_add(x, *s) };
                    }
                }
            }
            for (r, row) in sum.iter().enumerate() {
                for (v, s) in row.iter().enumerate() {
                    s.store(sums.add(r * self.width + v * V::N));
                }
            }
        }
        R
    }
}
