//! The microkernels: panels in, sums out. A block of sums stays in registers while k passes by.
//!
//! Every sum is one chain: it starts at zero or where the panels before left it, and takes in one cell after the other
//! in order of k, each by the same instruction (on tiles: sixteen cells after the other sixteen). How rows and lanes are
//! blocked decides which sums are computed together, never how one is computed; so a row's bits depend on nothing but the
//! row, the other operand and k.

use super::{Cell, ROW_CELLS, Unit};
use crate::isa::{Isa, Job, Lanes, Level, TILE_COLUMNS, TILE_ROWS, TileJob, Tiles};

/// Lanes of a group: what the widest block of the level takes.
pub(crate) fn group_width(isa: Isa) -> usize {
    if isa.level() >= Level::Avx512 { 32 } else { 16 }
}

/// `sums[row][lane]` (+)= rows . lanes, over all cells.
pub(crate) struct Multiply<'a> {
    /// `[group][cells][width]`, of the level's width.
    pub lanes: &'a [u32],
    /// Lanes, whole groups of them.
    pub width: usize,
    /// `[count][ROW_CELLS]`.
    pub rows: &'a [u32],
    pub count: usize,
    pub cells: usize,
    /// `[count][width]`.
    pub sums: &'a mut [f32],
    /// Continue the sums instead of starting at zero.
    pub add: bool,
}

impl Multiply<'_> {
    /// Computes it.
    pub fn run(self, isa: Isa, unit: Unit) {
        match unit {
            Unit::Vectors(cell) => isa.run(OnVectors(self, cell)),
            Unit::Tiles => isa.run_tiles(self),
        }
    }

    fn check(&self, group: usize, rows: usize) {
        assert!(self.width.is_multiple_of(group) && self.cells <= ROW_CELLS);
        assert!(self.lanes.len() >= self.width * self.cells && self.rows.len() >= rows * ROW_CELLS);
        assert!(self.sums.len() >= rows * self.width);
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
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => self.blocks::<V, PAIRS, 12, 2>(),
            Level::Avx2 => self.blocks::<V, PAIRS, 6, 2>(),
            Level::Portable => self.blocks::<V, PAIRS, 2, 4>(),
        }
    }

    /// All groups; within one, all rows, `MR` at a time, then the rest in powers of two.
    #[inline(always)]
    fn blocks<V: Lanes, const PAIRS: bool, const MR: usize, const NV: usize>(&mut self) {
        let group = NV * V::N;
        self.check(group, self.count);
        for first in (0..self.width).step_by(group) {
            let mut i = 0;
            while i < self.count {
                // SAFETY: V is used inside a function compiled for it. The rows of each block are below count and its
                // lanes below width, and `check` bounds all three panels by these.
                unsafe {
                    i += match self.count - i {
                        left if left >= MR => self.block::<V, PAIRS, MR, NV>(i, first),
                        left if left >= 8 && MR > 8 => self.block::<V, PAIRS, 8, NV>(i, first),
                        left if left >= 4 && MR > 4 => self.block::<V, PAIRS, 4, NV>(i, first),
                        left if left >= 2 && MR > 2 => self.block::<V, PAIRS, 2, NV>(i, first),
                        _ => self.block::<V, PAIRS, 1, NV>(i, first),
                    };
                }
            }
        }
    }

    /// Rows i .. i + R of the group at lane `first`; returns R.
    #[inline(always)]
    unsafe fn block<V: Lanes, const PAIRS: bool, const R: usize, const NV: usize>(
        &mut self,
        i: usize,
        first: usize,
    ) -> usize {
        debug_assert!(i + R <= self.count && first + NV * V::N <= self.width);
        // SAFETY: the caller's promise.
        unsafe {
            let lanes = self.lanes.as_ptr().add(first * self.cells).cast::<f32>();
            let rows = self.rows.as_ptr().add(i * ROW_CELLS).cast::<f32>();
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
                    let left = V::splat(*rows.add(r * ROW_CELLS + c));
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

/// Rows that [`Multiply`] may compute on tiles: whole pairs of tiles, so that panels and sums must have room for them.
pub(crate) const ROWS_OF_TILES: usize = 2 * TILE_ROWS;

impl TileJob for Multiply<'_> {
    /// Blocks of two tiles by two: each tile that is loaded is multiplied twice, so that loads, of which two take as long
    /// as a product, do not bound it.
    #[inline(always)]
    fn run<T: Tiles>(mut self) {
        let rows = self.count.next_multiple_of(ROWS_OF_TILES);
        self.check(2 * TILE_COLUMNS, rows);
        assert!(self.cells.is_multiple_of(TILE_COLUMNS), "{} cells", self.cells);
        // SAFETY: configured before all else and released after; blocks reach rows below `rows` and lanes below width,
        // and `check` bounds the panels by these.
        unsafe {
            T::configure();
            for first in (0..self.width).step_by(2 * TILE_COLUMNS) {
                for i in (0..rows).step_by(ROWS_OF_TILES) {
                    self.tiles::<T>(i, first);
                }
            }
            T::release();
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    unsafe fn tiles<T: Tiles>(&mut self, i: usize, first: usize) {
        const GROUP: usize = 2 * TILE_COLUMNS;
        // SAFETY: the caller's promise.
        unsafe {
            let lanes = self.lanes.as_ptr().add(first * self.cells);
            let rows = self.rows.as_ptr().add(i * ROW_CELLS);
            let top = self.sums.as_mut_ptr().add(i * self.width + first);
            let bottom = top.add(TILE_ROWS * self.width);
            // Bytes from one row to the next.
            let (width, row, group) = (4 * self.width, 4 * ROW_CELLS, 4 * GROUP);
            if self.add {
                T::load::<0>(top.cast(), width);
                T::load::<1>(top.add(TILE_COLUMNS).cast(), width);
                T::load::<2>(bottom.cast(), width);
                T::load::<3>(bottom.add(TILE_COLUMNS).cast(), width);
            } else {
                T::zero::<0>();
                T::zero::<1>();
                T::zero::<2>();
                T::zero::<3>();
            }
            for c in (0..self.cells).step_by(TILE_COLUMNS) {
                T::load::<4>(rows.add(c).cast(), row);
                T::load::<6>(lanes.add(c * GROUP).cast(), group);
                T::dot::<0, 4, 6>();
                T::load::<7>(lanes.add(c * GROUP + TILE_COLUMNS).cast(), group);
                T::dot::<1, 4, 7>();
                T::load::<5>(rows.add(TILE_ROWS * ROW_CELLS + c).cast(), row);
                T::dot::<2, 5, 6>();
                T::dot::<3, 5, 7>();
            }
            T::store::<0>(top.cast(), width);
            T::store::<1>(top.add(TILE_COLUMNS).cast(), width);
            T::store::<2>(bottom.cast(), width);
            T::store::<3>(bottom.add(TILE_COLUMNS).cast(), width);
        }
    }
}
