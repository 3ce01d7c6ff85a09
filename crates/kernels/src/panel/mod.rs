//! What every matrix product on the cores is made of: panels, and microkernels that multiply them.
//!
//! A panel is a part of an operand, laid out as the kernels read it. It consists of cells of 32 bits: an f32 (widened
//! if need be), or two bf16 at consecutive k, the first in the low half. Zeros fill up the cells that k does not fill.
//! Of one operand the kernels read *lanes*, vectors over the outer index at each cell, in groups: `[group][cell][lane]`.
//! Of the other they read *rows*, one cell at a time: `[row][ROW_CELLS]`, or as [`Rows`] says. Products of bf16 on AMX do
//! without panels: they have blocks of tiles (`blocks`).

mod ahead;
pub(crate) mod blocks;
mod finish;
mod kernel;
mod pack;
mod tokens;

use crate::isa::{Level, SQUARE};
use crate::{DType, View, bf16};
pub(crate) use ahead::Lines;
pub(crate) use finish::{Finish, Pointer, finish};
pub(crate) use kernel::{Multiply, Panel, Rows, WIDEST_GROUP, block_rows, block_width, group_width, steps};
pub(crate) use pack::{lanes, row_blocks, rows};
use std::ops::Range;
pub(crate) use tokens::Tokens;

/// op(A) or op(B) seen from its outer index: element (o, k) is at `o * ld + k` if `k_contiguous`, else at `k * ld + o`.
/// What lies `ld` apart, outer indices or steps of k, are its rows; of tokens, row i is that of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a> {
    pub data: View<'a>,
    pub ld: usize,
    pub k_contiguous: bool,
    /// The rows' tokens, of which the data then are the rows; None where rows lie in their order.
    pub tokens: Option<Tokens<'a>>,
}

impl<'a> Operand<'a> {
    /// Rows in their order.
    pub fn new(data: View<'a>, ld: usize, k_contiguous: bool) -> Self {
        Self { data, ld, k_contiguous, tokens: None }
    }

    /// Where row i begins.
    #[inline(always)]
    pub fn row(&self, i: usize) -> usize {
        self.ld * self.tokens.map_or(i, |tokens| tokens.of(i))
    }

    /// Where rows begin, at most `N`; zero for those that are not there.
    #[inline(always)]
    pub fn rows<const N: usize>(&self, rows: &Range<usize>) -> [usize; N] {
        std::array::from_fn(|i| if i < rows.len() { self.row(rows.start + i) } else { 0 })
    }

    /// Whether its elements are cells, where they lie as kernels read them; k has so many steps.
    pub fn has_cells(&self, k: usize, cell: Cell) -> bool {
        match (cell, self.data.dtype()) {
            _ if self.tokens.is_some() => false,
            (Cell::Single, DType::F32) => true,
            (Cell::Pair, DType::Bf16) => self.k_contiguous && k.is_multiple_of(2) && self.ld.is_multiple_of(2),
            _ => false,
        }
    }

    /// Its elements as cells, if they are and begin at a whole one. Then element (o, k) is in the cell at
    /// `o * ld / depth + k / depth` or `k * ld + o`.
    pub fn cells(&self, k: usize, cell: Cell) -> Option<&'a [u32]> {
        match self.data {
            _ if !self.has_cells(k, cell) => None,
            View::F32(x) => bytemuck::try_cast_slice(x).ok(),
            View::Bf16(x) => bytemuck::try_cast_slice(&x[..x.len() / 2 * 2]).ok(),
            _ => None,
        }
    }
}

/// Which part of an operand: outer indices from `first`, k from `k0`, and how many of each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub first: usize,
    pub count: usize,
    pub k0: usize,
    pub kc: usize,
    /// Cells along k, at least those that hold kc.
    pub cells: usize,
}

/// Most cells of a panel along k: a group of lanes and a block of rows then share the first-level cache.
pub(crate) const CELLS: usize = 128;
/// Cells from one row of a panel to the next; not a power of two, which would map rows to the same lines of a cache.
pub(crate) const ROW_CELLS: usize = CELLS + SQUARE;

/// The cell of two bf16.
#[inline(always)]
fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// What a cell holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    /// One f32.
    Single,
    /// Two bf16; an operand of f32 is rounded.
    Pair,
}

impl Cell {
    /// The fastest that the level's vectors multiply, for operands of bf16 or for others.
    pub fn of(level: Level, bf16: bool) -> Self {
        if bf16 && level >= Level::Avx512Bf16 { Self::Pair } else { Self::Single }
    }

    /// Steps of k in a cell.
    pub fn depth(self) -> usize {
        match self {
            Self::Single => 1,
            Self::Pair => 2,
        }
    }

    /// Cells of a panel over kc steps of k.
    pub fn cells(self, kc: usize) -> usize {
        kc.div_ceil(self.depth())
    }

    /// Cuts k into pieces of a panel's length at most: (first, length), of about equal length so that none is a mere
    /// rest.
    pub fn pieces(self, k: usize) -> impl ExactSizeIterator<Item = (usize, usize)> {
        let depth = self.depth();
        let cells = k.div_ceil(depth);
        let step = cells.div_ceil(cells.div_ceil(CELLS).max(1)).max(1).next_multiple_of(SQUARE) * depth;
        (0..k).step_by(step).map(move |k0| (k0, step.min(k - k0)))
    }
}
