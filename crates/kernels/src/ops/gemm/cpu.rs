//! The product on the host's cores: a list of products is cut into output tiles, and the tiles are the tasks. A task packs
//! the panels of its tile, sums it in its thread's scratch (`kernel`), and rounds the sums into the output.
//!
//! Lanes run over C's columns, so that what is stored is contiguous. Tiles and pieces of k follow the shape and the
//! level; the bits of an element depend on neither, since every sum is one chain over k.

use super::tiles;
use crate::buffer::Pod;
use crate::isa::{Isa, Level, SQUARE, vectorised};
use crate::panel::{self, CELLS, Cell, Multiply, Operand, Part, ROW_CELLS, Rows, block_rows, block_width, group_width};
use crate::{AlignedVec, Cpu, DType, Elem, ViewMut, bf16};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// One product of a list: `C[m, n]` (+)= `A[m, k]` `B[k, n]`, with C at an offset of the output shared by the list.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Outer index m.
    pub a: Operand<'a>,
    /// Outer index n.
    pub b: Operand<'a>,
    /// Where C begins in the output.
    pub c: usize,
    /// Elements from one row of C to the next.
    pub ldc: usize,
}

/// Rows of a tile at most: what is packed of them for a span is to stay in the second-level cache. A multiple of every
/// level's block.
const ROWS: usize = 240;
/// A product of so few rows is not cut along them, so that its columns are packed by the task that uses them.
const ROWS_ALONE: usize = 480;
/// Columns of a tile at most where its sums wait for the next span, and where they do not.
const COLUMNS: [usize; 2] = [512, 2048];
/// Pieces of k that rows are packed for at once.
const SPAN: usize = 2;
/// Smallest tile that a product is cut into for the sake of balance.
const LEAST_ROWS: usize = 96;
const LEAST_COLUMNS: usize = 64;
/// Tasks for each worker to aim for, so that a slow one does not hold up all: fewer where k runs across the rows, whose
/// packing each cut along columns repeats.
const TASKS: [usize; 2] = [2, 4];
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 18;
/// Words of columns that are packed before any of them is used: what this takes adds to the memory of a step.
const SHARED: usize = 1 << 22;
/// Groups of columns that a task packs together for itself: one that goes on to the products from the first-level cache, or
/// where k runs across them so many that what is read lies together.
const TOGETHER: [usize; 2] = [8, 1];
/// Columns that one task packs for others, of an operand that k runs along.
const SHARE: usize = 64;

/// A piece of k: where it begins, its length, its cells, and how many cells there are before it.
#[derive(Clone, Copy)]
struct Piece {
    k0: usize,
    kc: usize,
    cells: usize,
    before: usize,
}

/// Words from one group of shared columns to the next: a line more than they fill, because groups a power of two apart
/// would evict one another while they are written side by side.
fn group_stride(pieces: &[Piece], group: usize) -> usize {
    pieces.last().map_or(0, |last| last.before + last.cells) * group + SQUARE
}

impl Product<'_> {
    fn is_bf16(&self) -> bool {
        self.a.data.dtype() == DType::Bf16 && self.b.data.dtype() == DType::Bf16
    }

    fn cell(&self, isa: Isa) -> Cell {
        Cell::of(isa, self.is_bf16())
    }

    fn work(&self) -> usize {
        self.m * self.n * self.k.max(1)
    }

    fn pieces(&self, cell: Cell) -> Vec<Piece> {
        let mut before = 0;
        let piece = |(k0, kc)| {
            let cells = cell.cells(kc);
            before += cells;
            Piece { k0, kc, cells, before: before - cells }
        };
        cell.pieces(self.k).map(piece).collect()
    }

    /// Parts of rows and of columns when a task should do about `work` multiply-adds.
    fn grid(&self, pieces: usize, work: usize) -> (usize, usize) {
        let most = COLUMNS[usize::from(pieces <= SPAN)];
        let mut rows = if self.m <= ROWS_ALONE { 1 } else { self.m.div_ceil(ROWS) };
        let mut columns = self.n.div_ceil(most);
        while rows * columns < self.work().div_ceil(work) {
            // Rows first: columns are packed once for all of them, but rows once for each part of the columns.
            match (self.m / rows > LEAST_ROWS && self.m > ROWS_ALONE, self.n / columns > LEAST_COLUMNS) {
                (true, _) => rows += 1,
                (_, true) => columns += 1,
                _ if self.m / rows > LEAST_ROWS => rows += 1,
                _ => break,
            }
        }
        (rows, columns)
    }
}

/// Cuts `len` into about so many equal parts of whole multiples.
fn parts(len: usize, parts: usize, multiple: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let step = len.div_ceil(parts).next_multiple_of(multiple);
    (0..len).step_by(step).map(move |i| i..len.min(i + step))
}

/// A tile of a product.
struct Task {
    product: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    /// Where its packed columns begin, if they are shared by several tasks.
    shared: Option<usize>,
}

/// Columns of a product that are packed for several tasks: `[group][cells of all pieces][lane]`, groups
/// [`group_stride`] apart.
struct Panel {
    product: usize,
    cols: Range<usize>,
    at: usize,
}

/// What is computed before anything else is packed.
#[derive(Default)]
struct Round {
    tasks: Vec<Task>,
    panels: Vec<Panel>,
    words: usize,
}

/// Computes all products. Their outputs follow one another in `out`, in the order of the list.
pub fn run(cpu: &Cpu, products: &[Product<'_>], out: ViewMut<'_>, accumulate: bool) {
    let mut end = 0;
    for p in products.iter().filter(|p| p.m > 0 && p.n > 0) {
        assert!(p.ldc >= p.n && p.c >= end, "outputs overlap: {p:?} begins before {end}");
        // Checked, because what tasks may write rests on it.
        let rows = (p.m - 1).checked_mul(p.ldc).and_then(|rows| rows.checked_add(p.n));
        let after = rows.and_then(|rows| rows.checked_add(p.c));
        end = after.unwrap_or_else(|| panic!("an output that ends nowhere: {p:?}"));
    }
    assert!(end <= out.len(), "outputs end at {end} of {}", out.len());
    let out = Output::new(out);
    if cpu.isa().level() == Level::Amx && products.first().is_some_and(Product::is_bf16) {
        assert!(products.iter().all(Product::is_bf16), "products of several types in one list");
        return tiles::run(cpu, products, &out, accumulate);
    }
    let isa = cpu.isa();
    let rounds = rounds(isa, cpu.threads(), products, accumulate);
    let mut shared = cpu.empty::<u32>(rounds.iter().map(|r| r.words).max().unwrap_or(0));
    for Round { tasks, panels, .. } in &rounds {
        let room = Room(shared.as_mut_ptr());
        let shares: Vec<_> = panels.iter().flat_map(|panel| shares(isa, &products[panel.product], panel)).collect();
        cpu.for_each(shares.len(), |i| {
            let Share { product: p, cols, piece, at, len, stride } = &shares[i];
            // SAFETY: the room was sized for all panels of the round, and each share has its own place in one.
            let to = unsafe { room.at(*at, *len) };
            let part = Part { first: cols.start, count: cols.len(), k0: piece.k0, kc: piece.kc, cells: piece.cells };
            panel::lanes(isa, p.b, part, p.cell(isa), (group_width(isa), *stride), to);
        });
        cpu.for_each(tasks.len(), |i| {
            let t = &tasks[i];
            SCRATCH.with_borrow_mut(|s| tile(isa, &products[t.product], t, &shared, s, &out, accumulate));
        });
    }
}

/// Cuts products into tasks, and says which columns are packed beforehand.
/// The cut follows the number of workers: no bit depends on it, since every sum is one chain over k.
fn rounds(isa: Isa, threads: usize, products: &[Product<'_>], accumulate: bool) -> Vec<Round> {
    let total: usize = products.iter().map(Product::work).sum();
    let mut rounds = vec![Round::default()];
    // Adding an empty sum would turn -0 into 0.
    let idle = |p: &Product<'_>| p.m == 0 || p.n == 0 || (accumulate && p.k == 0);
    for (product, p) in products.iter().enumerate().filter(|(_, p)| !idle(p)) {
        let pieces = p.pieces(p.cell(isa));
        let stride = group_stride(&pieces, group_width(isa));
        let tasks = threads * TASKS[usize::from(p.a.k_contiguous)];
        let (rows, columns) = p.grid(pieces.len(), (total / tasks).max(LEAST_WORK));
        let rows = parts(p.m, rows, 12);
        for cols in parts(p.n, columns, 32) {
            let words = cols.len().div_ceil(group_width(isa)) * stride;
            let shares = rows.clone().count() > 1;
            if shares && rounds[rounds.len() - 1].words > SHARED.saturating_sub(words) {
                rounds.push(Round::default());
            }
            let last = rounds.len() - 1;
            let round = &mut rounds[last];
            let shared = shares.then_some(round.words);
            if shares {
                round.panels.push(Panel { product, cols: cols.clone(), at: round.words });
                round.words += words;
            }
            round.tasks.extend(rows.clone().map(|rows| Task { product, rows, cols: cols.clone(), shared }));
        }
    }
    rounds
}

/// A part of a panel that is packed at once.
struct Share<'a> {
    product: &'a Product<'a>,
    cols: Range<usize>,
    piece: Piece,
    at: usize,
    len: usize,
    stride: usize,
}

/// By piece, and where k runs along the columns, whose order in memory is the other, by some columns.
fn shares<'a>(isa: Isa, product: &'a Product<'a>, panel: &Panel) -> Vec<Share<'a>> {
    let (group, pieces) = (group_width(isa), product.pieces(product.cell(isa)));
    let stride = group_stride(&pieces, group);
    let width = if product.b.k_contiguous { SHARE } else { panel.cols.len().next_multiple_of(group) };
    let mut shares = Vec::new();
    for (i, first) in panel.cols.clone().step_by(width).enumerate() {
        let cols = first..panel.cols.end.min(first + width);
        for &piece in &pieces {
            let at = panel.at + i * width / group * stride + piece.before * group;
            let len = (cols.len().div_ceil(group) - 1) * stride + piece.cells * group;
            shares.push(Share { product, cols: cols.clone(), piece, at, len, stride });
        }
    }
    shares
}

struct Room(*mut u32);

// SAFETY: whoever writes through it promises to be the only one at its place.
unsafe impl Sync for Room {}

impl Room {
    /// # Safety
    /// There are `len` words from `at`, and nobody else uses those that will be written.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that it is the only one")]
    unsafe fn at(&self, at: usize, len: usize) -> &mut [u32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

/// A worker's panels and sums.
struct Scratch {
    lanes: AlignedVec<u32>,
    rows: AlignedVec<u32>,
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        lanes: AlignedVec::zeros(0),
        rows: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
    });
}

pub(super) fn reserve<T: Pod>(v: &mut AlignedVec<T>, len: usize) {
    if v.len() < len {
        *v = AlignedVec::zeros(len);
    }
}

/// A tile, a span of k at a time: rows are packed once for all columns, then strips of one group of columns are summed,
/// whose lanes stay in the first-level cache while all rows pass by.
fn tile(isa: Isa, p: &Product<'_>, t: &Task, shared: &[u32], s: &mut Scratch, out: &Output<'_>, accumulate: bool) {
    let (cell, group, block) = (p.cell(isa), group_width(isa), block_rows(isa));
    let (count, pieces) = (t.rows.len(), p.pieces(cell));
    let stride = group_stride(&pieces, group);
    let form = if p.a.k_contiguous { Rows::Single } else { Rows::Blocks };
    let room = match form {
        Rows::Single => count.next_multiple_of(SQUARE) * ROW_CELLS,
        Rows::Blocks => count.div_ceil(block) * CELLS * block_width(block),
    };
    let strip = count * group;
    let strips = if pieces.len() > SPAN { t.cols.len().div_ceil(group) } else { 1 };
    reserve(&mut s.sums, strips * strip);
    let together = TOGETHER[usize::from(p.b.k_contiguous)];
    // As in `group_stride`.
    let apart = |piece: &Piece| piece.cells * group + SQUARE;
    let room_of_lanes = together * (CELLS * group + SQUARE);
    reserve(&mut s.lanes, if t.shared.is_none() { pieces.len().min(SPAN) * room_of_lanes } else { 0 });
    reserve(&mut s.rows, pieces.len().min(SPAN) * room);
    if pieces.is_empty() {
        s.sums[..strip].fill(0.0);
        for first in t.cols.clone().step_by(group) {
            store(isa, t, first..t.cols.end.min(first + group), &s.sums[..strip], group, p, out, accumulate);
        }
    }
    for (i, span) in pieces.chunks(SPAN).enumerate() {
        let part = |range: &Range<usize>, piece: &Piece| Part {
            first: range.start,
            count: range.len(),
            k0: piece.k0,
            kc: piece.kc,
            cells: piece.cells,
        };
        for (piece, rows) in span.iter().zip(s.rows.chunks_exact_mut(room)) {
            match form {
                Rows::Single => panel::rows(isa, p.a, part(&t.rows, piece), cell, rows),
                Rows::Blocks => panel::row_blocks(isa, p.a, part(&t.rows, piece), cell, block, rows),
            }
        }
        for (g, first) in t.cols.clone().step_by(group).enumerate() {
            let cols = first..t.cols.end.min(first + group);
            let sums = &mut s.sums[g % strips * strip..][..strip];
            for (j, (piece, rows)) in span.iter().zip(s.rows.chunks_exact(room)).enumerate() {
                let lanes = match t.shared {
                    Some(at) => &shared[at + g * stride + piece.before * group..],
                    None => {
                        let panel = &mut s.lanes[j * room_of_lanes..];
                        if g % together == 0 {
                            let cols = first..t.cols.end.min(first + together * group);
                            let to = (group, apart(piece));
                            panel::lanes(isa, p.b, part(&cols, piece), cell, to, panel);
                        }
                        &panel[g % together * apart(piece)..]
                    }
                };
                let add = i + j > 0;
                Multiply { lanes, width: group, rows, form, count, cells: piece.cells, sums, add }.run(isa, cell);
            }
            if (i + 1) * SPAN >= pieces.len() {
                store(isa, t, cols, sums, group, p, out, accumulate);
            }
        }
    }
}

vectorised! {
    /// Moves finished sums of some columns, `[row][width]`, to C.
    fn store(
        isa: Isa,
        t: &Task,
        cols: Range<usize>,
        sums: &[f32],
        width: usize,
        p: &Product<'_>,
        out: &Output<'_>,
        accumulate: bool,
    ) {
        for (sums, i) in sums.chunks_exact(width).zip(t.rows.clone()) {
            let at = p.c + i * p.ldc + cols.start;
            // SAFETY: products lie apart in the output (asserted by `run`), rows of one lie `ldc >= n` apart, and the tasks
            // partition its rows and columns: no other task touches these elements.
            let c = unsafe { out.segment(at, cols.len()) };
            match c {
                Segment::F32(c) => finish_strip(c, sums, accumulate),
                Segment::Bf16(c) => finish_strip(c, sums, accumulate),
            }
        }
    }
}

/// As [`finish`], without a loop where there are as many elements as a group of lanes mostly has.
#[inline(always)]
fn finish_strip<T: Elem>(c: &mut [T], sums: &[f32], accumulate: bool) {
    if let (Ok(c), Ok(sums)) = (<&mut [T; 32]>::try_from(&mut *c), <&[f32; 32]>::try_from(sums)) {
        finish(c, sums, accumulate);
    } else {
        finish(c, sums, accumulate);
    }
}

#[inline(always)]
pub(super) fn finish<T: Elem>(c: &mut [T], sums: &[f32], accumulate: bool) {
    if accumulate {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(c.f32() + s));
    } else {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(*s));
    }
}

/// The output, written by many tasks at once, each its own elements.
pub(super) struct Output<'a> {
    data: Pointer,
    len: usize,
    life: PhantomData<&'a mut ()>,
}

#[derive(Clone, Copy)]
pub(super) enum Pointer {
    F32(*mut f32),
    Bf16(*mut bf16),
}

/// Consecutive elements of the output.
enum Segment<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

// SAFETY: an Output only hands out segments, and whoever asks for one promises that no other task has its elements.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(v: ViewMut<'a>) -> Self {
        let len = v.len();
        let data = match v {
            ViewMut::F32(x) => Pointer::F32(x.as_mut_ptr()),
            ViewMut::Bf16(x) => Pointer::Bf16(x.as_mut_ptr()),
            ViewMut::I32(_) | ViewMut::Cuda(_) => panic!("expected a float output in host memory"),
        };
        Self { data, len, life: PhantomData }
    }

    /// Where `rows` rows of `len` elements begin, `stride` apart; whoever writes them promises what `segment` asks for.
    #[inline(always)]
    pub fn at(&self, at: usize, len: usize, rows: usize, stride: usize) -> Pointer {
        let end = at + rows.saturating_sub(1) * stride + len;
        assert!(end <= self.len, "{rows} rows of {len} at {at}, {stride} apart, of {}", self.len);
        // SAFETY: within the borrowed output as just asserted.
        unsafe {
            match self.data {
                Pointer::F32(p) => Pointer::F32(p.add(at)),
                Pointer::Bf16(p) => Pointer::Bf16(p.add(at)),
            }
        }
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// Nothing else refers to any of them while the segment lives.
    unsafe fn segment(&self, at: usize, len: usize) -> Segment<'_> {
        assert!(at <= self.len && len <= self.len - at, "segment {at} + {len} of {}", self.len);
        // SAFETY: within the borrowed output as just asserted, and unshared, as the caller promises.
        unsafe {
            match self.data {
                Pointer::F32(p) => Segment::F32(std::slice::from_raw_parts_mut(p.add(at), len)),
                Pointer::Bf16(p) => Segment::Bf16(std::slice::from_raw_parts_mut(p.add(at), len)),
            }
        }
    }
}
