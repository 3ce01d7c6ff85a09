//! Products on AMX. A task is a tile of a product's output; it goes through its stages, a piece of k each: the tile's
//! columns are packed, 32 rows after the other taken where they lie or packed, and blocks of sums go along the columns.
//!
//! A worker takes several tasks as one chain of stages. What the next stage and the next rows need is packed beside the
//! products of those before, a little in each step, and so are finished sums moved to the output: the unit that
//! multiplies tiles leaves vectors alone. Where a product is cut into several tiles of rows its columns are packed for
//! all of them first.

use super::cpu::{Output, Product, Segment, finish, reserve};
use crate::isa::{TileJob, Tiles, prefetch_line};
use crate::panel::Operand;
use crate::panel::blocks::{self, BLOCK, Left, STEP_CELLS, SUMS, block, pack_left, pack_right};
use crate::{AlignedVec, Cpu, Elem, bf16};
use std::cell::RefCell;
use std::ops::Range;

/// Most k of a piece.
const PIECE: usize = 512;
/// Most rows of a tile, and most columns: with one piece, whose sums need no room, and with several. Packed columns and
/// sums are to fit the second-level cache.
const ROWS: usize = 512;
const COLUMNS: [usize; 2] = [512, 256];
/// Tasks for each worker to aim for, so that a slow one does not hold up all. Where rows are packed there is one: each
/// cut along columns packs them once more.
const TASKS: usize = 4;
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 24;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Rows so far apart share a few sets of the first-level cache, so that 32 of them are packed even if k runs along them.
const CROWDED: usize = 2048;

type Cells = [u32; STEP_CELLS];

/// A tile of a product.
struct Task<'a> {
    p: &'a Product<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
    /// Where the product's packed columns begin, if they are shared by several tasks.
    shared: Option<usize>,
}

/// Computes all products, whose outputs lie apart in `out`.
pub(super) fn run(cpu: &Cpu, products: &[Product<'_>], out: &Output<'_>, accumulate: bool) {
    let (tasks, panels) = tasks(products, cpu.threads(), accumulate);
    let mut shared = cpu.empty::<u32>(panels.iter().map(Panels::cells).sum());
    let jobs: Vec<_> = panels.iter().flat_map(Panels::jobs).collect();
    let room = Pointer(shared.as_mut_ptr());
    cpu.for_each(jobs.len(), |i| cpu.isa().run_tiles(Share { job: &jobs[i], room: &room }));
    let chains = chains(&tasks, TASKS * cpu.threads());
    cpu.for_each(chains.len(), |i| {
        SCRATCH.with_borrow_mut(|scratch| {
            let tasks = &tasks[chains[i].clone()];
            cpu.isa().run_tiles(Chain { tasks, shared: &shared, out, accumulate, scratch });
        });
    });
}

/// Cuts products into tasks, and says which columns are packed beforehand.
fn tasks<'a>(products: &'a [Product<'a>], threads: usize, accumulate: bool) -> (Vec<Task<'a>>, Vec<Panels<'a>>) {
    let work = |p: &Product<'_>| p.m * p.n * p.k.max(1);
    let total: usize = products.iter().map(work).sum();
    let (mut tasks, mut panels, mut at) = (Vec::new(), Vec::new(), 0);
    // Adding an empty sum would turn -0 into 0.
    let idle = |p: &Product<'_>| p.m == 0 || p.n == 0 || (accumulate && p.k == 0);
    for p in products.iter().filter(|p| !idle(p)) {
        let each = (total / (threads * if p.a.k_contiguous { TASKS } else { 1 })).max(LEAST_WORK);
        let (rows, columns) = grid(p, work(p).div_ceil(each));
        let shared = (rows > 1).then_some(at);
        if rows > 1 {
            let panel = Panels { p, at };
            at += panel.cells();
            panels.push(panel);
        }
        for columns in parts(p.n, columns) {
            tasks.extend(parts(p.m, rows).map(|rows| Task { p, rows, columns: columns.clone(), shared }));
        }
    }
    (tasks, panels)
}

/// Parts of rows and of columns: tiles no larger than they may be, and at least `wanted` of them unless they get small.
fn grid(p: &Product<'_>, wanted: usize) -> (usize, usize) {
    let most = COLUMNS[usize::from(p.k > PIECE)];
    // A part a little larger than meant is better than one more.
    let (mut rows, mut columns) = ((p.m - p.m / 8).div_ceil(ROWS), (p.n - p.n / 8).div_ceil(most));
    while rows * columns < wanted {
        let (r, c) = (p.m / rows, p.n / columns);
        match r.max(c) {
            ..=BLOCK => break,
            _ if r >= c => rows += 1,
            _ => columns += 1,
        }
    }
    (rows, columns)
}

/// Cuts `len` into `parts` of whole blocks but for the last, whose sizes differ by one block at most.
fn parts(len: usize, parts: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let blocks = len.div_ceil(BLOCK);
    let at = move |i: usize| (i * blocks / parts * BLOCK).min(len);
    (0..parts).map(move |i| at(i)..at(i + 1)).filter(|r| !r.is_empty())
}

/// Cuts tasks into chains of about equal work.
fn chains(tasks: &[Task<'_>], count: usize) -> Vec<Range<usize>> {
    let work = |t: &Task<'_>| t.rows.len() * t.columns.len() * t.p.k.max(1);
    let most = tasks.iter().map(work).sum::<usize>() / count.max(1);
    let (mut chains, mut first, mut held) = (Vec::new(), 0, 0);
    for (i, t) in tasks.iter().enumerate() {
        if i > first && held + work(t) / 2 > most {
            chains.push(first..i);
            (first, held) = (i, 0);
        }
        held += work(t);
    }
    chains.push(first..tasks.len());
    chains
}

/// The pieces of k, of about equal length and whole steps but for the last; one that is empty if there is no k.
fn pieces(k: usize) -> impl Iterator<Item = Range<usize>> {
    let steps = k.div_ceil(BLOCK);
    let piece = steps.div_ceil(k.div_ceil(PIECE).max(1)).max(1) * BLOCK;
    (0..k.max(1)).step_by(piece).map(move |k0| k0..k.min(k0 + piece))
}

fn steps(k: &Range<usize>) -> usize {
    k.len().div_ceil(BLOCK)
}

/// Columns of a product that are packed for several tasks: `[piece][32 columns][step]`.
struct Panels<'a> {
    p: &'a Product<'a>,
    at: usize,
}

/// A part of that: columns of a piece.
struct Shared<'a> {
    b: Operand<'a>,
    columns: Range<usize>,
    k: Range<usize>,
    at: usize,
}

/// Columns that are packed as one task.
const SHARE: usize = 4 * BLOCK;

impl<'a> Panels<'a> {
    fn cells(&self) -> usize {
        self.p.n.div_ceil(BLOCK) * self.p.k.div_ceil(BLOCK) * STEP_CELLS
    }

    fn jobs(&self) -> Vec<Shared<'a>> {
        let Product { n, k, b, .. } = *self.p;
        let of = |k: Range<usize>| {
            (0..n).step_by(SHARE).map(move |first| {
                let at = self.at + panel_at(n, &k, first);
                Shared { b, columns: first..n.min(first + SHARE), k: k.clone(), at }
            })
        };
        pieces(k).flat_map(of).collect()
    }
}

/// Where column `first` at the piece `k` lies in the packed columns of a product.
fn panel_at(n: usize, k: &Range<usize>, first: usize) -> usize {
    (n.div_ceil(BLOCK) * (k.start / BLOCK) + first / BLOCK * steps(k)) * STEP_CELLS
}

struct Pointer(*mut u32);

// SAFETY: whoever writes through it promises to be the only one at its place.
unsafe impl Sync for Pointer {}

struct Share<'a> {
    job: &'a Shared<'a>,
    room: &'a Pointer,
}

impl TileJob for Share<'_> {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        let Shared { b, columns, k, at } = self.job;
        // SAFETY: the room was sized for all panels, and each job has its own part of one.
        let mut packing = Packing::right(*b, columns, k, unsafe { self.room.0.add(*at) });
        packing.rest();
    }
}

/// A worker's packed operands and sums.
struct Scratch {
    left: [AlignedVec<u32>; 2],
    right: [AlignedVec<u32>; 2],
    /// All sums of a tile where k has several pieces, and two blocks.
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        left: [AlignedVec::zeros(0), AlignedVec::zeros(0)],
        right: [AlignedVec::zeros(0), AlignedVec::zeros(0)],
        sums: AlignedVec::zeros(0),
    });
}

/// Tasks that one worker does one after the other.
struct Chain<'a> {
    tasks: &'a [Task<'a>],
    shared: &'a [u32],
    out: &'a Output<'a>,
    accumulate: bool,
    scratch: &'a mut Scratch,
}

/// A task's piece of k.
struct Stage<'a> {
    task: &'a Task<'a>,
    k: Range<usize>,
    steps: usize,
    /// Blocks down and along the tile.
    blocks: (usize, usize),
    /// Rows are read where they lie.
    in_place: bool,
    /// The columns, if they are packed already.
    packed: Option<*const u32>,
    /// Sums stay in the scratch between pieces.
    pieces: usize,
}

impl<'a> Stage<'a> {
    fn of(task: &'a Task<'a>, shared: &[u32]) -> impl Iterator<Item = Self> {
        let Product { n, k, a, .. } = *task.p;
        let count = pieces(k).count();
        pieces(k).map(move |k| {
            let whole = k.len().is_multiple_of(BLOCK) && !k.is_empty();
            Self {
                task,
                steps: steps(&k),
                blocks: (task.rows.len().div_ceil(BLOCK), task.columns.len().div_ceil(BLOCK)),
                in_place: a.k_contiguous && whole && !(a.ld * size_of::<bf16>()).is_multiple_of(CROWDED),
                packed: task.shared.map(|at| shared[at + panel_at(n, &k, task.columns.start)..].as_ptr()),
                pieces: count,
                k,
            }
        })
    }

    fn rows(&self, r: usize) -> Range<usize> {
        let first = self.task.rows.start + r * BLOCK;
        first..self.task.rows.end.min(first + BLOCK)
    }

    /// Whether the rows of block `r` are read where they lie: fewer are packed, so that what lies behind is not read.
    fn reads(&self, r: usize) -> bool {
        self.in_place && self.rows(r).len() == BLOCK
    }

    fn first(&self) -> bool {
        self.k.start == 0
    }

    fn last(&self) -> bool {
        self.k.end == self.task.p.k
    }
}

impl TileJob for Chain<'_> {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        let stages: Vec<_> = self.tasks.iter().flat_map(|t| Stage::of(t, self.shared)).collect();
        let room = Room::of(self.scratch, &stages);
        // SAFETY: all between is within this call, on this thread.
        unsafe { T::configure() };
        walk::<T>(&stages, &room, Beside::new(self.out, self.accumulate));
        // SAFETY: configured above.
        unsafe { T::release() };
    }
}

/// Where a chain packs and sums. Pointers, because one part is written while another is read.
struct Room {
    left: [*mut u32; 2],
    right: [*mut u32; 2],
    sums: *mut f32,
    /// Two blocks.
    single: *mut f32,
}

impl Room {
    fn of(s: &mut Scratch, stages: &[Stage<'_>]) -> Self {
        let most = |f: &dyn Fn(&Stage<'_>) -> usize| stages.iter().map(f).max().unwrap_or(0);
        let left = most(&|s| s.steps * STEP_CELLS);
        let right = most(&|s| if s.packed.is_some() { 0 } else { s.blocks.1 * s.steps * STEP_CELLS });
        let sums = SUMS * most(&|s| if s.pieces > 1 { s.blocks.0 * s.blocks.1 } else { 0 });
        s.left.iter_mut().for_each(|v| reserve(v, left));
        s.right.iter_mut().for_each(|v| reserve(v, right));
        reserve(&mut s.sums, sums + 2 * SUMS);
        let all = s.sums.as_mut_ptr();
        // SAFETY: reserved just now.
        let single = unsafe { all.add(sums) };
        Self {
            left: s.left.each_mut().map(|v| v.as_mut_ptr()),
            right: s.right.each_mut().map(|v| v.as_mut_ptr()),
            sums: all,
            single,
        }
    }
}

/// All stages. Tiles are configured, and the room is that of these stages.
#[inline(always)]
fn walk<'a, T: Tiles>(stages: &[Stage<'a>], room: &Room, mut beside: Beside<'a>) {
    // Which half of the room is being read.
    let (mut left, mut right, mut single) = (0, 0, 0);
    if let Some(first) = stages.first() {
        Packing::columns_of(first, room.right[0]).rest();
        Packing::rows_of(first, 0, room.left[0]).rest();
    }
    for (i, stage) in stages.iter().enumerate() {
        let (p, (down, along)) = (stage.task.p, stage.blocks);
        let next = stages.get(i + 1);
        beside.right = next.map_or(Packing::NONE, |next| Packing::columns_of(next, room.right[1 - right]));
        beside.right.spread(down * along * stage.steps);
        let columns = stage.packed.unwrap_or(room.right[right]);
        for r in 0..down {
            let after = if r + 1 < down { Some((stage, r + 1)) } else { next.map(|next| (next, 0)) };
            beside.left = after.map_or(Packing::NONE, |(s, r)| Packing::rows_of(s, r, room.left[1 - left]));
            beside.left.spread(along * stage.steps);
            beside.ahead = after.map_or(Ahead::default(), |(s, r)| Ahead::of(s, r, along * stage.steps));
            let rows = stage.rows(r);
            let reads = stage.reads(r);
            for c in 0..along {
                beside.share = BLOCK.div_ceil(stage.steps.max(1));
                // SAFETY: tiles are configured by `run`; the room was sized for every stage, and what this one
                // reads is packed. A block's sums are in the output before it is that place's turn again.
                let sums = unsafe {
                    let sums = match stage.pieces {
                        1 => room.single.add(single * SUMS),
                        _ => room.sums.add((r * along + c) * SUMS),
                    };
                    let from = if reads { in_place(p.a, &rows, &stage.k) } else { Left::packed(room.left[left]) };
                    let columns = columns.add(c * stage.steps * STEP_CELLS);
                    block::<T>(from, columns, sums, (stage.steps, !stage.first()), &mut beside);
                    sums
                };
                beside.finish(BLOCK);
                if stage.last() {
                    single = 1 - single;
                    let first = stage.task.columns.start + c * BLOCK;
                    let columns = first..stage.task.columns.end.min(first + BLOCK);
                    beside.done = Some(Done { p, sums, rows: rows.clone(), columns });
                }
            }
            beside.left.rest();
            left = 1 - left;
        }
        beside.right.rest();
        right = 1 - right;
    }
    beside.finish(BLOCK);
}

/// Rows of an operand where they lie.
///
/// # Safety
/// They are used over `k` alone, while the operand lives.
#[inline(always)]
unsafe fn in_place(op: Operand<'_>, rows: &Range<usize>, k: &Range<usize>) -> Left {
    let part = &op.data.bf16()[rows.start * op.ld + k.start..(rows.end - 1) * op.ld + k.end];
    // SAFETY: the part has 32 rows, the last as far as k goes.
    unsafe { Left::rows(part.as_ptr(), op.ld) }
}

/// A block whose sums are finished, and which of its rows are not in the output yet.
struct Done<'a> {
    p: &'a Product<'a>,
    sums: *const f32,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// What is done beside products of tiles.
struct Beside<'a> {
    out: &'a Output<'a>,
    accumulate: bool,
    done: Option<Done<'a>>,
    /// Rows of it that are moved in a step.
    share: usize,
    /// Rows that are read where they lie, and come next.
    ahead: Ahead,
    /// What is packed for the next blocks down, and for the next stage.
    left: Packing<'a>,
    right: Packing<'a>,
}

impl blocks::Beside for Beside<'_> {
    #[inline(always)]
    fn step(&mut self) {
        self.ahead.step();
        self.left.step();
        self.right.step();
        self.finish(self.share);
    }
}

impl<'a> Beside<'a> {
    fn new(out: &'a Output<'a>, accumulate: bool) -> Self {
        let (left, right) = (Packing::NONE, Packing::NONE);
        Self { out, accumulate, done: None, share: 0, ahead: Ahead::default(), left, right }
    }

    /// Moves up to `most` rows of the finished block to the output.
    #[inline(always)]
    fn finish(&mut self, most: usize) {
        let Some(done) = &mut self.done else { return };
        for _ in 0..most.min(done.rows.len()) {
            // SAFETY: the sums of the block have a row for each, and nobody writes them before they are in the output.
            let sums = unsafe { &*done.sums.cast::<[f32; BLOCK]>() };
            let at = done.p.c + done.rows.start * done.p.ldc + done.columns.start;
            // SAFETY: products lie apart in the output (asserted by `cpu::run`), rows of one lie `ldc >= n` apart, and the
            // tasks partition its rows and columns: no other task touches these elements.
            match unsafe { self.out.segment(at, done.columns.len()) } {
                Segment::F32(c) => whole_or_part(c, sums, self.accumulate),
                Segment::Bf16(c) => whole_or_part(c, sums, self.accumulate),
            }
            done.rows.start += 1;
            // SAFETY: at most one row past the last.
            done.sums = unsafe { done.sums.add(BLOCK) };
        }
        if done.rows.is_empty() {
            self.done = None;
        }
    }
}

/// A row of known length is moved in whole vectors.
#[inline(always)]
fn whole_or_part<E: Elem>(c: &mut [E], sums: &[f32; BLOCK], accumulate: bool) {
    match <&mut [E; BLOCK]>::try_from(&mut *c) {
        Ok(c) => finish(c, sums, accumulate),
        Err(_) => finish(c, sums, accumulate),
    }
}

/// An operand on its way into a panel, a step of 32 outer indices at a time.
struct Packing<'a> {
    what: Option<(Operand<'a>, Side)>,
    outer: Range<usize>,
    k: Range<usize>,
    to: *mut u32,
    next: usize,
    units: usize,
    /// Units are due at an even pace.
    due: usize,
    over: usize,
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
}

impl<'a> Packing<'a> {
    const NONE: Self =
        Self { what: None, outer: 0..0, k: 0..0, to: std::ptr::null_mut(), next: 0, units: 0, due: 0, over: 1 };

    /// # Safety of use
    /// `to` has room for all units.
    fn right(b: Operand<'a>, columns: &Range<usize>, k: &Range<usize>, to: *mut u32) -> Self {
        let units = columns.len().div_ceil(BLOCK) * steps(k);
        Self { what: Some((b, Side::Right)), outer: columns.clone(), k: k.clone(), to, units, ..Self::NONE }
    }

    fn columns_of(stage: &Stage<'a>, to: *mut u32) -> Self {
        match stage.packed {
            Some(_) => Self::NONE,
            None => Self::right(stage.task.p.b, &stage.task.columns, &stage.k, to),
        }
    }

    fn rows_of(stage: &Stage<'a>, r: usize, to: *mut u32) -> Self {
        if stage.reads(r) {
            return Self::NONE;
        }
        let what = Some((stage.task.p.a, Side::Left));
        Self { what, outer: stage.rows(r), k: stage.k.clone(), to, units: stage.steps, ..Self::NONE }
    }

    /// Has all units done in so many steps.
    fn spread(&mut self, steps: usize) {
        self.over = steps.max(1);
    }

    #[inline(always)]
    fn step(&mut self) {
        self.due += self.units;
        while self.due >= self.over {
            self.due -= self.over;
            self.unit();
        }
    }

    #[inline(always)]
    fn rest(&mut self) {
        while self.next < self.units {
            self.unit();
        }
    }

    /// Outer indices and k of a unit, in the order in which they lie in memory, and its place in the panel.
    #[inline(always)]
    fn at(&self, op: Operand<'_>, unit: usize) -> (Range<usize>, Range<usize>, usize) {
        let (groups, steps) = (self.outer.len().div_ceil(BLOCK), steps(&self.k));
        let (g, s) = if op.k_contiguous { (unit / steps, unit % steps) } else { (unit % groups, unit / groups) };
        let part = |of: &Range<usize>, i: usize| of.start + i * BLOCK..of.end.min(of.start + (i + 1) * BLOCK);
        (part(&self.outer, g), part(&self.k, s), g * steps + s)
    }

    #[inline(always)]
    fn unit(&mut self) {
        let Some((op, side)) = self.what.filter(|_| self.next < self.units) else { return };
        if self.next + 1 < self.units {
            let (outer, k, _) = self.at(op, self.next + 1);
            let (rows, columns) = if op.k_contiguous { (outer, k) } else { (k, outer) };
            let at = op.data.bf16().as_ptr().wrapping_add(columns.start);
            rows.for_each(|r| prefetch_line(at.wrapping_add(r * op.ld).cast()));
        }
        let (outer, k, place) = self.at(op, self.next);
        // SAFETY: the panel has room for all units (`Room::of`, `Panels::cells`), and nobody reads it yet.
        let to = unsafe { &mut *self.to.add(place * STEP_CELLS).cast::<Cells>() };
        match side {
            Side::Left => pack_left(op, &outer, &k, to),
            Side::Right => pack_right(op, &outer, &k, to),
        }
        self.next += 1;
    }
}

/// Lines of rows that will be read where they lie, asked for a few at a time.
struct Ahead {
    row: *const u8,
    stride: usize,
    rows: usize,
    lines: usize,
    line: usize,
    share: usize,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { row: std::ptr::null(), stride: 0, rows: 0, lines: 0, line: 0, share: 0 }
    }
}

impl Ahead {
    /// The rows of block `r` of a stage, within so many steps.
    #[inline(always)]
    fn of(stage: &Stage<'_>, r: usize, over: usize) -> Self {
        if !stage.reads(r) {
            return Self::default();
        }
        let (a, rows) = (stage.task.p.a, stage.rows(r));
        let row = a.data.bf16().as_ptr().wrapping_add(rows.start * a.ld + stage.k.start).cast();
        let lines = (stage.k.len() * size_of::<bf16>()).div_ceil(LINE);
        let share = (rows.len() * lines).div_ceil(over.max(1));
        Self { row, stride: a.ld * size_of::<bf16>(), rows: rows.len(), lines, line: 0, share }
    }

    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.share {
            if self.rows == 0 {
                return;
            }
            prefetch_line(self.row.wrapping_add(self.line * LINE));
            self.line += 1;
            if self.line == self.lines {
                (self.line, self.rows, self.row) = (0, self.rows - 1, self.row.wrapping_add(self.stride));
            }
        }
    }
}
