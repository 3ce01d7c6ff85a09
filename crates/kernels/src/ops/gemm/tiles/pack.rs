//! Packing of many steps.

use super::plan::steps;
use crate::isa::{Cache, ask};
use crate::panel::Operand;
use crate::panel::blocks::{BLOCK, STEP_CELLS, Starts, pack_left, pack_right};
use std::ops::Range;

/// Which operand: rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// Packs a part of an operand, `[32 outer indices][step]`, in the order in which it lies in memory.
///
/// # Safety
/// There is room at `to` for so many blocks times so many steps, and nobody else uses it.
#[inline(always)]
pub unsafe fn pack(op: Operand<'_>, side: Side, outer: &Range<usize>, k: &Range<usize>, to: *mut u32) {
    let (groups, steps) = (outer.len().div_ceil(BLOCK), steps(k));
    let part = |of: &Range<usize>, i: usize| of.start + i * BLOCK..of.end.min(of.start + (i + 1) * BLOCK);
    let (slow, fast) = if op.k_contiguous { (groups, steps) } else { (steps, groups) };
    let rows = if op.k_contiguous { outer } else { k };
    let mut starts: Starts = op.rows(&part(rows, 0));
    for i in 0..slow {
        let next: Starts = if i + 1 < slow { op.rows(&part(rows, i + 1)) } else { starts };
        for j in 0..fast {
            let (g, s) = if op.k_contiguous { (i, j) } else { (j, i) };
            // SAFETY: the caller's promise.
            let to = unsafe { &mut *to.add((g * steps + s) * STEP_CELLS).cast::<[u32; STEP_CELLS]>() };
            let (outer, k) = (part(outer, g), part(k, s));
            if op.tokens.is_some() && !op.k_contiguous && i + 1 < slow {
                ask_for_rows(&op, &next, outer.start);
            }
            match side {
                Side::Left => pack_left(op, &starts, &outer, &k, to),
                Side::Right => pack_right(op, &starts, &outer, &k, to),
            }
        }
        starts = next;
    }
}

/// Asks for a line of each row: of tokens, whose rows the CPU does not fetch ahead by itself.
#[inline(always)]
fn ask_for_rows(op: &Operand<'_>, starts: &Starts, first: usize) {
    let data = op.data.bf16().as_ptr();
    for start in starts {
        ask(Cache::First, data.wrapping_add(start + first).cast());
    }
}
