//! Making panels of operands.

use super::{CELLS, Cell, Operand, Part, ROW_CELLS, block_width};
use crate::isa::{Cache, Isa, LINE, SQUARE, ask, interleave, prefetch, transpose, vectorised};
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
    /// As `across`, of a number that is known.
    #[inline(always)]
    fn fixed<const N: usize>(_: Isa, first: &[Self::T; N], next: &[Self::T; N], cells: &mut [u32; N]) {
        Self::across(first, next, cells);
    }
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
    #[inline(always)]
    fn fixed<const N: usize>(isa: Isa, first: &[T; N], _: &[T; N], cells: &mut [u32; N]) {
        // Which of both is known when it is compiled.
        match bytemuck::try_cast_slice(first) {
            Ok(first) if T::DTYPE == DType::Bf16 => {
                interleave(isa, None, first.first_chunk().expect("as many elements as bf16"), cells);
            }
            _ => Self::along(first, cells),
        }
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
    #[inline(always)]
    fn fixed<const N: usize>(isa: Isa, first: &[bf16; N], next: &[bf16; N], cells: &mut [u32; N]) {
        interleave(isa, Some(first), next, cells);
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

/// Writes the groups of lanes `dst[group][cells][width]`, which begin `stride` words apart; lanes beyond the part's count
/// are zeros.
pub fn lanes(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, (width, stride): (usize, usize), dst: &mut [u32]) {
    if op.k_contiguous {
        by_source!(op, cell, lanes_turned(isa, op, p, width, stride, dst));
    } else {
        by_source!(op, cell, lanes_straight(isa, op, p, width, stride, dst));
    }
}

/// Writes blocks of `rows` rows, `dst[block][cell][row]`, each cell's in a line of [`block_width`], of an operand that k
/// runs across.
pub fn row_blocks(isa: Isa, op: Operand<'_>, p: Part, cell: Cell, rows: usize, dst: &mut [u32]) {
    assert!(!op.k_contiguous && rows <= SQUARE);
    by_source!(op, cell, blocks_straight(isa, op, p, rows, dst));
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
fn step<'a, T>(src: &'a [T], op: &Operand<'_>, p: &Part, k: usize, first: usize, count: usize) -> &'a [T] {
    if k < p.kc { &src[op.row(p.k0 + k) + p.first + first..][..count] } else { &[] }
}

/// The cells of up to `N` outer indices at a step of k; zeros where there is no such index.
#[inline(always)]
fn across<S: Source, const N: usize>(isa: Isa, first: &[S::T], next: &[S::T], to: &mut [u32; N]) {
    // With a cell of one step there is no next.
    let whole = if S::DEPTH > 1 { next.first_chunk() } else { first.first_chunk() };
    match (first.first_chunk(), whole) {
        (Some(first), Some(next)) => S::fixed::<N>(isa, first, next, to),
        _ => {
            let count = first.len().min(N);
            S::across(&first[..count], &next[..count.min(next.len())], &mut to[..count]);
            to[count..].fill(0);
        }
    }
}

/// Cells that are packed of all lanes or rows before the next: few enough that what is read stays in the first-level cache,
/// and so many that what is written lies together.
const TOGETHER: usize = 8;

/// The elements of the two steps of k at each of the cells that are packed together, the second none where a cell has one
/// step.
#[inline(always)]
fn steps<'a, S: Source>(src: &'a [S::T], op: &Operand<'_>, p: &Part, c0: usize) -> [[&'a [S::T]; 2]; TOGETHER] {
    std::array::from_fn(|c| {
        let k = (c0 + c) * S::DEPTH;
        [step(src, op, p, k, 0, p.count), if S::DEPTH > 1 { step(src, op, p, k + 1, 0, p.count) } else { &[] }]
    })
}

/// Where the steps of the next cells begin. Those behind the last lie anywhere.
#[inline(always)]
fn starts<S: Source>(src: &[S::T], op: &Operand<'_>, p: &Part, c0: usize) -> [*const S::T; 2 * TOGETHER] {
    std::array::from_fn(|i| {
        let k = p.k0 + c0 * S::DEPTH + i;
        let is_there = op.tokens.is_none_or(|tokens| k < tokens.len());
        src.as_ptr().wrapping_add(if is_there { op.row(k).wrapping_add(p.first) } else { 0 })
    })
}

/// Asks for `N` outer indices from `l` on of the steps that begin there.
#[inline(always)]
fn ask_across<S: Source, const N: usize>(starts: &[*const S::T; 2 * TOGETHER], l: usize) {
    for start in &starts[..TOGETHER * S::DEPTH] {
        let x = start.wrapping_add(l).cast::<u8>();
        for line in (0..N * size_of::<S::T>()).step_by(LINE) {
            ask(Cache::Second, x.wrapping_add(line));
        }
    }
}

/// Cells that are whole, so that nothing of them has to be looked at one by one.
struct Whole<'a, T> {
    /// Both steps of each, of as many outer indices; the second any where a cell has one.
    steps: &'a [[&'a [T]; 2]; TOGETHER],
    count: usize,
}

impl<'a, T: Elem> Whole<'a, T> {
    /// Those from `c0` on, if all of them are.
    #[inline(always)]
    fn of<S: Source<T = T>>(steps: &'a [[&'a [T]; 2]; TOGETHER], p: &Part, c0: usize) -> Option<Self> {
        ((c0 + TOGETHER) * S::DEPTH <= p.kc).then_some(Self { steps, count: p.count })
    }

    /// Writes those of `N` outer indices from `l` on, `apart` words from one to the next, if there are so many.
    #[inline(always)]
    fn write<S: Source<T = T>, const N: usize>(&self, isa: Isa, l: usize, apart: usize, to: &mut [u32]) -> bool {
        if l + N > self.count || to.len() < (TOGETHER - 1) * apart + N {
            return false;
        }
        for (c, x) in self.steps.iter().enumerate() {
            debug_assert!(x[0].len() == self.count && (S::DEPTH == 1 || x[1].len() == self.count));
            // SAFETY: every step has `count` elements, and `to` as many words as was just found.
            unsafe {
                let [first, next] = [x[0], if S::DEPTH > 1 { x[1] } else { x[0] }].map(|x| &*x.as_ptr().add(l).cast());
                S::fixed::<N>(isa, first, next, &mut *to.as_mut_ptr().add(c * apart).cast());
            }
        }
        true
    }
}

#[inline(always)]
fn from<T>(x: &[T], first: usize) -> &[T] {
    x.get(first..).unwrap_or(&[])
}

vectorised! {
    fn lanes_straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, stride: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for c0 in (0..p.cells).step_by(TOGETHER) {
            let (steps, starts) = (steps::<S>(src, &op, &p, c0), starts::<S>(src, &op, &p, c0 + TOGETHER));
            let whole = Whole::of::<S>(&steps, &p, c0);
            // A whole group of the widest level takes fewer instructions than two halves.
            let step = if width.is_multiple_of(2 * SQUARE) { 2 * SQUARE } else { SQUARE };
            for l in (0..p.count.next_multiple_of(width)).step_by(step) {
                let group = &mut dst[l / width * stride + l % width..];
                if l % width == 0 {
                    ask_across::<S, { 2 * SQUARE }>(&starts, l);
                }
                let to = &mut group[c0 * width..];
                if let Some(whole) = &whole && match step {
                    SQUARE => whole.write::<S, SQUARE>(isa, l, width, to),
                    _ => whole.write::<S, { 2 * SQUARE }>(isa, l, width, to),
                } {
                    continue;
                }
                for (c, steps) in (c0..p.cells).zip(&steps) {
                    let [first, next] = steps.map(|x| from(x, l));
                    let to = &mut group[c * width..];
                    if step == SQUARE {
                        across::<S, SQUARE>(isa, first, next, to.first_chunk_mut().expect("room for whole groups"));
                    } else {
                        let to = to.first_chunk_mut().expect("room for whole groups");
                        across::<S, { 2 * SQUARE }>(isa, first, next, to);
                    }
                }
            }
        }
    }
}

vectorised! {
    /// What is beyond the rows in a line is whatever there is.
    fn blocks_straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, rows: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let width = block_width(rows);
        for c0 in (0..p.cells).step_by(TOGETHER) {
            let (steps, starts) = (steps::<S>(src, &op, &p, c0), starts::<S>(src, &op, &p, c0 + TOGETHER));
            let whole = Whole::of::<S>(&steps, &p, c0);
            for (b, block) in dst.chunks_mut(p.cells * width).take(p.count.div_ceil(rows)).enumerate() {
                ask_across::<S, SQUARE>(&starts, b * rows);
                let to = &mut block[c0 * width..];
                if let Some(whole) = &whole && match width {
                    16 => whole.write::<S, 16>(isa, b * rows, width, to),
                    8 => whole.write::<S, 8>(isa, b * rows, width, to),
                    _ => false,
                } {
                    continue;
                }
                for (c, steps) in (c0..p.cells).zip(&steps) {
                    let [first, next] = steps.map(|x| from(x, b * rows));
                    let to = &mut block[c * width..][..width];
                    if let Ok(to) = <&mut [u32; 16]>::try_from(&mut *to) {
                        across::<S, 16>(isa, first, next, to);
                    } else if let Ok(to) = <&mut [u32; 8]>::try_from(&mut *to) {
                        across::<S, 8>(isa, first, next, to);
                    } else {
                        for (i, to) in to.iter_mut().enumerate() {
                            across::<S, 1>(isa, from(first, i), from(next, i), std::array::from_mut(to));
                        }
                    }
                }
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
    fn lanes_turned<S: Source>(isa: Isa, op: Operand<'_>, p: Part, width: usize, stride: usize, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        let mut stage = [0u32; SQUARE * STAGED];
        for l0 in (0..p.count.next_multiple_of(width)).step_by(SQUARE) {
            let filled = p.count.saturating_sub(l0).min(SQUARE);
            for (i, line) in stage.chunks_exact_mut(STAGED).enumerate() {
                let held = if i < filled { p.kc.div_ceil(S::DEPTH) } else { 0 };
                if i < filled {
                    let (row, next) = src[op.row(p.first + l0 + i) + p.k0..].split_at(p.kc);
                    prefetch(&next[..p.kc.min(next.len())]);
                    S::along(row, &mut line[..held]);
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

vectorised! {
    fn rows_straight<S: Source>(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [u32]) {
        let src = S::T::of(op.data);
        for (r, row) in dst.chunks_exact_mut(ROW_CELLS).take(p.count).enumerate() {
            let held = p.kc.div_ceil(S::DEPTH);
            S::along(&src[op.row(p.first + r) + p.k0..][..p.kc], &mut row[..held]);
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
                        let next = if S::DEPTH > 1 { step(src, &op, &p, k + 1, r0, count) } else { &[] };
                        S::across(step(src, &op, &p, k, r0, count), next, &mut line[..count]);
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
