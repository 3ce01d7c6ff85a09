//! Products of few rows on AMX, with weights that k runs along: what decoding does, and experts that few tokens chose. Each
//! weight is used a few times only, so that the speed is that of reading them. Sides are changed: the weights are the left
//! operand, whose tiles are loaded from where they lie, and the few rows are the right one, which each task packs. Products of
//! many rows (`tiles`) pack every weight instead. What comes out is the transpose, which is turned on its way to the output.
//!
//! Each sum takes in the same products in the same order as there: to a product it does not matter which factor is which.

use super::beside::Beside;
use super::cpu::{Output, Product, reserve};
use super::few::{Task, tasks};
use super::tiles::{Side, pack};
use crate::isa::{TILE_ROWS, TileJob, Tiles, transpose_cells};
use crate::panel::Lines;
use crate::panel::blocks::{BLOCK, Left, STEP_CELLS, SUMS, block};
use crate::{AlignedVec, Cpu};
use std::cell::RefCell;
use std::ops::Range;

/// Most rows: with more of them each weight is read so often that packing it pays.
const ROWS: usize = 128;
/// Most words of packed rows: they are to stay in the second-level cache.
const WORDS: usize = 1 << 19;
/// k that is asked for at once, of 32 rows of weights: so much later is far enough ahead, and stays in the second-level cache.
const CHUNK: usize = 1024;

/// Whether a product is computed here.
pub(super) fn takes(p: &Product<'_>) -> bool {
    let few = (1..=ROWS).contains(&p.m) && p.m <= p.n && p.n >= BLOCK && p.b.tokens.is_none();
    few && p.k > 0 && p.a.k_contiguous && p.b.k_contiguous && words(p) <= WORDS
}

/// Words of a product's packed rows.
fn words(p: &Product<'_>) -> usize {
    p.k.div_ceil(BLOCK).saturating_mul(p.m.div_ceil(BLOCK) * STEP_CELLS)
}

/// Computes those of the products that are for this file, whose outputs lie apart in `out`.
pub(super) fn run(cpu: &Cpu, products: &[Product<'_>], out: &Output<'_>, accumulate: bool) {
    let tasks = tasks(cpu.threads(), || products.iter().filter(|p| takes(p)), BLOCK);
    cpu.for_each(tasks.len(), |i| {
        SCRATCH.with_borrow_mut(|scratch| {
            // Workers take tasks that follow one another.
            cpu.isa().run_tiles(OnTiles { task: &tasks[i], next: tasks.get(i + 1), out, accumulate, scratch });
        });
    });
}

/// A worker's packed operands and sums.
struct Scratch {
    /// The rows, `[32 rows][step]`.
    right: AlignedVec<u32>,
    /// Weights that cannot be read where they lie: fewer than 32, or those that end within a step.
    left: AlignedVec<u32>,
    /// `[32 rows]`, each `[weight][row]`.
    sums: AlignedVec<f32>,
    /// A block, `[row][weight]`: it is moved to the output while the next is computed.
    turned: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        right: AlignedVec::zeros(0),
        left: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
        turned: AlignedVec::zeros(0),
    });
}

/// A task, and what it needs.
struct OnTiles<'a> {
    task: &'a Task<'a>,
    /// What this worker is likely to do next.
    next: Option<&'a Task<'a>>,
    out: &'a Output<'a>,
    accumulate: bool,
    scratch: &'a mut Scratch,
}

/// Pieces of k: whole steps, and what is left as one of its own.
fn chunks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let whole = k / BLOCK * BLOCK;
    let chunk = move |k0: usize| k0..whole.min(k0 + CHUNK);
    (0..whole).step_by(CHUNK).map(chunk).chain((whole < k).then_some(whole..k))
}

impl TileJob for OnTiles<'_> {
    #[inline(always)]
    fn run<T: Tiles>(mut self) {
        let Task { p, cols } = self.task;
        let (along, all) = (p.m.div_ceil(BLOCK), p.k.div_ceil(BLOCK));
        reserve(&mut self.scratch.right, words(p));
        reserve(&mut self.scratch.left, CHUNK / BLOCK * STEP_CELLS);
        reserve(&mut self.scratch.sums, along * SUMS);
        reserve(&mut self.scratch.turned, SUMS);
        let right = self.scratch.right.as_mut_ptr();
        // SAFETY: there is room for all rows over all of k.
        unsafe { pack(p.a, Side::Right, &(0..p.m), &(0..p.k), right) };
        let (sums, turned) = (self.scratch.sums.as_mut_ptr(), self.scratch.turned.as_mut_ptr());
        let mut beside = Beside::new(p, self.out, self.accumulate);
        // SAFETY: all that uses tiles is between here and the release, on this thread.
        unsafe { T::configure() };
        for first in cols.clone().step_by(BLOCK) {
            let weights = first..cols.end.min(first + BLOCK);
            for k in chunks(p.k) {
                let steps = k.len().div_ceil(BLOCK);
                let left = self.left(&weights, &k);
                beside.left = self.ahead(&weights, &k, along * steps);
                beside.spread(steps);
                for (c, row) in (0..p.m).step_by(BLOCK).enumerate() {
                    let rows = BLOCK.min(p.m - row);
                    if k.end == p.k {
                        beside.expect((row, rows), (first, weights.len()), steps);
                    }
                    // SAFETY: tiles are configured. The chunk's steps of the weights and of the rows are there, and room for
                    // the sums of all rows.
                    let sums = unsafe {
                        let sums = sums.add(c * SUMS);
                        let right = right.add((c * all + k.start / BLOCK) * STEP_CELLS);
                        block::<T, true>(left, right, sums, (steps, k.start > 0), &mut beside);
                        sums
                    };
                    if k.end == p.k {
                        beside.finish(BLOCK);
                        // SAFETY: both are whole blocks, and what was in the one that is written is in the output.
                        // Products lie apart in the output (asserted by `cpu::run`), rows of one lie `ldc >= n` apart, and
                        // the tasks partition its columns.
                        unsafe {
                            turn(sums, turned);
                            beside.done(turned, (row, rows), (first, weights.len()));
                        }
                    }
                }
            }
        }
        beside.end();
        // SAFETY: configured above.
        unsafe { T::release() };
    }
}

impl<'a> OnTiles<'a> {
    /// Up to 32 rows of weights over a chunk.
    #[inline(always)]
    fn left(&mut self, weights: &Range<usize>, k: &Range<usize>) -> Left {
        let b = self.task.p.b;
        // SAFETY: the part has 32 rows, the last as far as k goes; or there is room for a chunk, and the blocks that read what
        // it held are done.
        unsafe {
            if weights.len() == BLOCK && k.len().is_multiple_of(BLOCK) {
                let part = &b.data.bf16()[weights.start * b.ld + k.start..(weights.end - 1) * b.ld + k.end];
                return Left::rows(part.as_ptr(), b.ld);
            }
            let left = self.scratch.left.as_mut_ptr();
            pack(b, Side::Left, weights, k, left);
            Left::packed(left)
        }
    }

    /// What comes after a chunk, to be asked for in so many steps: the next one of these weights, or the first of the next.
    #[inline(always)]
    fn ahead(&self, weights: &Range<usize>, k: &Range<usize>, steps: usize) -> Lines<'a> {
        let Task { p, cols } = self.task;
        let of = |p: &'a Product<'a>, weights: Range<usize>, k0: usize| {
            Lines::of_operand(p.b, &weights, &(k0..p.k.min(k0 + CHUNK)), steps)
        };
        let from = |first: usize, end: usize| first..end.min(first + BLOCK);
        match self.next {
            _ if k.end < p.k => of(p, weights.clone(), k.end),
            _ if weights.end < cols.end => of(p, from(weights.end, cols.end), 0),
            Some(next) => of(next.p, from(next.cols.start, next.cols.end), 0),
            None => Lines::NONE,
        }
    }
}

/// `to[row][weight]` = `sums[weight][row]` of a block.
///
/// # Safety
/// Both are whole blocks; the CPU has AVX-512.
#[inline(always)]
unsafe fn turn(sums: *const f32, to: *mut f32) {
    for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(i, j)| (i * TILE_ROWS, j * TILE_ROWS)) {
        // SAFETY: the caller's promise, of a quarter.
        unsafe {
            transpose_cells(sums.add(i * BLOCK + j).cast(), 4 * BLOCK, to.add(j * BLOCK + i).cast(), BLOCK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::View;
    use crate::panel::Operand;

    #[test]
    fn chunks_are_whole_steps_and_the_rest() {
        for k in [1, 31, 32, 33, 1024, 1056, 2047, 2048, 10944] {
            let all: Vec<_> = chunks(k).collect();
            assert_eq!((all[0].start, all[all.len() - 1].end), (0, k));
            assert!(all.windows(2).all(|w| w[0].end == w[1].start && w[0].end.is_multiple_of(BLOCK)));
            assert!(
                all.iter().all(|c| c.len() <= CHUNK && (c.len().is_multiple_of(BLOCK) || c.len() < BLOCK)),
                "{all:?}"
            );
        }
    }

    /// Not what has many rows, or more of them than weights, nor weights that k runs across, nor what would not fit.
    #[test]
    fn few_rows_and_weights_along_k() {
        let of = |(m, n, k): (usize, usize, usize), along: [bool; 2]| {
            let [a, b] = along.map(|k_contiguous| Operand::new(View::Bf16(&[]), 0, k_contiguous));
            takes(&Product { m, n, k, a, b, c: 0, ldc: n })
        };
        assert!(of((1, 32, 1), [true; 2]) && of((16, 2048, 18432), [true; 2]) && of((128, 128, 512), [true; 2]));
        for shape in
            [(0, 64, 64), (129, 512, 64), (100, 64, 64), (8, 31, 64), (8, 64, 0), (128, 512, 18432), (32, 512, 1 << 16)]
        {
            assert!(!of(shape, [true; 2]), "{shape:?}");
        }
        assert!(!of((8, 64, usize::MAX), [true; 2]));
        assert!(!of((8, 64, 64), [true, false]) && !of((8, 64, 64), [false, true]));
    }
}
