//! Products on AMX. A task is a tile of a product's output, a piece of k at a time: the tile's columns are packed, 32 rows
//! after the other are taken where they lie or packed, and blocks of sums go along the columns. The rows stay in the
//! first-level cache meanwhile, the columns in the second. Rows that k runs across are packed all at once instead, since 32
//! of them are but a line of each row in memory. Where a product is cut into many tiles of rows its columns
//! are packed for all of them first; where it is cut into many tiles of columns, its rows if k runs across them.
//!
//! Sums of the block before are rounded into the output beside the products of the next, a few rows in each step: the
//! unit that multiplies tiles leaves vectors alone. What comes next is asked for there too: the output's lines, which must
//! be this core's before they are written, the rows after these, and the columns of the next piece or task.

mod pack;
mod plan;

use super::beside::Beside;
use super::cpu::{Output, Product, reserve};
use crate::buffer::Disjoint;
use crate::isa::{TileJob, Tiles};
use crate::panel::Lines;
use crate::panel::blocks::{BLOCK, Left, STEP_CELLS, SUMS, block};
use crate::{AlignedVec, Cpu};
pub(super) use pack::{Side, pack};
pub(super) use plan::shared_bytes;
use plan::{Panels, Part, Task, in_place, panel_at, pieces, steps, tasks};
use std::cell::RefCell;
use std::ops::Range;

/// Computes all products, whose outputs lie apart in `out`.
pub(super) fn run(cpu: &Cpu, products: &[Product<'_>], out: &Output<'_>, accumulate: bool) {
    let (tasks, panels) = tasks(products, cpu.threads(), accumulate);
    let mut shared = cpu.empty::<u32>(panels.iter().map(Panels::cells).sum());
    let parts: Vec<_> = panels.iter().flat_map(Panels::parts).collect();
    let room = Disjoint::new(&mut shared);
    cpu.for_each(parts.len(), |i| cpu.isa().run_tiles(Share { part: &parts[i], room: &room }));
    cpu.for_each(tasks.len(), |i| {
        SCRATCH.with_borrow_mut(|s| {
            let room = Room::of(s, &tasks[i]);
            // Workers take tasks that follow one another.
            let next = tasks.get(i + 1);
            cpu.isa().run_tiles(OnTiles { task: &tasks[i], next, shared: &shared, out, accumulate, room });
        });
    });
}

struct Share<'a> {
    part: &'a Part<'a>,
    room: &'a Disjoint<'a, u32>,
}

impl TileJob for Share<'_> {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        let Part { op, side, outer, k, at } = self.part;
        let cells = outer.len().div_ceil(BLOCK) * steps(k) * STEP_CELLS;
        // SAFETY: each part has its own place in a panel, of so many cells.
        unsafe { pack(*op, *side, outer, k, self.room.part(*at, cells).as_mut_ptr()) }
    }
}

/// A worker's packed operands and sums.
struct Scratch {
    left: AlignedVec<u32>,
    right: AlignedVec<u32>,
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        left: AlignedVec::zeros(0),
        right: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
    });
}

/// Where a task packs and sums. Pointers, because sums are still moved to the output while the next are written.
struct Room {
    /// 32 rows of a piece, or all of the tile's if k runs across them and they are not shared.
    left: *mut u32,
    /// The tile's columns of a piece, if they are not shared.
    right: *mut u32,
    /// So many blocks: all of the tile where k has several pieces, else two.
    sums: *mut f32,
    blocks: usize,
}

impl Room {
    fn of(s: &mut Scratch, task: &Task<'_>) -> Self {
        let longest = pieces(task.p).map(|k| steps(&k)).max().unwrap_or(0);
        let (down, along) = (task.rows.len().div_ceil(BLOCK), task.columns.len().div_ceil(BLOCK));
        let blocks = if pieces(task.p).count() > 1 { down * along } else { 2 };
        let at_once = if task.p.a.k_contiguous || task.left.is_some() { 1 } else { down };
        reserve(&mut s.left, at_once * longest * STEP_CELLS);
        reserve(&mut s.right, if task.right.is_some() { 0 } else { along * longest * STEP_CELLS });
        reserve(&mut s.sums, blocks * SUMS);
        Self { left: s.left.as_mut_ptr(), right: s.right.as_mut_ptr(), sums: s.sums.as_mut_ptr(), blocks }
    }
}

/// A task, and what it needs.
struct OnTiles<'a> {
    task: &'a Task<'a>,
    /// What this worker is likely to do next.
    next: Option<&'a Task<'a>>,
    shared: &'a [u32],
    out: &'a Output<'a>,
    accumulate: bool,
    room: Room,
}

impl TileJob for OnTiles<'_> {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        let (Task { p, columns, right, .. }, room) = (self.task, &self.room);
        let mut beside = Beside::new(p, self.out, self.accumulate);
        // SAFETY: all that uses tiles is between here and the release, on this thread.
        unsafe { T::configure() };
        for k in pieces(p) {
            let right = match right {
                Some(at) => self.panel(*at, p.n, &k, columns.start),
                None => {
                    // SAFETY: there is room for the longest piece, and nobody reads it.
                    unsafe { pack(p.b, Side::Right, columns, &k, room.right) };
                    room.right
                }
            };
            let next = pieces(p).find(|next| next.start == k.end && k.end < p.k);
            beside.right = self.right_ahead(&k, next.as_ref());
            self.piece::<T>(&k, next.as_ref(), right, &mut beside);
        }
        beside.end();
        // SAFETY: configured above.
        unsafe { T::release() };
    }
}

impl<'a> OnTiles<'a> {
    /// All blocks over one piece of k, whose columns are packed at `right`.
    #[inline(always)]
    fn piece<T: Tiles>(
        &self,
        k: &Range<usize>,
        next: Option<&Range<usize>>,
        right: *const u32,
        beside: &mut Beside<'a>,
    ) {
        let (Task { p, rows, columns, .. }, room) = (self.task, &self.room);
        let (steps, along) = (steps(k), columns.len().div_ceil(BLOCK));
        let last = k.end == p.k;
        beside.spread(steps);
        let packed = self.packed_rows(k);
        for (r, first) in rows.clone().step_by(BLOCK).enumerate() {
            let rows = first..rows.end.min(first + BLOCK);
            let left = match packed {
                // SAFETY: all rows of the task were packed with all their steps.
                Some(at) => unsafe { Left::packed(at.add(r * steps * STEP_CELLS)) },
                None => self.left(&rows, k),
            };
            beside.left = self.left_ahead(&rows, k, next, along * steps);
            for c in 0..along {
                let column = columns.start + c * BLOCK;
                let columns = BLOCK.min(columns.end - column);
                if last && c.is_multiple_of(2) {
                    // Lines of two blocks at once, since those of a pair come from memory together.
                    let (blocks, columns) = (2.min(along - c), (2 * BLOCK).min(self.task.columns.end - column));
                    beside.expect((rows.start, rows.len()), (column, columns), blocks * steps);
                }
                // SAFETY: tiles are configured by `run`. The piece's steps of the rows and of the columns are there, and
                // room for its sums, which a block leaves for its next piece or which are in the output before it is
                // their place's turn again.
                let sums = unsafe {
                    let sums = room.sums.add((r * along + c) % room.blocks * SUMS);
                    block::<T, false>(left, right.add(c * steps * STEP_CELLS), sums, (steps, k.start > 0), beside);
                    sums
                };
                beside.finish(BLOCK);
                if last {
                    // SAFETY: as said above; products lie apart in the output (asserted by `cpu::run`), rows of one lie
                    // `ldc >= n` apart, and the tasks partition its rows and columns.
                    unsafe { beside.done(sums, (rows.start, rows.len()), (column, columns)) }
                }
            }
        }
    }

    /// The packed cells from `first` on, of an operand of `len` rows or columns that lies at `at`.
    fn panel(&self, at: usize, len: usize, k: &Range<usize>, first: usize) -> *const u32 {
        self.shared[at + panel_at(len, k, first)..].as_ptr()
    }

    /// What comes after some rows of the piece `k`, to be asked for in so many steps: the rows after them, or those that the
    /// next piece begins with. Not those that k runs across: whole rows of memory are packed at once, which the CPU asks for
    /// by itself, but for rows of tokens.
    fn left_ahead(
        &self,
        rows: &Range<usize>,
        k: &Range<usize>,
        next: Option<&Range<usize>>,
        steps: usize,
    ) -> Lines<'a> {
        let (a, all) = (self.task.p.a, &self.task.rows);
        let block = |task: &Task<'a>, first: usize, k: &Range<usize>| {
            Lines::of_operand(task.p.a, &(first..task.rows.end.min(first + BLOCK)), k, steps)
        };
        let after = || match (next, self.next.filter(|task| task.p.a.tokens.is_some())) {
            (Some(next), _) => Some((self.task, next.clone())),
            (None, Some(task)) => pieces(task.p).next().map(|k| (task, k)),
            (None, None) => None,
        };
        if a.k_contiguous {
            return match after() {
                _ if rows.end < all.end => block(self.task, rows.end, k),
                Some((task, k)) => block(task, task.rows.start, &k),
                None => Lines::NONE,
            };
        }
        // A share of the next piece's for each 32 rows.
        match after().filter(|(task, _)| task.p.a.tokens.is_some() && task.left.is_none()) {
            Some((task, k)) if task.rows.start + rows.start - all.start < task.rows.end => {
                block(task, task.rows.start + rows.start - all.start, &k)
            }
            _ => Lines::NONE,
        }
    }

    /// The columns of the next piece, or those that the next task begins with, to be asked for during the piece `k`. Those
    /// that are packed already lie one after the other, which the CPU notices by itself, as do those of a product of two
    /// operands that k runs across, but for rows of tokens.
    fn right_ahead(&self, k: &Range<usize>, next: Option<&Range<usize>>) -> Lines<'a> {
        let Task { rows, columns, .. } = self.task;
        let steps = rows.len().div_ceil(BLOCK) * columns.len().div_ceil(BLOCK) * steps(k);
        let of = |task: &Task<'a>, k: &Range<usize>| match task.right {
            Some(_) => Lines::NONE,
            None if !task.p.a.k_contiguous && task.p.b.tokens.is_none() => Lines::NONE,
            None => Lines::of_operand(task.p.b, &task.columns, k, steps),
        };
        match (next, self.next) {
            (Some(next), _) => of(self.task, next),
            (None, Some(task)) => pieces(task.p).next().map_or(Lines::NONE, |k| of(task, &k)),
            (None, None) => Lines::NONE,
        }
    }

    /// Rows that k runs across: all of the task's over a piece, packed `[32 rows][step]` now or before.
    #[inline(always)]
    fn packed_rows(&self, k: &Range<usize>) -> Option<*const u32> {
        let Task { p, rows, left, .. } = self.task;
        match left {
            Some(at) => Some(self.panel(*at, p.m, k, rows.start)),
            None if p.a.k_contiguous => None,
            None => {
                // SAFETY: there is room for all rows over the longest piece, and the blocks that read it are done.
                unsafe { pack(p.a, Side::Left, rows, k, self.room.left) };
                Some(self.room.left)
            }
        }
    }

    /// Up to 32 rows over a piece that k runs along: where they lie, or packed. Fewer rows, and those that end within a
    /// step, are packed, so that what lies behind them is not read.
    #[inline(always)]
    fn left(&self, rows: &Range<usize>, k: &Range<usize>) -> Left {
        let a = self.task.p.a;
        let whole = rows.len() == BLOCK && k.len().is_multiple_of(BLOCK) && !k.is_empty();
        if whole && in_place(&a) {
            let part = &a.data.bf16()[rows.start * a.ld + k.start..(rows.end - 1) * a.ld + k.end];
            // SAFETY: the part has 32 rows, the last as far as k goes.
            return unsafe { Left::rows(part.as_ptr(), a.ld) };
        }
        // SAFETY: there is room for the longest piece, and the blocks that read it are done.
        unsafe {
            pack(a, Side::Left, rows, k, self.room.left);
            Left::packed(self.room.left)
        }
    }
}
