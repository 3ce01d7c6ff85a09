//! Products of few rows with weights that k runs along: what decoding does. Each weight is used a few times only, so that
//! the speed is that of reading them. They are not packed: sixteen columns, of 32 bytes each, are turned in registers and
//! multiplied at once, while memory is asked for what comes later. Sums stay in registers over all of k.
//!
//! Every sum is the same chain as in the microkernels: one instruction after the other in order of k, and none more, not
//! even of zeros.

#[cfg(test)]
mod tests;

use super::cpu::{Output, Product, Segment, equal_parts, reserve};
use crate::isa::{Isa, Job, Lanes, Level, TURNED};
use crate::panel::{self, Cell, Lines, Part, ROW_CELLS, finish};
use crate::{AlignedVec, Cpu, DType, Elem, bf16};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// Most rows.
const ROWS: usize = 16;
/// Columns of a group: what is asked for together, and a multiple of what any level computes at once.
const GROUP: usize = 16;
/// Pieces of k that are asked for together: so much later is far enough ahead, and stays in the second-level cache.
const SPAN: usize = 8;
/// Tasks for each worker to aim for, so that a slow one does not hold up all.
const TASKS: usize = 4;
/// Weights of a task at least: reading them takes longer than handing out tasks.
const LEAST: usize = 1 << 16;

/// Whether a product is computed here.
pub(super) fn takes(level: Level, p: &Product<'_>) -> bool {
    let turns = cfg!(target_arch = "x86_64") && level >= Level::Avx2;
    turns && (1..=ROWS).contains(&p.m) && p.n >= GROUP && p.k > 0 && p.a.k_contiguous && p.b.k_contiguous
}

/// Some columns of a product.
pub(super) struct Task<'a> {
    pub p: &'a Product<'a>,
    pub cols: Range<usize>,
}

/// Computes those of the products that are for this file, whose outputs lie apart in `out`.
pub(super) fn run(cpu: &Cpu, products: &[Product<'_>], out: &Output<'_>, accumulate: bool) {
    let isa = cpu.isa();
    let tasks = tasks(cpu.threads(), || products.iter().filter(|p| takes(isa.level(), p)), GROUP);
    cpu.for_each(tasks.len(), |i| {
        X.with_borrow_mut(|x| {
            let task = &tasks[i];
            pack(isa, task.p, x);
            // Workers take tasks that follow one another.
            isa.run(OnVectors { task, next: tasks.get(i + 1), x, out, accumulate });
        });
    });
}

/// As many for every worker, unless they would get small, of whole groups of columns. No bit depends on the cut.
pub(super) fn tasks<'a, I: Iterator<Item = &'a Product<'a>>>(
    threads: usize,
    few: impl Fn() -> I,
    group: usize,
) -> Vec<Task<'a>> {
    let total: usize = few().map(|p| p.n * p.k).sum();
    let wanted = match total / LEAST {
        tasks if tasks < threads => tasks.max(1),
        tasks => tasks.min(TASKS * threads) / threads * threads,
    };
    let each = total.div_ceil(wanted).max(1);
    few().flat_map(|p| equal_parts(p.n, (p.n * p.k).div_ceil(each), group).map(move |cols| Task { p, cols })).collect()
}

thread_local! {
    /// A worker's rows as cells, `[piece][ROWS][ROW_CELLS]`.
    static X: RefCell<AlignedVec<u32>> = RefCell::new(AlignedVec::zeros(0));
}

/// Words of the rows of a piece.
const PIECE: usize = ROWS * ROW_CELLS;

fn pack(isa: Isa, p: &Product<'_>, x: &mut AlignedVec<u32>) {
    let cell = p.cell(isa.level());
    let pieces = cell.pieces(p.k);
    reserve(x, pieces.len() * PIECE);
    for ((k0, kc), x) in pieces.zip(x.chunks_exact_mut(PIECE)) {
        panel::rows(isa, p.a, Part { first: 0, count: p.m, k0, kc, cells: cell.cells(kc) }, cell, x);
    }
}

/// How words of weights meet the cells of a row.
trait Way {
    type Weight: Elem;
    /// Cells for each word.
    const CELLS: usize;
    /// Adds the products of words of all lanes and one row's cells, of which there may be one too few for the last word.
    ///
    /// # Safety
    /// The caller is compiled for V, and so many cells are there.
    unsafe fn add<V: Lanes>(words: V, x: *const f32, cells: usize, sum: V) -> V;
}

/// Pairs of bf16.
struct Pairs;
/// Pairs of bf16, each widened.
struct Widened;
/// One f32.
struct Single;

impl Way for Pairs {
    type Weight = bf16;
    const CELLS: usize = 1;
    #[inline(always)]
    unsafe fn add<V: Lanes>(words: V, x: *const f32, _: usize, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { words.dot(V::splat(*x), sum) }
    }
}

impl Way for Widened {
    type Weight = bf16;
    const CELLS: usize = 2;
    #[inline(always)]
    unsafe fn add<V: Lanes>(words: V, x: *const f32, cells: usize, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let [low, high] = words.halves();
            let sum = low.mul_add(V::splat(*x), sum);
            if cells > 1 { high.mul_add(V::splat(*x.add(1)), sum) } else { sum }
        }
    }
}

impl Way for Single {
    type Weight = f32;
    const CELLS: usize = 1;
    #[inline(always)]
    unsafe fn add<V: Lanes>(words: V, x: *const f32, _: usize, sum: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { words.mul_add(V::splat(*x), sum) }
    }
}

/// A task, and what it needs.
struct OnVectors<'a> {
    task: &'a Task<'a>,
    /// What this worker is likely to do next.
    next: Option<&'a Task<'a>>,
    /// The product's rows, as `pack` leaves them.
    x: &'a [u32],
    out: &'a Output<'a>,
    accumulate: bool,
}

impl Job for OnVectors<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let p = self.task.p;
        match (p.cell(V::LEVEL), p.b.data.dtype()) {
            (Cell::Pair, _) if V::PAIRS => self.groups::<V, Pairs>(),
            (_, DType::Bf16) => self.groups::<V, Widened>(),
            _ => self.groups::<V, Single>(),
        }
    }
}

impl<'a> OnVectors<'a> {
    /// All columns, a group at a time; within one, as many rows as have their sums in registers beside the words.
    #[inline(always)]
    fn groups<V: Lanes, W: Way>(&self) {
        if !V::WORDS {
            return;
        }
        let Task { p, cols } = self.task;
        let narrow = V::N < GROUP;
        let most = if narrow { 8 } else { ROWS };
        for first in cols.clone().step_by(GROUP) {
            let cols = first..cols.end.min(first + GROUP);
            for first in (0..p.m).step_by(most) {
                let rows = first..p.m.min(first + most);
                // SAFETY: V is used inside a function compiled for it.
                unsafe {
                    match rows.len() {
                        // Two chains for each row, as one would wait for itself.
                        1 if narrow => self.block::<V, W, 1, 2>(rows, &cols),
                        2 if narrow => self.block::<V, W, 2, 2>(rows, &cols),
                        3..=4 if narrow => self.block::<V, W, 4, 2>(rows, &cols),
                        1 => self.block::<V, W, 1, 1>(rows, &cols),
                        2 => self.block::<V, W, 2, 1>(rows, &cols),
                        3..=4 => self.block::<V, W, 4, 1>(rows, &cols),
                        5..=8 => self.block::<V, W, 8, 1>(rows, &cols),
                        9..=12 => self.block::<V, W, 12, 1>(rows, &cols),
                        _ => self.block::<V, W, 16, 1>(rows, &cols),
                    }
                }
            }
        }
    }

    /// `M` rows, of which some may not be there, and a group of columns.
    ///
    /// # Safety
    /// The caller is compiled for V.
    #[inline(always)]
    unsafe fn block<V: Lanes, W: Way, const M: usize, const G: usize>(&self, rows: Range<usize>, cols: &Range<usize>) {
        let width = G * V::N;
        for first in cols.clone().step_by(width) {
            // The last columns begin earlier rather than being fewer.
            let begin = first.min(self.task.p.n - width);
            // SAFETY: the caller's promise; so many columns are there.
            let sums = unsafe { self.sums::<V, W, M, G>(rows.start, begin) };
            for (sums, row) in sums.iter().zip(rows.clone()) {
                let mut line = [0.0; 2 * GROUP];
                for (v, sums) in sums.iter().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { sums.store(line[v * V::N..][..V::N].as_mut_ptr()) }
                }
                self.store(row, first..cols.end.min(first + width), &line[first - begin..]);
            }
        }
    }

    /// Moves finished sums of a row to C.
    #[inline(always)]
    fn store(&self, row: usize, cols: Range<usize>, sums: &[f32]) {
        let p = self.task.p;
        // SAFETY: products lie apart in the output (asserted by `cpu::run`), rows of one lie `ldc >= n` apart, and the tasks
        // partition its columns: no other task touches these elements.
        match unsafe { self.out.segment(p.c + row * p.ldc + cols.start, cols.len()) } {
            Segment::F32(c) => finish(c, sums, self.accumulate),
            Segment::Bf16(c) => finish(c, sums, self.accumulate),
        }
    }

    /// The sums of `M` rows from `first` with the columns from `begin` on, over all of k.
    ///
    /// # Safety
    /// The caller is compiled for V, and there are so many columns.
    #[inline(always)]
    unsafe fn sums<V: Lanes, W: Way, const M: usize, const G: usize>(&self, first: usize, begin: usize) -> [[V; G]; M] {
        let p = self.task.p;
        let size = size_of::<W::Weight>();
        let unit = TURNED * size_of::<u32>() / size;
        let weights = &W::Weight::of(p.b.data)[begin * p.b.ld..][..(G * V::N - 1) * p.b.ld + p.k];
        let apart = p.b.ld * size;
        let (mut ahead, mut span_end) = (Lines::NONE, 0);
        let columns = begin..begin + G * V::N;
        // SAFETY: the caller is compiled for V.
        let mut sums = [[unsafe { V::splat(0.0) }; G]; M];
        for (i, (k0, kc)) in p.cell(V::LEVEL).pieces(p.k).enumerate() {
            if k0 >= span_end {
                span_end = p.k.min(k0 + SPAN * kc);
                // Rows after the first find the weights in the cache.
                if first == 0 {
                    ahead = self.ahead(&columns, k0..span_end, (SPAN * kc, 2 * unit));
                }
            }
            // SAFETY: as above. The weights of each group's last row and so of all reach to the end of k, and
            // of a row's cells there are as many as of k in the piece.
            unsafe {
                let x = self.x[i * PIECE..][..PIECE].as_ptr().cast::<f32>().add(first * ROW_CELLS);
                let weights = weights.as_ptr().add(k0).cast::<u8>();
                for u in 0..kc / unit {
                    // For whole lines, which two units share.
                    if u.is_multiple_of(2) {
                        ahead.step();
                    }
                    for g in 0..G {
                        let words = V::turned(weights.add(g * V::N * apart + u * TURNED * size_of::<u32>()), apart);
                        for (w, words) in words.into_iter().enumerate() {
                            let x = x.add((u * TURNED + w) * W::CELLS);
                            for (r, sums) in sums.iter_mut().enumerate() {
                                sums[g] = W::add(words, x.add(r * ROW_CELLS), W::CELLS, sums[g]);
                            }
                        }
                    }
                }
                let done = kc / unit * unit;
                if done < kc {
                    let rest = Rest { from: weights.add(done * size), apart, count: kc - done, way: PhantomData::<W> };
                    rest.add(x.add(done * size * W::CELLS / size_of::<u32>()), &mut sums);
                }
            }
        }
        sums
    }

    /// What comes after some columns over `k`, to be asked for meanwhile: their next `most` of k, or the first of the next
    /// group's, or of the next task's. A step goes so far along k.
    fn ahead(&self, columns: &Range<usize>, k: Range<usize>, (most, step): (usize, usize)) -> Lines<'a> {
        let Task { p, cols } = self.task;
        let of = |p: &Product<'a>, first: usize, k0: usize| {
            let columns = first..p.n.min(first + columns.len());
            Lines::of_operand(p.b, &columns, &(k0..p.k.min(k0 + most)), k.len().div_ceil(step))
        };
        match self.next {
            _ if k.end < p.k => of(p, columns.start, k.end),
            _ if columns.start + GROUP < cols.end => of(p, columns.start + GROUP, 0),
            Some(next) => of(next.p, next.cols.start + columns.start % GROUP, 0),
            None => Lines::NONE,
        }
    }
}

/// What is left of k behind the last whole unit.
struct Rest<W> {
    /// Where it begins in the first of the weights' rows.
    from: *const u8,
    /// Bytes from one row to the next.
    apart: usize,
    /// Weights that are left of a row: less than a unit.
    count: usize,
    way: PhantomData<W>,
}

impl<W: Way> Rest<W> {
    /// Adds their products with the rows whose cells begin at `x`.
    ///
    /// # Safety
    /// The caller is compiled for V; there are G * V::N rows, and as many cells of each of M rows as are left.
    #[inline(always)]
    unsafe fn add<V: Lanes, const M: usize, const G: usize>(&self, x: *const f32, sums: &mut [[V; G]; M]) {
        const UNIT: usize = TURNED * size_of::<u32>();
        let per_word = size_of::<u32>() / size_of::<W::Weight>();
        // SAFETY: the caller's promise; what is left of a row is less than 32 bytes.
        unsafe {
            for g in 0..G {
                let mut padded = [0u8; GROUP * UNIT];
                for (i, to) in padded.chunks_exact_mut(UNIT).take(V::N).enumerate() {
                    let from = self.from.add((g * V::N + i) * self.apart);
                    from.copy_to_nonoverlapping(to.as_mut_ptr(), self.count * size_of::<W::Weight>());
                }
                let words = V::turned(padded.as_ptr(), UNIT);
                for (w, words) in words.into_iter().take(self.count.div_ceil(per_word)).enumerate() {
                    let cells = W::CELLS.min(self.count - w * per_word);
                    for (r, sums) in sums.iter_mut().enumerate() {
                        sums[g] = W::add(words, x.add(w * W::CELLS + r * ROW_CELLS), cells, sums[g]);
                    }
                }
            }
        }
    }
}
