//! The product on the host's cores: a list of products is cut into output tiles, and the tiles are the tasks (`strips`).
//! What several tasks share of the columns is packed before.
//!
//! Lanes run over C's columns, so that what is stored is contiguous. Tiles and pieces of k follow the shape and the
//! level; the bits of an element depend on neither, since every sum is one chain over k.

use super::strips::{self, Scratch, Tile};
use super::{few, few_tiles, tiles};
use crate::buffer::{Disjoint, Pod};
use crate::isa::{Level, SQUARE};
use crate::panel::{self, Cell, Operand, Part, Pointer, Tokens, group_width};
use crate::{AlignedVec, Cpu, DType, View, ViewMut, bf16};
use std::cell::RefCell;
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

/// Rows of a tile at most, twice as many of pairs, unless k is short: what is packed of them for a span is to stay in the second-level cache.
/// A multiple of every level's block.
pub(super) const ROWS: usize = 120;
/// A tile has as many times more rows as k fits into this, up to so many: from k = 256 down.
const SHORT: usize = 512;
const TALLER: usize = 4;
/// A product of so few rows is not cut along them, so that its columns are packed by the task that uses them; of so many if
/// k runs across them and they are f32, which need no room for themselves, or are packed for many columns.
const ROWS_ALONE: [usize; 2] = [480, 512];
/// So many columns at least share what is packed of up to as many rows.
const PACKING_COLUMNS: usize = 128;
/// Columns of a tile at most, and where its sums wait for the next span beside rows that need no packing: those of the next
/// tile would be packed again. Between the two, what is packed of the columns is to stay at about [`SHARED`].
const COLUMNS: [usize; 2] = [2048, 512];
/// Sums that wait in the second-level cache at most, beside rows that need no packing. Beside packed rows up to as many as a
/// tile has wait, a few MB for each worker.
const SUMS: usize = 1 << 17;
/// Pieces of k that rows are packed for at once, and over which sums stay in registers.
pub(super) const SPAN: usize = 4;
/// A multiple of the rows that any level computes at once.
const BLOCK: usize = 12;
/// Smallest tile that a product is cut into for the sake of balance.
const LEAST_ROWS: usize = 96;
const LEAST_COLUMNS: usize = 64;
/// Tasks for each worker to aim for, so that a slow one does not hold up all: fewer where k runs across the rows, whose
/// packing each cut along columns repeats, and fewest where there is but one product.
const TASKS: [[usize; 2]; 2] = [[2, 1], [4, 4]];
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 18;
/// Words of columns that are packed before any of them is used, unless one part of them alone has more: what this takes adds
/// to the memory of a step.
const SHARED: usize = 1 << 22;
/// Columns that one task packs for others, of an operand that k runs along.
const SHARE: usize = 64;

/// A piece of k: where it begins, its length, its cells, and how many cells there are before it.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub k0: usize,
    pub kc: usize,
    pub cells: usize,
    before: usize,
}

/// Words from one group of packed columns to the next: a line more than they fill, because groups a power of two apart
/// would evict one another while they are written side by side.
pub(super) fn apart(cells: usize, group: usize) -> usize {
    cells * group + SQUARE
}

impl Piece {
    pub fn part(&self, outer: &Range<usize>) -> Part {
        Part { first: outer.start, count: outer.len(), k0: self.k0, kc: self.kc, cells: self.cells }
    }

    /// Where piece `i` of a panel of so many groups begins: all groups of the pieces before lie ahead of it.
    pub fn at(&self, i: usize, groups: usize, group: usize) -> usize {
        groups * (self.before * group + i * SQUARE)
    }
}

impl Product<'_> {
    fn is_bf16(&self) -> bool {
        self.a.data.dtype() == DType::Bf16 && self.b.data.dtype() == DType::Bf16
    }

    pub(super) fn cell(&self, level: Level) -> Cell {
        Cell::of(level, self.is_bf16())
    }

    /// Products that are only spoken of may be of any size.
    fn work(&self) -> usize {
        self.m.saturating_mul(self.n).saturating_mul(self.k.max(1))
    }

    /// Words of so many columns, packed over all of k: as many as their pieces have, one after the other.
    fn panel_words(&self, columns: usize, level: Level) -> usize {
        let (cell, group) = (self.cell(level), group_width(level));
        let words = cell.cells(self.k).saturating_mul(group).saturating_add(cell.pieces(self.k).len() * SQUARE);
        columns.div_ceil(group).saturating_mul(words)
    }

    pub(super) fn pieces(&self, cell: Cell) -> Vec<Piece> {
        let mut before = 0;
        let piece = |(k0, kc)| {
            let cells = cell.cells(kc);
            before += cells;
            Piece { k0, kc, cells, before: before - cells }
        };
        cell.pieces(self.k).map(piece).collect()
    }

    /// Columns of a tile of so many rows at most.
    fn columns(&self, level: Level, rows: usize) -> usize {
        let ([mut most, fewest], cell) = (COLUMNS, self.cell(level));
        let span = if self.a.k_contiguous { SPAN } else { 1 };
        if cell.pieces(self.k).len() > span && !strips::packs_rows(self, cell) {
            return fewest.min(SUMS / rows);
        }
        // 2,048 columns of as many f32 are a little more, for the lines between groups.
        while most > fewest && self.panel_words(most, level) > SHARED / 8 * 9 {
            most /= 2;
        }
        most
    }

    /// Parts of rows and of columns when a task should do about `work` multiply-adds, as many for each worker if `workers`
    /// have no other product to do.
    fn grid(&self, level: Level, work: usize, workers: usize) -> (usize, usize) {
        let in_place = !self.a.k_contiguous && self.a.data.dtype() == DType::F32 && self.a.tokens.is_none();
        // Each part of the columns packs these rows again.
        let wide = !self.a.k_contiguous && self.n >= PACKING_COLUMNS * self.work().div_ceil(work);
        let alone = self.m <= ROWS_ALONE[usize::from(in_place || wide)];
        // Pairs are multiplied twice as fast, so that each panel of columns must serve more rows.
        let tall = if self.cell(level) == Cell::Pair { 2 * ROWS } else { ROWS };
        // Of a short k more rows take no more room, and make up for what each strip costs beside its products.
        let taller = if self.a.k_contiguous { (SHORT / self.k.max(1)).clamp(1, TALLER) } else { 1 };
        let tall = tall * taller;
        let mut rows = if alone { 1 } else { self.m.div_ceil(tall) };
        let mut columns = self.n.div_ceil(self.columns(level, self.m.div_ceil(rows)));
        while rows * columns < self.work().div_ceil(work) {
            // Rows first: columns are packed once for all of them, but rows once for each part of the columns.
            match (self.m / rows > LEAST_ROWS && !alone, self.n / columns > LEAST_COLUMNS) {
                (true, _) => rows += 1,
                (_, true) => columns += 1,
                _ if self.m / rows > LEAST_ROWS => rows += 1,
                _ => break,
            }
        }
        let even = rows.next_multiple_of(workers);
        if !alone && !columns.is_multiple_of(workers) && self.m / even >= LEAST_ROWS {
            rows = even;
        }
        (rows, columns)
    }
}

/// Cuts `len` into about so many equal parts of whole multiples.
pub(super) fn parts(len: usize, parts: usize, multiple: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let step = len.div_ceil(parts).next_multiple_of(multiple);
    (0..len).step_by(step).map(move |i| i..len.min(i + step))
}

/// A tile of a product.
pub(super) struct Task {
    product: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    /// Where its packed columns begin, if they are shared by several tasks.
    pub shared: Option<usize>,
}

/// Some columns of a product: one task for each part of the rows.
struct Columns {
    product: usize,
    cols: Range<usize>,
    /// Parts of the rows.
    rows: usize,
    /// Where they lie if they are packed for several tasks: `[piece][group][cells][lane]`, groups [`apart`].
    shared: Option<usize>,
}

impl Columns {
    fn tasks(&self, products: &[Product<'_>]) -> impl Iterator<Item = Task> {
        row_parts(&products[self.product], self.rows).map(|rows| Task {
            product: self.product,
            rows,
            cols: self.cols.clone(),
            shared: self.shared,
        })
    }
}

/// So many parts of whole blocks, as equal as can be: workers are to have as many rows each.
fn row_parts(p: &Product<'_>, count: usize) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
    let (m, blocks) = (p.m, p.m.div_ceil(BLOCK));
    let count = count.min(blocks);
    let first = move |i: usize| m.min(i * blocks / count * BLOCK);
    (0..count).map(move |i| first(i)..first(i + 1))
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
        few_tiles::run(cpu, products, &out, accumulate);
        return tiles::run(cpu, products, &out, accumulate);
    }
    few::run(cpu, products, &out, accumulate);
    let isa = cpu.isa();
    let mut rounds: Vec<Vec<Columns>> = Vec::new();
    let words = cut(isa.level(), cpu.threads(), products, accumulate, |round, columns| {
        if !few::takes(isa.level(), &products[columns.product]) {
            rounds.resize_with(round + 1, Vec::new);
            rounds[round].push(columns);
        }
    });
    let mut shared = cpu.empty::<u32>(words);
    let mut compute = || {
        for columns in &rounds {
            pack(cpu, products, columns, &mut shared);
            let tasks: Vec<_> = columns.iter().flat_map(|c| c.tasks(products)).collect();
            cpu.for_each(tasks.len(), |i| {
                let of = |i: usize| (&products[tasks[i].product], &tasks[i]);
                let (now, next) = (of(i), (i + 1 < tasks.len()).then(|| of(i + 1)));
                SCRATCH.with_borrow_mut(|s| Tile::new(isa, now, next, &shared, &out, accumulate).run(s));
            });
        }
    };
    // Waking workers takes as long as many thousands of multiply-adds: once, or not at all.
    if rounds.iter().flatten().map(|c| c.rows).sum::<usize>() > 1 { cpu.together(compute) } else { compute() }
}

/// Packs what several tasks share.
fn pack(cpu: &Cpu, products: &[Product<'_>], columns: &[Columns], shared: &mut [u32]) {
    let isa = cpu.isa();
    let (shares, room) = (shares(isa.level(), products, columns), Disjoint::new(shared));
    cpu.for_each(shares.len(), |i| {
        let Share { product: p, part, apart, to } = &shares[i];
        // SAFETY: the places of shares follow one another.
        let to = unsafe { room.part(to.start, to.len()) };
        panel::lanes(isa, p.b, *part, p.cell(isa.level()), (group_width(isa.level()), *apart), to);
    });
}

/// More rows or columns than any model has. Products that are only spoken of may have more, which are not cut one by one.
const MANY: usize = 1 << 18;

/// Bytes that [`run`] takes of the device's memory for products of these `[m, n, k]` on vectors, both operands of `dtype`,
/// the rows' k along or across them; the left operand's may be of tokens.
pub(super) fn shared_bytes(
    level: Level,
    threads: usize,
    products: &[[usize; 3]],
    dtype: DType,
    (k_contiguous, gathered): (bool, bool),
) -> usize {
    let data = if dtype == DType::Bf16 { View::Bf16(&[]) } else { View::F32(&[]) };
    let product = |&[m, n, k]: &[usize; 3]| {
        let (m, n) = (m.min(MANY), n.min(MANY));
        let operand = |outer: usize| Operand::new(data, if k_contiguous { k } else { outer }, k_contiguous);
        let a = Operand { tokens: gathered.then(Tokens::none), ..operand(m) };
        Product { m, n, k, a, b: operand(n), c: 0, ldc: n }
    };
    let products: Vec<_> = products.iter().map(product).collect();
    cut(level, threads, &products, false, |_, _| {}).saturating_mul(size_of::<u32>())
}

/// Cuts products into columns of tasks, which `take` gets with their round: what is computed before anything else is packed.
/// Returns how many words a round packs beforehand at most.
/// The cut follows the number of workers: no bit depends on it, since every sum is one chain over k.
fn cut(
    level: Level,
    threads: usize,
    products: &[Product<'_>],
    accumulate: bool,
    mut take: impl FnMut(usize, Columns),
) -> usize {
    let total = products.iter().map(Product::work).fold(0, usize::saturating_add);
    let (mut round, mut packed, mut most) = (0, 0, 0);
    // Adding an empty sum would turn -0 into 0.
    let idle = |p: &Product<'_>| p.m == 0 || p.n == 0 || (accumulate && p.k == 0);
    for (product, p) in products.iter().enumerate().filter(|(_, p)| !idle(p)) {
        let alone = products.len() == 1;
        let each = TASKS[usize::from(p.a.k_contiguous)][usize::from(alone)];
        let tasks = if threads > 1 { threads * each } else { 1 };
        let workers = if alone { threads } else { 1 };
        let (rows, columns) = p.grid(level, (total / tasks).max(LEAST_WORK), workers);
        let shares = row_parts(p, rows).len() > 1 && p.k > 0;
        for cols in parts(p.n, columns, 32) {
            let words = if shares { p.panel_words(cols.len(), level) } else { 0 };
            if shares && packed > SHARED.saturating_sub(words) {
                (round, packed) = (round + 1, 0);
            }
            take(round, Columns { product, cols, rows, shared: shares.then_some(packed) });
            packed += words;
            most = most.max(packed);
        }
    }
    most
}

/// A part of some columns that is packed at once, and its place.
struct Share<'a> {
    product: &'a Product<'a>,
    part: Part,
    /// Words from one group to the next.
    apart: usize,
    to: Range<usize>,
}

/// By piece, and where k runs along the columns, whose order in memory is the other, by some columns. Their places follow one
/// another.
fn shares<'a>(level: Level, products: &'a [Product<'a>], columns: &[Columns]) -> Vec<Share<'a>> {
    let group = group_width(level);
    let (mut shares, mut at): (Vec<Share<'_>>, _) = (Vec::new(), 0);
    for Columns { product, cols, .. } in columns.iter().filter(|c| c.shared.is_some()) {
        let product = &products[*product];
        let width = if product.b.k_contiguous { SHARE } else { cols.len() };
        let before = shares.len();
        for Piece { k0, kc, cells, .. } in product.pieces(product.cell(level)) {
            let apart = apart(cells, group);
            for first in cols.clone().step_by(width) {
                let part = Part { first, count: width.min(cols.end - first), k0, kc, cells };
                let to = at..at + part.count.div_ceil(group) * apart;
                at = to.end;
                shares.push(Share { product, part, apart, to });
            }
        }
        // Whoever has packed a piece goes on with the next of the same columns, which has been asked for.
        shares[before..].sort_by_key(|share| (share.part.first, share.part.k0));
    }
    shares
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::empty());
}

pub(super) fn reserve<T: Pod>(v: &mut AlignedVec<T>, len: usize) {
    if v.len() < len {
        *v = AlignedVec::zeros(len);
    }
}

/// The output, written by many tasks at once, each its own elements.
pub(super) enum Output<'a> {
    F32(Disjoint<'a, f32>),
    Bf16(Disjoint<'a, bf16>),
}

/// Consecutive elements of the output.
pub(super) enum Segment<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> Output<'a> {
    fn new(v: ViewMut<'a>) -> Self {
        match v {
            ViewMut::F32(x) => Self::F32(Disjoint::new(x)),
            ViewMut::Bf16(x) => Self::Bf16(Disjoint::new(x)),
            ViewMut::I32(_) | ViewMut::Cuda(_) => panic!("expected a float output in host memory"),
        }
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(c) => c.len() * size_of::<f32>(),
            Self::Bf16(c) => c.len() * size_of::<bf16>(),
        }
    }

    /// Where `rows` rows of `len` elements begin, `stride` apart; whoever writes them promises that nobody else has these
    /// elements meanwhile. They are those of a product, whose end [`run`] has computed with checks: what is added up here
    /// does not overflow.
    #[inline(always)]
    pub fn at(&self, at: usize, len: usize, rows: usize, stride: usize) -> Pointer {
        let end = at + rows.saturating_sub(1) * stride + len;
        let (to, all) = match self {
            Self::F32(c) => (Pointer::F32(c.at(at)), c.len()),
            Self::Bf16(c) => (Pointer::Bf16(c.at(at)), c.len()),
        };
        assert!(end <= all, "{rows} rows of {len} at {at}, {stride} apart, of {all}");
        to
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// Nothing else refers to any of them while the segment lives.
    pub unsafe fn segment(&self, at: usize, len: usize) -> Segment<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32(c) => Segment::F32(c.part(at, len)),
                Self::Bf16(c) => Segment::Bf16(c.part(at, len)),
            }
        }
    }
}
