//! How products are cut into tasks, and k into pieces. No bit depends on it, since every sum is one chain over k.

use super::super::cpu::{Product, balanced_parts, countable};
use super::super::few_tiles;
use super::pack::Side;
use crate::panel::Operand;
use crate::panel::blocks::{BLOCK, STEP_CELLS};
use crate::{View, bf16};
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
pub struct Task<'a> {
    pub p: &'a Product<'a>,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Where the product's packed rows and columns begin, if they are shared by several tasks.
    pub left: Option<usize>,
    pub right: Option<usize>,
}

/// An operand of a product that is packed for several tasks: `[piece][32 rows or columns][step]`.
pub struct Panels<'a> {
    p: &'a Product<'a>,
    side: Side,
    at: usize,
}

/// A part of that: rows or columns of a piece.
pub struct Part<'a> {
    pub op: Operand<'a>,
    pub side: Side,
    pub outer: Range<usize>,
    pub k: Range<usize>,
    pub at: usize,
}

/// Bytes that [`super::run`] takes of the device's memory for products of these `[m, n, k]`, whose rows and columns lie along k or across
/// it.
pub fn shared_bytes(products: &[[usize; 3]], k_contiguous: [bool; 2], threads: usize) -> usize {
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
pub fn tasks<'a>(products: &'a [Product<'a>], threads: usize, accumulate: bool) -> (Vec<Task<'a>>, Vec<Panels<'a>>) {
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
pub fn in_place(a: &Operand<'_>) -> bool {
    a.k_contiguous && a.tokens.is_none() && !(a.ld * size_of::<bf16>()).is_multiple_of(CROWDED)
}

/// The pieces of k, of about equal length and whole steps but for the last; one that is empty if there is no k.
pub fn pieces(p: &Product<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
    let (k, most) = (p.k, if in_place(&p.a) { IN_PLACE } else { PACKED });
    let piece = k.div_ceil(BLOCK).div_ceil(k.div_ceil(most).max(1)).max(1) * BLOCK;
    (0..k.max(1)).step_by(piece).map(move |k0| k0..k.min(k0 + piece))
}

pub fn steps(k: &Range<usize>) -> usize {
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

    pub fn cells(&self) -> usize {
        self.operand().1.div_ceil(BLOCK) * self.p.k.div_ceil(BLOCK) * STEP_CELLS
    }

    pub fn parts(&self) -> Vec<Part<'a>> {
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
pub fn panel_at(len: usize, k: &Range<usize>, first: usize) -> usize {
    (len.div_ceil(BLOCK) * (k.start / BLOCK) + first / BLOCK * steps(k)) * STEP_CELLS
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
