//! Making panels of operands.
//!
//! A part of an operand is some outer indices, o, at some steps of k, which make cells, c: a step or a pair of steps each. It is
//! laid out in one of three ways, a word a cell, of which [`lanes`] and [`row_blocks`] keep the outer indices of a cell
//! together and [`rows`] the cells of an outer index:
//!
//! ```text
//! lanes, in groups of 32 (or 16)         c0: o0 o1 ... o31   c1: o0 o1 ... o31   ...   a line left out
//!                                        c0: o32 ... o63     c1: o32 ... o63     ...
//! rows                                   o0: c0 c1 ... c127  a line left out
//!                                        o1: c0 c1 ... c127
//! blocks of 12 (or 6, or 2) rows         c0: o0 ... o11, 4 left out   c1: o0 ... o11, 4 left out   ...
//!                                        c0: o12 ... o23, 4 left out  ...
//! ```
//!
//! Where an operand's elements lie together in memory as the panel keeps them, they are packed straight, else turned: `stage`d as
//! they lie, then transposed in registers by squares of 16.
//!
//! |            | k runs along  | k runs across  |
//! |------------|---------------|----------------|
//! | lanes      | turned        | straight       |
//! | rows       | straight      | turned         |
//! | row blocks |               | straight       |

mod across;
mod lanes;
mod rows;
mod source;

use super::{CELLS, Cell, Operand, Part, ROW_CELLS};
use crate::DType;
use crate::isa::{Isa, SQUARE};

/// Calls a function with the source that the operand and the cell ask for.
macro_rules! by_source {
    ($op:expr, $cell:expr, $module:ident::$f:ident($($arg:expr),*)) => {
        match ($cell, $op.data.dtype()) {
            (Cell::Single, DType::F32) => $module::$f::<source::Single>($($arg),*),
            (Cell::Single, DType::Bf16) => $module::$f::<source::Widened>($($arg),*),
            (Cell::Pair, DType::F32) => $module::$f::<source::RoundedPair>($($arg),*),
            (Cell::Pair, DType::Bf16) => $module::$f::<source::Pair>($($arg),*),
            (_, DType::I32) => panic!("expected a float buffer, found I32"),
        }
    };
}

/// Writes the groups of lanes `dst[group][cells][width]`, which begin `stride` words apart; lanes beyond the part's count
/// are zeros.
pub fn lanes(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, (width, stride): (usize, usize), dst: &mut [u32]) {
    if op.k_contiguous {
        by_source!(op, cell, lanes::turned(isa, op, p, width, stride, dst));
    } else {
        by_source!(op, cell, lanes::straight(isa, op, p, width, stride, dst));
    }
}

/// Writes the rows `dst[row][ROW_CELLS]`. May leave anything after the last row within the 16 that its square has.
pub fn rows(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, dst: &mut [u32]) {
    assert!(p.cells <= CELLS && dst.len() >= p.count.next_multiple_of(SQUARE) * ROW_CELLS);
    if op.k_contiguous {
        by_source!(op, cell, rows::straight(isa, op, p, dst));
    } else {
        by_source!(op, cell, rows::turned(isa, op, p, dst));
    }
}

/// Writes blocks of `rows` rows, `dst[block][cell][row]`, each cell's in a line of [`super::block_width`], of an operand that k
/// runs across.
pub fn row_blocks(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, rows: usize, dst: &mut [u32]) {
    assert!(!op.k_contiguous && rows <= SQUARE);
    by_source!(op, cell, rows::blocks(isa, op, p, rows, dst));
}
