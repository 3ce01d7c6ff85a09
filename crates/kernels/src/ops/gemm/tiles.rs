//! Products on AMX. A task is a tile of a product's output, a piece of k at a time: the tile's columns are packed, 32 rows
//! after the other are taken where they lie or packed, and blocks of sums go along the columns. The rows stay in the
//! first-level cache meanwhile, the columns in the second. Rows that k runs across are packed all at once instead, since 32
//! of them are but a line of each row in memory. Where a product is cut into many tiles of rows its columns
//! are packed for all of them first; where it is cut into many tiles of columns, its rows if k runs across them.
//!
//! Sums of the block before are rounded into the output beside the products of the next, a few rows in each step: the
//! unit that multiplies tiles leaves vectors alone. What comes next is asked for there too: the output's lines, which must
//! be this core's before they are written, the rows after these, and the columns of the next piece or task.

use super::beside::Beside;
use super::cpu::{Output, Product, balanced_parts, countable, reserve};
use super::few_tiles;
use crate::buffer::Disjoint;
use crate::isa::{Cache, TileJob, Tiles, ask};
use crate::panel::blocks::{BLOCK, Left, STEP_CELLS, SUMS, Starts, block, pack_left, pack_right};
use crate::panel::{Lines, Operand};
use crate::{AlignedVec, Cpu, View, bf16};
use std::cell::RefCell;
use std::ops::Range;

/// Most k of a piece whose rows are packed, so that they stay in the first-level cache.
const PACKED: usize = 512;
/// Most k of a piece whose rows are read where they lie.
const IN_PLACE: usize = 768;
/// Most rows and columns of a tile: packed columns and sums are to fit the second-level cache.
const ROWS: usize = 512;
const COLUMNS: usize = 512;
/// Tasks for each worker to aim for, so that a slow one does not hold up all.
const TASKS: usize = 2;
/// The same where k runs across the rows: each cut along columns packs them once more.
const TASKS_ACROSS: usize = 1;
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 24;
/// Rows so far apart share a few sets of the first-level cache, so that 32 of them are packed even if k runs along them.
const CROWDED: usize = 4096;
/// More tiles than this share an operand that is packed once for all: what it costs to hand packed cells over through
/// memory is about what it costs to pack them twice.
const ALONE: usize = 2;
/// Rows or columns that are packed for several tasks as one task.
const SHARE: usize = 4 * BLOCK;

/// A tile of a product.
struct Task<'a> {
    p: &'a Product<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
    /// Where the product's packed rows and columns begin, if they are shared by several tasks.
    left: Option<usize>,
    right: Option<usize>,
}

/// An operand of a product that is packed for several tasks: `[piece][32 rows or columns][step]`.
struct Panels<'a> {
    p: &'a Product<'a>,
    side: Side,
    at: usize,
}

/// A part of that: rows or columns of a piece.
struct Part<'a> {
    op: Operand<'a>,
    side: Side,
    outer: Range<usize>,
    k: Range<usize>,
    at: usize,
}

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

/// Bytes that [`run`] takes of the device's memory for products of these `[m, n, k]`, whose rows and columns lie along k or across
/// it.
pub(super) fn shared_bytes(products: &[[usize; 3]], k_contiguous: [bool; 2], threads: usize) -> usize {
    let [a, b] = k_contiguous.map(|k_contiguous| Operand::new(View::Bf16(&[]), 0, k_contiguous));
    let product = |&sizes: &[usize; 3]| {
        let [m, n, k] = countable(sizes);
        Product { m, n, k, a, b, c: 0, ldc: n }
    };
    let products: Vec<_> = products.iter().map(product).collect();
    let (_, panels) = tasks(&products, threads, false);
    panels.iter().map(Panels::cells).sum::<usize>() * size_of::<u32>()
}

/// Cuts products into tasks, and says which operands are packed beforehand.
/// The cut follows the number of workers: no bit depends on it, since every sum is one chain over k.
fn tasks<'a>(products: &'a [Product<'a>], threads: usize, accumulate: bool) -> (Vec<Task<'a>>, Vec<Panels<'a>>) {
    let many = || products.iter().filter(|p| !p.is_idle(accumulate) && !few_tiles::takes(p));
    let total = many().map(Product::work).fold(0, usize::saturating_add);
    let (mut tasks, mut panels, mut at) = (Vec::new(), Vec::new(), 0);
    for p in many() {
        let each = (total / (threads * if p.a.k_contiguous { TASKS } else { TASKS_ACROSS })).max(LEAST_WORK);
        // Of many products there are tasks enough for every worker to have its share.
        let (rows, columns) = grid(p, p.work().div_ceil(each), if products.len() > 1 { 1 } else { threads });
        let mut shared = |side: Side, is_shared: bool| {
            is_shared.then(|| {
                panels.push(Panels { p, side, at });
                at += panels[panels.len() - 1].cells();
                panels[panels.len() - 1].at
            })
        };
        let left = shared(Side::Left, columns > ALONE && !p.a.k_contiguous);
        let right = shared(Side::Right, rows > ALONE);
        for columns in balanced_parts(p.n, columns, BLOCK) {
            tasks.extend(balanced_parts(p.m, rows, BLOCK).map(|rows| Task {
                p,
                rows,
                columns: columns.clone(),
                left,
                right,
            }));
        }
    }
    (tasks, panels)
}

/// Parts of rows and of columns: tiles no larger than they may be, and at least `wanted` of them unless they get small.
/// Of few tiles each worker gets as many.
fn grid(p: &Product<'_>, wanted: usize, workers: usize) -> (usize, usize) {
    // One part a little larger than meant is better than two small ones.
    let least = |len: usize, most: usize| if len <= most + most / 8 { 1 } else { len.div_ceil(most) };
    let (mut rows, mut columns) = (least(p.m, ROWS), least(p.n, COLUMNS));
    while rows * columns < wanted {
        let (r, c) = (p.m / rows, p.n / columns);
        match r.max(c) {
            ..=BLOCK => break,
            _ if r > c => rows += 1,
            _ => columns += 1,
        }
    }
    let uneven = |tiles: usize| (workers..4 * workers).contains(&tiles) && !tiles.is_multiple_of(workers);
    while uneven(rows * columns) && p.m.div_ceil(rows).min(p.n.div_ceil(columns)) > BLOCK {
        if columns >= rows { columns += 1 } else { rows += 1 }
    }
    (rows, columns)
}

/// Whether rows of the left operand are read where they lie.
fn in_place(a: &Operand<'_>) -> bool {
    a.k_contiguous && a.tokens.is_none() && !(a.ld * size_of::<bf16>()).is_multiple_of(CROWDED)
}

/// The pieces of k, of about equal length and whole steps but for the last; one that is empty if there is no k.
fn pieces(p: &Product<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (k, most) = (p.k, if in_place(&p.a) { IN_PLACE } else { PACKED });
    let piece = k.div_ceil(BLOCK).div_ceil(k.div_ceil(most).max(1)).max(1) * BLOCK;
    (0..k.max(1)).step_by(piece).map(move |k0| k0..k.min(k0 + piece))
}

fn steps(k: &Range<usize>) -> usize {
    k.len().div_ceil(BLOCK)
}

impl<'a> Panels<'a> {
    /// The operand and its outer length.
    fn operand(&self) -> (Operand<'a>, usize) {
        match self.side {
            Side::Left => (self.p.a, self.p.m),
            Side::Right => (self.p.b, self.p.n),
        }
    }

    fn cells(&self) -> usize {
        self.operand().1.div_ceil(BLOCK) * self.p.k.div_ceil(BLOCK) * STEP_CELLS
    }

    fn parts(&self) -> Vec<Part<'a>> {
        let (op, len) = self.operand();
        let of = |k: Range<usize>| {
            (0..len).step_by(SHARE).map(move |first| {
                let at = self.at + panel_at(len, &k, first);
                Part { op, side: self.side, outer: first..len.min(first + SHARE), k: k.clone(), at }
            })
        };
        pieces(self.p).flat_map(of).collect()
    }
}

/// Where row or column `first` of `len` at the piece `k` lies in a packed operand.
fn panel_at(len: usize, k: &Range<usize>, first: usize) -> usize {
    (len.div_ceil(BLOCK) * (k.start / BLOCK) + first / BLOCK * steps(k)) * STEP_CELLS
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

/// Which operand: rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

/// Packs a part of an operand, `[32 outer indices][step]`, in the order in which it lies in memory.
///
/// # Safety
/// There is room at `to` for so many blocks times so many steps, and nobody else uses it.
#[inline(always)]
pub(super) unsafe fn pack(op: Operand<'_>, side: Side, outer: &Range<usize>, k: &Range<usize>, to: *mut u32) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Tasks partition the output, whatever the shape and the number of workers, and are no larger than scratch should be.
    #[test]
    fn tasks_partition_the_output() {
        for (m, n, k) in [(1, 1, 1), (33, 700, 64), (4096, 192, 512), (576, 2048, 512), (600, 31, 2000), (5, 9000, 70)]
        {
            for (threads, k_contiguous) in [(1, true), (2, false), (2, true), (64, true), (64, false)] {
                let a = Operand::new(View::Bf16(&[]), 0, k_contiguous);
                // Few rows would be no tasks of this file's if k ran along both.
                let p = [Product { m, n, k, a, b: Operand::new(View::Bf16(&[]), 0, false), c: 0, ldc: n }];
                let (tasks, panels) = tasks(&p, threads, false);
                let mut seen = vec![0; m.div_ceil(BLOCK) * n.div_ceil(BLOCK)];
                for t in &tasks {
                    assert!(t.rows.len() <= ROWS + ROWS / 8 && t.columns.len() <= COLUMNS + COLUMNS / 8);
                    let packed = |side| panels.iter().any(|p| p.side == side);
                    assert_eq!((t.left.is_some(), t.right.is_some()), (packed(Side::Left), packed(Side::Right)));
                    for r in t.rows.clone().step_by(BLOCK) {
                        for c in t.columns.clone().step_by(BLOCK) {
                            assert!(r.is_multiple_of(BLOCK) && c.is_multiple_of(BLOCK));
                            seen[r / BLOCK * n.div_ceil(BLOCK) + c / BLOCK] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&s| s == 1), "{m} {n} {k} {threads} {k_contiguous}");
            }
        }
    }

    /// Few rows are packed by their tasks where k runs along both operands, else as those of other products.
    #[test]
    fn what_is_packed_of_few_rows_is_foretold() {
        let cells = |k: usize, n: usize| n.div_ceil(BLOCK) * k.div_ceil(BLOCK) * STEP_CELLS * size_of::<u32>();
        let of = |k_contiguous| shared_bytes(&[[128, 1024, 8192]], k_contiguous, 32);
        assert_eq!((of([true, true]), of([true, false])), (0, cells(8192, 1024)));
    }

    #[test]
    fn pieces_are_whole_steps() {
        for (k, ld) in [0, 1, 31, 32, 512, 513, 768, 1408, 21888].iter().flat_map(|&k| [(k, 1000), (k, 2048)]) {
            let a = Operand::new(View::Bf16(&[]), ld, true);
            let most = if ld == 2048 { 512 } else { 768 };
            let all: Vec<_> = pieces(&Product { m: 1, n: 1, k, a, b: a, c: 0, ldc: 1 }).collect();
            assert_eq!((all[0].start, all[all.len() - 1].end), (0, k));
            assert!(all.windows(2).all(|w| w[0].end == w[1].start && w[0].end.is_multiple_of(BLOCK)));
            assert!(all.iter().all(|p| p.len() <= most) && all.len() == k.div_ceil(most).max(1), "{k}: {all:?}");
        }
    }
}
