//! A tile of a product on AMX. Its columns are packed, piece of k by piece; for each 32 rows of a piece, blocks of sums
//! go along the columns. The rows stay in the first-level cache meanwhile, the columns in the second.
//!
//! What else there is to do, rounding the sums of the block before into the output and asking for the operands of the
//! next, is done beside the products, a little in each step: the unit that multiplies tiles leaves vectors alone.

use super::cpu::{Output, Product, Segment, Task, finish, reserve};
use crate::isa::{TileJob, Tiles, prefetch_line};
use crate::panel::Operand;
use crate::panel::blocks::{BLOCK, Left, STEP_CELLS, SUMS, block, pack_left, pack_right};
use crate::{AlignedVec, bf16};
use std::cell::RefCell;
use std::ops::Range;

/// Most k of a piece.
const PIECE: usize = 512;
/// Bytes of a cache line.
const LINE: usize = 64;

/// A worker's packed operands and sums.
struct Scratch {
    /// Of the left operand, 32 rows of a piece.
    left: AlignedVec<u32>,
    /// Of the right one, the tile's columns of a piece.
    right: AlignedVec<u32>,
    /// Sums: all of the tile where k has several pieces, else two blocks.
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        left: AlignedVec::zeros(0),
        right: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
    });
}

/// One task of a list of products.
pub(super) struct OnTiles<'a> {
    pub p: &'a Product<'a>,
    pub task: &'a Task,
    pub out: &'a Output<'a>,
    pub accumulate: bool,
}

impl TileJob for OnTiles<'_> {
    #[inline(always)]
    fn run<T: Tiles>(self) {
        SCRATCH.with_borrow_mut(|s| {
            // SAFETY: all between is within this call, on this thread.
            unsafe { T::configure() };
            self.walk::<T>(s);
            // SAFETY: configured above.
            unsafe { T::release() };
        });
    }
}

/// Where a task packs and sums. Pointers, because a block is still moved to the output while the next is summed.
#[derive(Clone, Copy)]
struct Room {
    left: *mut u32,
    right: *mut u32,
    sums: *mut f32,
    /// Words of the panels.
    panels: [usize; 2],
}

/// A piece of k in the course of a task.
struct Piece<'a> {
    k: &'a Range<usize>,
    steps: usize,
    /// There were pieces before.
    add: bool,
    /// There are none after it.
    last: bool,
}

impl OnTiles<'_> {
    #[inline(always)]
    fn walk<T: Tiles>(&self, s: &mut Scratch) {
        let (p, rows, columns) = (self.p, &self.task.rows, &self.task.cols);
        let (down, along) = (rows.len().div_ceil(BLOCK), columns.len().div_ceil(BLOCK));
        let pieces = pieces(p.k);
        let most = pieces[0].len().div_ceil(BLOCK) * STEP_CELLS;
        let panels = [most, along * most];
        let blocks = if pieces.len() > 1 { down * along } else { 2 };
        reserve(&mut s.left, panels[0]);
        reserve(&mut s.right, panels[1]);
        reserve(&mut s.sums, SUMS * blocks);
        let room =
            Room { left: s.left.as_mut_ptr(), right: s.right.as_mut_ptr(), sums: s.sums.as_mut_ptr(), panels };
        let mut beside = Beside { of: self, done: None, ahead: [Ahead::default(); 2] };
        for (i, k) in pieces.iter().enumerate() {
            let next = pieces.get(i + 1);
            let piece = Piece { k, steps: k.len().div_ceil(BLOCK), add: i > 0, last: next.is_none() };
            // SAFETY: reserved above, and nothing else refers to it.
            pack_right(p.b, columns, k, unsafe { std::slice::from_raw_parts_mut(room.right, panels[1]) });
            beside.ahead[1] = Ahead::of(p.b, columns, next, down * along * piece.steps);
            let at = |r: usize| rows.start + r * BLOCK..rows.end.min(rows.start + (r + 1) * BLOCK);
            for r in 0..down {
                let after = if r + 1 < down { (at(r + 1), Some(k)) } else { (at(0), next) };
                beside.ahead[0] = Ahead::of(p.a, &after.0, after.1, along * piece.steps);
                // SAFETY: tiles are configured by `run`. Panels were reserved for the largest piece, which is the first,
                // and sums for as many blocks as are held at once.
                unsafe { self.row_of_blocks::<T>(at(r), (along, &piece), room, |c| (r * along + c) % blocks, &mut beside) };
            }
        }
        beside.finish(BLOCK);
    }

    /// The blocks of some rows, along all columns; sums lie at the place of each.
    ///
    /// # Safety
    /// Tiles are configured, and there is room for the piece and for the blocks' places.
    #[inline(always)]
    unsafe fn row_of_blocks<T: Tiles>(
        &self,
        rows: Range<usize>,
        (along, piece): (usize, &Piece<'_>),
        room: Room,
        place: impl Fn(usize) -> usize,
        beside: &mut Beside<'_>,
    ) {
        let (a, columns, steps) = (self.p.a, &self.task.cols, piece.steps);
        // Rows that are fewer or end within a step are packed, so that what lies behind them is not read.
        let direct = a.k_contiguous && rows.len() == BLOCK && piece.k.len().is_multiple_of(BLOCK) && steps > 0;
        // SAFETY: the caller's promise; nothing else refers to the panel.
        let (packed, panel) = unsafe {
            (Left::packed(room.left), std::slice::from_raw_parts_mut(room.left, room.panels[0]))
        };
        if !direct {
            pack_left(a, &rows, piece.k, panel);
        }
        for c in 0..along {
            let share = BLOCK.div_ceil(steps.max(1));
            // SAFETY: as above. What is read in place has `steps` whole steps.
            let sums = unsafe {
                let (right, sums) = (room.right.add(c * steps * STEP_CELLS), room.sums.add(place(c) * SUMS));
                let (steps, beside) = ((steps, piece.add), || beside.step(share));
                if c == 0 && direct {
                    block::<T, true>(in_place(a, &rows, piece.k), room.left, right, sums, steps, beside);
                } else {
                    block::<T, false>(packed, room.left, right, sums, steps, beside);
                }
                sums
            };
            beside.finish(BLOCK);
            if piece.last {
                let first = columns.start + c * BLOCK;
                let columns = first..columns.end.min(first + BLOCK);
                beside.done = Some(Done { sums, rows: rows.clone(), columns });
            }
        }
    }
}

/// The pieces of k, of about equal length and whole steps but for the last; one that is empty if there is no k.
fn pieces(k: usize) -> Vec<Range<usize>> {
    let steps = k.div_ceil(BLOCK);
    let piece = steps.div_ceil(k.div_ceil(PIECE).max(1)).max(1) * BLOCK;
    (0..k.max(1)).step_by(piece).map(|k0| k0..k.min(k0 + piece)).collect()
}

/// Rows of an operand where they lie.
///
/// # Safety
/// They are used over `k` alone, while the operand lives.
unsafe fn in_place(op: Operand<'_>, rows: &Range<usize>, k: &Range<usize>) -> Left {
    let part = &op.data.bf16()[rows.start * op.ld + k.start..(rows.end - 1) * op.ld + k.end];
    // SAFETY: the part has 32 rows, the last as far as k goes.
    unsafe { Left::rows(part.as_ptr(), op.ld) }
}

/// A block whose sums are finished, and which of its rows are not in the output yet.
struct Done {
    sums: *const f32,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// What is done beside products of tiles.
struct Beside<'a> {
    of: &'a OnTiles<'a>,
    done: Option<Done>,
    /// Of both operands, what comes next.
    ahead: [Ahead; 2],
}

impl Beside<'_> {
    /// `share`: rows of sums.
    #[inline(always)]
    fn step(&mut self, share: usize) {
        self.ahead.iter_mut().for_each(Ahead::step);
        self.finish(share);
    }

    /// Moves up to `most` rows of the finished block to the output.
    #[inline(always)]
    fn finish(&mut self, most: usize) {
        let Some(done) = &mut self.done else { return };
        let OnTiles { p, out, accumulate, .. } = self.of;
        for _ in 0..most.min(done.rows.len()) {
            // SAFETY: the sums of the block have a row for each, and nobody writes them before they are in the output.
            let sums = unsafe { &*done.sums.cast::<[f32; BLOCK]>() };
            let at = p.c + done.rows.start * p.ldc + done.columns.start;
            // SAFETY: products lie apart in the output (asserted by `run`), rows of one lie `ldc >= n` apart, and the tasks
            // partition its rows and columns: no other task touches these elements.
            match unsafe { out.segment(at, done.columns.len()) } {
                Segment::F32(c) => whole_or_part(c, sums, *accumulate),
                Segment::Bf16(c) => whole_or_part(c, sums, *accumulate),
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
fn whole_or_part<E: crate::Elem>(c: &mut [E], sums: &[f32; BLOCK], accumulate: bool) {
    match <&mut [E; BLOCK]>::try_from(&mut *c) {
        Ok(c) => finish(c, sums, accumulate),
        Err(_) => finish(c, sums, accumulate),
    }
}

/// Lines of a part of an operand that will be needed soon, asked for a few at a time.
#[derive(Clone, Copy)]
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
    /// The part of `op` at `outer` and `k`, in `steps` steps; nothing without a k.
    #[inline(always)]
    fn of(op: Operand<'_>, outer: &Range<usize>, k: Option<&Range<usize>>, steps: usize) -> Self {
        let Some(k) = k else { return Self::default() };
        let (rows, columns) = if op.k_contiguous { (outer, k) } else { (k, outer) };
        let row = op.data.bf16().as_ptr().wrapping_add(rows.start * op.ld + columns.start).cast();
        let lines = (columns.len() * size_of::<bf16>()).div_ceil(LINE);
        let share = (rows.len() * lines).div_ceil(steps.max(1));
        Self { row, stride: op.ld * size_of::<bf16>(), rows: rows.len(), lines, line: 0, share }
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
