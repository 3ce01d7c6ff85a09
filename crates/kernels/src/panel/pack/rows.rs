//! Rows, from operands that k runs along (straight) and across (turned), and blocks of rows from the latter.

use super::across::{TOGETHER, Together, elements};
use super::source::Source;
use crate::Elem;
use crate::isa::{Isa, SQUARE, transpose, vectorised};
use crate::panel::{Operand, Part, ROW_CELLS, block_width};

vectorised! {
    pub fn straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for (r, row) in dst.chunks_exact_mut(ROW_CELLS).take(p.count).enumerate() {
            let held = p.kc.div_ceil(S::DEPTH);
            S::of_row(&src[op.row(p.first + r) + p.k0..][..p.kc], &mut row[..held]);
            row[held..p.cells].fill(0);
        }
    }
}

/// Rows that are staged at once.
const STAGED: usize = 256;
/// Cells from one staged line to the next.
const STAGED_LINE: usize = STAGED + SQUARE;

vectorised! {
    /// Sixteen cells of many rows, then their squares.
    pub fn turned<S: Source>(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let mut stage = [0u32; SQUARE * STAGED_LINE];
        for r0 in (0..p.count).step_by(STAGED) {
            let count = STAGED.min(p.count - r0);
            for c in (0..p.cells).step_by(SQUARE) {
                for (i, line) in stage.chunks_exact_mut(STAGED_LINE).enumerate() {
                    let k = (c + i) * S::DEPTH;
                    if k < p.kc {
                        let next = if S::DEPTH > 1 { elements(src, &op, &p, k + 1, r0, count) } else { &[] };
                        S::of_steps(elements(src, &op, &p, k, r0, count), next, &mut line[..count]);
                    } else {
                        line[..count].fill(0);
                    }
                }
                for r in (0..count).step_by(SQUARE) {
                    let to = &mut dst[(r0 + r) * ROW_CELLS + c..];
                    transpose(isa, &stage[r..], STAGED_LINE, to, ROW_CELLS, SQUARE.min(count - r));
                }
            }
        }
    }
}

vectorised! {
    /// What is beyond the rows in a line is whatever there is.
    pub fn blocks<S: Source>(isa: Isa, op: Operand<'_>, p: Part, rows: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let width = block_width(rows);
        for c0 in (0..p.cells).step_by(TOGETHER) {
            let cells = Together::<S>::new(src, &op, &p, c0);
            for (b, block) in dst.chunks_mut(p.cells * width).take(p.count.div_ceil(rows)).enumerate() {
                cells.ask_for_next::<SQUARE>(b * rows);
                let to = &mut block[c0 * width..];
                match width {
                    16 => cells.write::<16>(isa, b * rows, width, to),
                    8 => cells.write::<8>(isa, b * rows, width, to),
                    2 => cells.write::<2>(isa, b * rows, width, to),
                    _ => unreachable!("blocks of {rows} rows"),
                }
            }
        }
    }
}
