//! Lanes, from operands that k runs across (straight) and along (turned).

use super::across::{TOGETHER, Together};
use super::source::Source;
use crate::Elem;
use crate::isa::{Isa, SQUARE, prefetch, transpose, vectorised};
use crate::panel::{CELLS, Operand, Part};

/// Lanes that are written at once of groups that have so many: a whole group of the widest level takes fewer instructions
/// than two halves.
const WIDE: usize = 2 * SQUARE;

vectorised! {
    pub fn straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, stride: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for c0 in (0..p.cells).step_by(TOGETHER) {
            let cells = Together::<S>::new(src, &op, &p, c0);
            let step = if width.is_multiple_of(WIDE) { WIDE } else { SQUARE };
            for l in (0..p.count.next_multiple_of(width)).step_by(step) {
                if l % width == 0 {
                    cells.ask_for_next::<WIDE>(l);
                }
                let to = &mut dst[l / width * stride + l % width..][c0 * width..];
                if step == SQUARE {
                    cells.write::<SQUARE>(isa, l, width, to);
                } else {
                    cells.write::<WIDE>(isa, l, width, to);
                }
            }
        }
    }
}

/// Cells from one staged line to the next.
const STAGED: usize = CELLS + SQUARE;

vectorised! {
    /// Sixteen lanes at a time are first copied whole to lines a little apart: read square by square, lanes whose distance is
    /// a power of two would evict one another from the cache.
    pub fn turned<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, stride: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let mut stage = [0u32; SQUARE * STAGED];
        for l0 in (0..p.count.next_multiple_of(width)).step_by(SQUARE) {
            let filled = p.count.saturating_sub(l0).min(SQUARE);
            for (i, line) in stage.chunks_exact_mut(STAGED).enumerate() {
                let held = if i < filled { p.kc.div_ceil(S::DEPTH) } else { 0 };
                if i < filled {
                    let (row, next) = src[op.row(p.first + l0 + i) + p.k0..].split_at(p.kc);
                    prefetch(&next[..p.kc.min(next.len())]);
                    S::of_row(row, &mut line[..held]);
                }
                line[held..p.cells].fill(0);
            }
            let group = &mut dst[l0 / width * stride + l0 % width..];
            for c in (0..p.cells).step_by(SQUARE) {
                transpose(isa, &stage[c..], STAGED, &mut group[c * width..], width, SQUARE.min(p.cells - c));
            }
        }
    }
}
