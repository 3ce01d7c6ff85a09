//! How products are cut: a list of them into rounds, what is packed before anything of it is used; a round into columns; the
//! columns into tasks, each a tile. Nothing is computed here, and no bit depends on it, since every sum is one chain over k.

use super::super::strips;
use crate::isa::{Level, SQUARE};
use crate::panel::{Cell, Operand, Part, Tokens, group_width};
use crate::{DType, View};
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
pub const ROWS: usize = 120;
/// A tile has as many times more rows as k fits into this, up to so many: from k = 256 down.
const SHORT: usize = 512;
const TALLER: usize = 4;
/// A product of so few rows is not cut along them, so that its columns are packed by the task that uses them.
const ROWS_ALONE: usize = 480;
/// The same where k runs across the rows, if they are f32 and need no room for themselves, or are packed for many columns.
const ROWS_ALONE_ACROSS: usize = 512;
/// Columns of a task for which packing up to [`ROWS_ALONE_ACROSS`] rows pays.
const MANY_COLUMNS: usize = 128;
/// Columns of a tile at most, unless what is packed of them is more than about [`SHARED`].
const COLUMNS: usize = 2048;
/// Columns of a tile where its sums wait for the next span beside rows that need no packing, and where what is packed of more
/// would be too much: those of the next tile would be packed again.
const COLUMNS_WAITING: usize = 512;
/// Sums that wait in the second-level cache at most, beside rows that need no packing. Beside packed rows up to as many as a
/// tile has wait, a few MB for each worker.
const SUMS: usize = 1 << 17;
/// Pieces of k that rows are packed for at once, and over which sums stay in registers.
pub const SPAN: usize = 4;
/// A multiple of the rows that any level computes at once.
const BLOCK: usize = 12;
/// A multiple of the columns that any level computes at once.
const GROUP: usize = 32;
/// Smallest tile that a product is cut into for the sake of balance.
const LEAST_ROWS: usize = 96;
const LEAST_COLUMNS: usize = 64;
/// Tasks for each worker to aim for, so that a slow one does not hold up all.
const TASKS: usize = 4;
/// Fewer where k runs across the rows, whose packing each cut along columns repeats, and fewest of but one such product.
const TASKS_ACROSS: usize = 2;
const TASKS_ACROSS_ALONE: usize = 1;
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 18;
/// Words of columns that are packed before any of them is used, unless one part of them alone has more: what this takes adds
/// to the memory of a step.
const SHARED: usize = 1 << 22;
/// Columns that one task packs for others, of an operand that k runs along.
const SHARE: usize = 64;

/// A piece of k: where it begins, its length, its cells, and how many cells there are before it.
#[derive(Clone, Copy)]
pub struct Piece {
    pub k0: usize,
    pub kc: usize,
    pub cells: usize,
    before: usize,
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

/// Words from one group of packed columns to the next: a line more than they fill, because groups a power of two apart
/// would evict one another while they are written side by side.
pub fn apart(cells: usize, group: usize) -> usize {
    cells * group + SQUARE
}

impl Product<'_> {
    pub fn is_bf16(&self) -> bool {
        self.a.data.dtype() == DType::Bf16 && self.b.data.dtype() == DType::Bf16
    }

    pub fn cell(&self, level: Level) -> Cell {
        Cell::of(level, self.is_bf16())
    }

    /// Products that are only spoken of may be of any size.
    pub fn work(&self) -> usize {
        self.m.saturating_mul(self.n).saturating_mul(self.k.max(1))
    }

    /// Whether there is nothing to do: adding an empty sum would turn -0 into 0.
    pub fn is_idle(&self, accumulate: bool) -> bool {
        self.m == 0 || self.n == 0 || (accumulate && self.k == 0)
    }

    pub fn pieces(&self, cell: Cell) -> Vec<Piece> {
        let mut before = 0;
        let piece = |(k0, kc)| {
            let cells = cell.cells(kc);
            before += cells;
            Piece { k0, kc, cells, before: before - cells }
        };
        cell.pieces(self.k).map(piece).collect()
    }

    /// Words of so many columns, packed over all of k: as many as their pieces have, one after the other.
    fn panel_words(&self, columns: usize, level: Level) -> usize {
        let (cell, group) = (self.cell(level), group_width(level));
        let words = cell.cells(self.k).saturating_mul(group).saturating_add(cell.pieces(self.k).len() * SQUARE);
        columns.div_ceil(group).saturating_mul(words)
    }

    /// Rows of a tile at most.
    fn tallest(&self, level: Level) -> usize {
        // Pairs are multiplied twice as fast, so that each panel of columns must serve more rows.
        let rows = if self.cell(level) == Cell::Pair { 2 * ROWS } else { ROWS };
        // Of a short k more rows take no more room, and make up for what each strip costs beside its products.
        rows * if self.a.k_contiguous { (SHORT / self.k.max(1)).clamp(1, TALLER) } else { 1 }
    }

    /// Whether it is not to be cut along the rows, if so many tasks are wanted.
    fn rows_stay_together(&self, wanted: usize) -> bool {
        if self.a.k_contiguous {
            return self.m <= ROWS_ALONE;
        }
        let in_place = self.a.data.dtype() == DType::F32 && self.a.tokens.is_none();
        // Each part of the columns packs these rows again.
        let wide = self.n >= MANY_COLUMNS * wanted;
        self.m <= if in_place || wide { ROWS_ALONE_ACROSS } else { ROWS_ALONE }
    }

    /// Columns of a tile of so many rows at most.
    fn widest(&self, level: Level, rows: usize) -> usize {
        let cell = self.cell(level);
        let span = if self.a.k_contiguous { SPAN } else { 1 };
        if cell.pieces(self.k).len() > span && !strips::packs_rows(self, cell) {
            return COLUMNS_WAITING.min(SUMS / rows);
        }
        // 2,048 columns of as many f32 are a little more, for the lines between groups.
        let mut columns = COLUMNS;
        while columns > COLUMNS_WAITING && self.panel_words(columns, level) > SHARED / 8 * 9 {
            columns /= 2;
        }
        columns
    }

    /// Parts of rows and of columns when a task should do about `work` multiply-adds, as many for each worker if `workers`
    /// have no other product to do.
    fn grid(&self, level: Level, work: usize, workers: usize) -> (usize, usize) {
        let wanted = self.work().div_ceil(work);
        let together = self.rows_stay_together(wanted);
        let mut rows = if together { 1 } else { self.m.div_ceil(self.tallest(level)) };
        let mut columns = self.n.div_ceil(self.widest(level, self.m.div_ceil(rows)));
        while rows * columns < wanted {
            // Rows first: columns are packed once for all of them, but rows once for each part of the columns.
            match (self.m / rows > LEAST_ROWS && !together, self.n / columns > LEAST_COLUMNS) {
                (true, _) => rows += 1,
                (_, true) => columns += 1,
                _ if self.m / rows > LEAST_ROWS => rows += 1,
                _ => break,
            }
        }
        let even = rows.next_multiple_of(workers);
        if !together && !columns.is_multiple_of(workers) && self.m / even >= LEAST_ROWS {
            rows = even;
        }
        (rows, columns)
    }
}

/// Cuts `len` into about `count` parts of one length, a multiple of `multiple`, but for the last, which may be shorter.
pub fn equal_parts(len: usize, count: usize, multiple: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let step = len.div_ceil(count).next_multiple_of(multiple);
    (0..len).step_by(step).map(move |i| i..len.min(i + step))
}

/// Cuts `len` into `count` parts, or fewer, of whole blocks but for the last, whose sizes differ by one block at most: workers
/// are to have as much each.
pub fn balanced_parts(len: usize, count: usize, block: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    let blocks = len.div_ceil(block);
    let count = count.min(blocks);
    let first = move |i: usize| len.min(i * blocks / count * block);
    (0..count).map(move |i| first(i)..first(i + 1))
}

/// A tile of a product.
pub struct Task {
    pub product: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    /// Where its packed columns begin, if they are shared by several tasks.
    pub shared: Option<usize>,
}

/// Some columns of a product: one task for each part of the rows.
pub struct Columns {
    pub product: usize,
    cols: Range<usize>,
    /// Parts of the rows.
    pub rows: usize,
    /// Where they lie if they are packed for several tasks: `[piece][group][cells][lane]`, groups [`apart`].
    shared: Option<usize>,
}

impl Columns {
    pub fn tasks(&self, products: &[Product<'_>]) -> impl Iterator<Item = Task> {
        let Self { product, shared, .. } = *self;
        let cols = self.cols.clone();
        balanced_parts(products[product].m, self.rows, BLOCK).map(move |rows| Task {
            product,
            rows,
            cols: cols.clone(),
            shared,
        })
    }
}

/// The sizes of a product that is only spoken of, which may be any: with no more rows and columns than any model has, because
/// these are cut one by one.
pub fn countable([m, n, k]: [usize; 3]) -> [usize; 3] {
    const MANY: usize = 1 << 18;
    [m.min(MANY), n.min(MANY), k]
}

/// Bytes that [`super::run`] takes of the device's memory for products of these `[m, n, k]` on vectors, both operands of `dtype`,
/// the rows' k along or across them; the left operand's may be of tokens.
pub fn shared_bytes(
    level: Level,
    threads: usize,
    products: &[[usize; 3]],
    dtype: DType,
    (k_contiguous, gathered): (bool, bool),
) -> usize {
    let data = if dtype == DType::Bf16 { View::Bf16(&[]) } else { View::F32(&[]) };
    let product = |&sizes: &[usize; 3]| {
        let [m, n, k] = countable(sizes);
        let operand = |outer: usize| Operand::new(data, if k_contiguous { k } else { outer }, k_contiguous);
        let a = Operand { tokens: gathered.then(Tokens::none), ..operand(m) };
        Product { m, n, k, a, b: operand(n), c: 0, ldc: n }
    };
    let products: Vec<_> = products.iter().map(product).collect();
    cut(level, threads, &products, false, |_, _| {}).saturating_mul(size_of::<u32>())
}

/// Cuts products into columns of tasks, which `take` gets with their round: what is computed before anything else is packed.
/// Returns how many words a round packs beforehand at most.
pub fn cut(
    level: Level,
    threads: usize,
    products: &[Product<'_>],
    accumulate: bool,
    mut take: impl FnMut(usize, Columns),
) -> usize {
    let total = products.iter().map(Product::work).fold(0, usize::saturating_add);
    let alone = products.len() == 1;
    let workers = if alone { threads } else { 1 };
    let (mut round, mut packed, mut most) = (0, 0, 0);
    for (product, p) in products.iter().enumerate().filter(|(_, p)| !p.is_idle(accumulate)) {
        let each = match (p.a.k_contiguous, alone) {
            (true, _) => TASKS,
            (false, false) => TASKS_ACROSS,
            (false, true) => TASKS_ACROSS_ALONE,
        };
        let tasks = if threads > 1 { threads * each } else { 1 };
        let (rows, columns) = p.grid(level, (total / tasks).max(LEAST_WORK), workers);
        let shares = balanced_parts(p.m, rows, BLOCK).len() > 1 && p.k > 0;
        for cols in equal_parts(p.n, columns, GROUP) {
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

/// A part of some columns that one task packs for others, and its place.
pub struct Share<'a> {
    pub product: &'a Product<'a>,
    pub part: Part,
    /// Words from one group to the next.
    pub apart: usize,
    pub to: Range<usize>,
}

/// By piece, and where k runs along the columns, whose order in memory is the other, by some columns. Their places follow one
/// another.
pub fn shares<'a>(level: Level, products: &'a [Product<'a>], columns: &[Columns]) -> Vec<Share<'a>> {
    let group = group_width(level);
    let (mut shares, mut at) = (Vec::new(), 0);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Tasks partition the outputs, and what they share is packed to places that follow one another, within what was said to
    /// be taken.
    #[test]
    fn tasks_and_shares_partition() {
        let data = View::Bf16(&[]);
        for (level, threads) in Level::ALL.into_iter().flat_map(|level| [1, 2, 64].map(|threads| (level, threads))) {
            for k_contiguous in [true, false] {
                let product = |(m, n, k): (usize, usize, usize)| {
                    let a = Operand::new(data, if k_contiguous { k } else { m }, k_contiguous);
                    Product { m, n, k, a, b: Operand { ld: if k_contiguous { k } else { n }, ..a }, c: 0, ldc: n }
                };
                let sizes = [(1, 1, 1), (700, 33, 64), (4096, 192, 512), (0, 64, 64), (600, 9000, 5000), (2000, 90, 0)];
                let products = sizes.map(product);
                let mut rounds: Vec<Vec<Columns>> = Vec::new();
                let words = cut(level, threads, &products, false, |round, columns| {
                    rounds.resize_with(round + 1, Vec::new);
                    rounds[round].push(columns);
                });
                let mut seen = products.map(|p| vec![0; p.m.div_ceil(BLOCK) * p.n.div_ceil(GROUP)]);
                for task in rounds.iter().flatten().flat_map(|columns| columns.tasks(&products)) {
                    for row in task.rows.clone().step_by(BLOCK) {
                        for column in task.cols.clone().step_by(GROUP) {
                            assert!(row.is_multiple_of(BLOCK) && column.is_multiple_of(GROUP));
                            let across = products[task.product].n.div_ceil(GROUP);
                            seen[task.product][row / BLOCK * across + column / GROUP] += 1;
                        }
                    }
                }
                assert!(seen.iter().flatten().all(|&times| times == 1), "{level:?}, {threads} threads");
                for columns in &rounds {
                    let mut shares = shares(level, &products, columns);
                    for Columns { product, cols, shared, .. } in columns {
                        let of = |s: &&Share<'_>| std::ptr::eq(s.product, &products[*product]);
                        let of = shares.iter().filter(of).filter(|s| cols.contains(&s.part.first));
                        assert_eq!(of.map(|s| s.to.start).min(), *shared);
                    }
                    shares.sort_by_key(|share| share.to.start);
                    assert!(shares.windows(2).all(|w| w[0].to.end == w[1].to.start));
                    assert!(shares.last().is_none_or(|share| share.to.end <= words));
                }
            }
        }
    }
}
