//! Making panels of operands.

use super::{CELLS, Cell, Operand, Part, ROW_CELLS};
use crate::isa::{Isa, SQUARE, prefetch, transpose, vectorised};
use crate::ops::by_dtype;
use crate::{DType, Elem, bf16};
use std::marker::PhantomData;

/// How cells are made of elements.
trait Source {
    type T: Elem;
    /// Steps of k in a cell.
    const DEPTH: usize;
    /// Cells along k from consecutive elements; there may be one too few for the last cell.
    fn along(from: &[Self::T], cells: &mut [u32]);
    /// One cell for each outer index from the elements at its steps of k; `next` is empty where there is no second.
    fn across(first: &[Self::T], next: &[Self::T], cells: &mut [u32]);
}

struct Single<T>(PhantomData<T>);
struct Pair;
/// Pairs of what is still f32, rounded here.
struct RoundedPair;

impl<T: Elem> Source for Single<T> {
    type T = T;
    const DEPTH: usize = 1;
    #[inline(always)]
    fn along(from: &[T], cells: &mut [u32]) {
        cells.iter_mut().zip(from).for_each(|(c, x)| *c = x.f32().to_bits());
    }
    #[inline(always)]
    fn across(first: &[T], _: &[T], cells: &mut [u32]) {
        Self::along(first, cells);
    }
}

#[inline(always)]
fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

impl Source for Pair {
    type T = bf16;
    const DEPTH: usize = 2;
    #[inline(always)]
    fn along(from: &[bf16], cells: &mut [u32]) {
        let (pairs, odd) = from.as_chunks::<2>();
        cells.iter_mut().zip(pairs).for_each(|(c, x)| *c = pair(x[0], x[1]));
        if let [last] = odd {
            cells[pairs.len()] = pair(*last, bf16::ZERO);
        }
    }
    #[inline(always)]
    fn across(first: &[bf16], next: &[bf16], cells: &mut [u32]) {
        if next.is_empty() {
            cells.iter_mut().zip(first).for_each(|(c, x)| *c = pair(*x, bf16::ZERO));
        } else {
            cells.iter_mut().zip(first.iter().zip(next)).for_each(|(c, (x, y))| *c = pair(*x, *y));
        }
    }
}

#[inline(always)]
fn rounded(low: f32, high: f32) -> u32 {
    pair(Elem::round(low), Elem::round(high))
}

impl Source for RoundedPair {
    type T = f32;
    const DEPTH: usize = 2;
    #[inline(always)]
    fn along(from: &[f32], cells: &mut [u32]) {
        let (pairs, odd) = from.as_chunks::<2>();
        cells.iter_mut().zip(pairs).for_each(|(c, x)| *c = rounded(x[0], x[1]));
        if let [last] = odd {
            cells[pairs.len()] = rounded(*last, 0.0);
        }
    }
    #[inline(always)]
    fn across(first: &[f32], next: &[f32], cells: &mut [u32]) {
        if next.is_empty() {
            cells.iter_mut().zip(first).for_each(|(c, x)| *c = rounded(*x, 0.0));
        } else {
            cells.iter_mut().zip(first.iter().zip(next)).for_each(|(c, (x, y))| *c = rounded(*x, *y));
        }
    }
}

/// Calls a function with the source that the operand and the cell ask for.
macro_rules! by_source {
    ($op:expr, $cell:expr, $f:ident($($arg:expr),*)) => {
        match $cell {
            Cell::Pair if $op.data.dtype() == DType::F32 => $f::<RoundedPair>($($arg),*),
            Cell::Pair => $f::<Pair>($($arg),*),
            Cell::Single => by_dtype!($op.data.dtype(), T => $f::<Single<T>>($($arg),*)),
        }
    };
}

/// Writes the groups of lanes `dst[group][cell][width]`; lanes beyond the part's count are zeros.
pub fn lanes(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, width: usize, dst: &mut [u32]) {
    if op.k_contiguous {
        by_source!(op, cell, lanes_turned(isa, op, p, width, dst));
    } else {
        by_source!(op, cell, lanes_straight(isa, op, p, width, dst));
    }
}

/// Writes the rows `dst[row][ROW_CELLS]`. May leave anything after the last row within the 16 that its square has.
pub fn rows(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, dst: &mut [u32]) {
    assert!(p.cells <= CELLS && dst.len() >= p.count.next_multiple_of(SQUARE) * ROW_CELLS);
    if op.k_contiguous {
        by_source!(op, cell, rows_straight(isa, op, p, dst));
    } else {
        by_source!(op, cell, rows_turned(isa, op, p, dst));
    }
}

/// The elements at one step of k, none beyond the end.
#[inline(always)]
fn step<'a, T>(src: &'a [T], ld: usize, p: &Part, k: usize, first: usize, count: usize) -> &'a [T] {
    if k < p.kc { &src[(p.k0 + k) * ld + p.first + first..][..count] } else { &[] }
}

vectorised! {
    fn lanes_straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for (g, group) in dst.chunks_exact_mut(p.cells * width).take(p.count.div_ceil(width)).enumerate() {
            let first = g * width;
            let count = width.min(p.count - first);
            for (i, line) in group.chunks_exact_mut(width).enumerate() {
                let (line, rest) = line.split_at_mut(count);
                let k = i * S::DEPTH;
                if k < p.kc {
                    let next = if S::DEPTH > 1 { step(src, op.ld, &p, k + 1, first, count) } else { &[] };
                    S::across(step(src, op.ld, &p, k, first, count), next, line);
                } else {
                    line.fill(0);
                }
                rest.fill(0);
            }
        }
    }
}

/// Cells from one staged line to the next.
const STAGED: usize = CELLS + SQUARE;

vectorised! {
    /// As `lanes_straight`, of an operand whose lanes lie `ld` apart. Sixteen lanes at a time are first copied whole to
    /// lines a little apart: read square by square, lanes whose distance is a power of two would evict one another from
    /// the cache.
    fn lanes_turned<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let mut stage = [0u32; SQUARE * STAGED];
        for l0 in (0..p.count.next_multiple_of(width)).step_by(SQUARE) {
            let filled = p.count.saturating_sub(l0).min(SQUARE);
            for (i, line) in stage.chunks_exact_mut(STAGED).enumerate() {
                let held = if i < filled { p.kc.div_ceil(S::DEPTH) } else { 0 };
                if i < filled {
                    let (row, next) = src[(p.first + l0 + i) * op.ld + p.k0..].split_at(p.kc);
                    prefetch(&next[..p.kc.min(next.len())]);
                    S::along(row, &mut line[..held]);
                }
                line[held..p.cells].fill(0);
            }
            let group = &mut dst[l0 / width * width * p.cells + l0 % width..];
            for c in (0..p.cells).step_by(SQUARE) {
                transpose(isa, &stage[c..], STAGED, &mut group[c * width..], width, SQUARE.min(p.cells - c));
            }
        }
    }
}

vectorised! {
    fn rows_straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for (r, row) in dst.chunks_exact_mut(ROW_CELLS).take(p.count).enumerate() {
            let held = p.kc.div_ceil(S::DEPTH);
            S::along(&src[(p.first + r) * op.ld + p.k0..][..p.kc], &mut row[..held]);
            row[held..p.cells].fill(0);
        }
    }
}

/// Rows that are staged at once.
const STAGED_ROWS: usize = 256;
const STAGED_ROW: usize = STAGED_ROWS + SQUARE;

vectorised! {
    /// As `rows_straight`, of an operand whose steps of k lie `ld` apart: sixteen cells of many rows, then their squares.
    fn rows_turned<S: Source>(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let mut stage = [0u32; SQUARE * STAGED_ROW];
        for r0 in (0..p.count).step_by(STAGED_ROWS) {
            let count = STAGED_ROWS.min(p.count - r0);
            for c in (0..p.cells).step_by(SQUARE) {
                for (i, line) in stage.chunks_exact_mut(STAGED_ROW).enumerate() {
                    let k = (c + i) * S::DEPTH;
                    if k < p.kc {
                        let next = if S::DEPTH > 1 { step(src, op.ld, &p, k + 1, r0, count) } else { &[] };
                        S::across(step(src, op.ld, &p, k, r0, count), next, &mut line[..count]);
                    } else {
                        line[..count].fill(0);
                    }
                }
                for r in (0..count).step_by(SQUARE) {
                    let to = &mut dst[(r0 + r) * ROW_CELLS + c..];
                    transpose(isa, &stage[r..], STAGED_ROW, to, ROW_CELLS, SQUARE.min(count - r));
                }
            }
        }
    }
}
