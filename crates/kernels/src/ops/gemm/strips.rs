//! A tile of a product on vectors: its panels are packed, or read where they lie, and its sums are moved to the output as
//! they are finished. What comes next is asked for beside the products.

use super::cpu::{Output, Piece, Product, ROWS, SPAN, Task, apart, reserve};
use crate::isa::{Isa, Level, SQUARE, finish_streams, streamed};
use crate::panel::{
    self, CELLS, Cell, Finish, Lines, Multiply, Panel, ROW_CELLS, Rows, block_rows, block_width, group_width, steps,
};
use crate::{AlignedVec, DType};
use std::ops::Range;

/// Groups of columns that a task packs together for itself: one that goes on to the products from the first-level cache, or
/// where k runs across them so many that what is read lies together.
const TOGETHER: [usize; 2] = [8, 1];

/// Words packed at once of rows that k runs across, if that is more than a piece: they are to stay in the second-level cache.
const PACKED: usize = 160 << 10;

/// A worker's panels and sums.
pub(super) struct Scratch {
    lanes: AlignedVec<u32>,
    rows: AlignedVec<u32>,
    sums: AlignedVec<f32>,
}

impl Scratch {
    /// No memory yet.
    pub fn empty() -> Self {
        Self { lanes: AlignedVec::zeros(0), rows: AlignedVec::zeros(0), sums: AlignedVec::zeros(0) }
    }
}

/// A tile that is computed: a span of k at a time, strips of one group of columns are summed, whose lanes stay in the
/// nearest caches while all rows pass by. What must be packed of the rows is packed once for all columns.
pub(super) struct Tile<'a> {
    isa: Isa,
    p: &'a Product<'a>,
    t: &'a Task,
    /// What this worker computes next, most likely.
    next: Option<(&'a Product<'a>, &'a Task)>,
    cell: Cell,
    group: usize,
    pieces: Vec<Piece>,
    left: Left<'a>,
    right: Right<'a>,
    out: &'a Output<'a>,
    accumulate: bool,
}

/// A span of k: its pieces from `first` on.
#[derive(Clone, Copy)]
struct Span<'a> {
    first: usize,
    pieces: &'a [Piece],
}

/// The k of some consecutive pieces.
fn along(pieces: &[Piece]) -> Option<Range<usize>> {
    let (first, last) = (pieces.first()?, pieces.last()?);
    Some(first.k0..last.k0 + last.kc)
}

/// Cuts a range into pieces of `len`, but for the last.
fn chunks(range: &Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(len).map(move |first| first..end.min(first + len))
}

impl<'a> Tile<'a> {
    pub fn new(
        isa: Isa,
        (p, t): (&'a Product<'a>, &'a Task),
        next: Option<(&'a Product<'a>, &'a Task)>,
        shared: &'a [u32],
        out: &'a Output<'a>,
        accumulate: bool,
    ) -> Self {
        let cell = p.cell(isa.level());
        let (left, right) = (Left::of(p, cell), Right::of(isa.level(), p, cell, t.shared.map(|at| &shared[at..])));
        let group = group_width(isa.level());
        Self { isa, p, t, next, cell, group, pieces: p.pieces(cell), left, right, out, accumulate }
    }

    /// Pieces of a span at most: fewer where rows are read across, of which each cell is a part of another line. On Intel
    /// two were slower than one, on Zen 4 faster.
    fn span(&self) -> usize {
        match self.left {
            Left::Here(_, Rows::Across(_)) => {
                if self.isa.level() == Level::Avx512Bf16 && self.t.rows.len() <= 2 * ROWS { 2 } else { 1 }
            }
            Left::Blocks => (PACKED / self.left.room(self.isa, self.t.rows.len()).max(1)).clamp(1, SPAN),
            _ => SPAN,
        }
    }

    /// Computes it.
    pub fn run(&self, s: &mut Scratch) {
        let (count, cols, pieces) = (self.t.rows.len(), &self.t.cols, &self.pieces);
        let strip = count * self.group;
        let strips = if pieces.len() > self.span() { cols.len().div_ceil(self.group) } else { 1 };
        let (room, room_of_lanes) = (self.left.room(self.isa, count), self.right.room(self.group));
        reserve(&mut s.sums, strips * strip);
        reserve(&mut s.lanes, pieces.len().min(SPAN) * room_of_lanes);
        reserve(&mut s.rows, pieces.len().min(SPAN) * room);
        if pieces.is_empty() {
            s.sums[..strip].fill(0.0);
            for cols in chunks(cols, self.group) {
                self.finish(&cols).rows(0, &s.sums[..strip], self.group);
            }
        }
        for (i, pieces) in pieces.chunks(self.span()).enumerate() {
            let span = Span { first: i * self.span(), pieces };
            for (j, piece) in pieces.iter().enumerate() {
                self.pack_rows(piece, &mut s.rows[j * room..][..room]);
            }
            let mut ahead = [self.left_ahead(span), Lines::NONE];
            for part in chunks(cols, self.right.together() * self.group) {
                for (j, piece) in pieces.iter().enumerate() {
                    self.pack_lanes(&part, piece, &mut s.lanes[j * room_of_lanes..][..room_of_lanes]);
                }
                ahead[1] = self.right_ahead(span, &part);
                for cols in chunks(&part, self.group) {
                    self.strip(span, &part, cols, s, &mut ahead);
                }
            }
        }
        if self.streamed() {
            finish_streams();
        }
    }

    /// All rows with one group of columns, of those that lie in `s.lanes`, over a span.
    fn strip(
        &self,
        span: Span<'_>,
        part: &Range<usize>,
        cols: Range<usize>,
        s: &mut Scratch,
        ahead: &mut [Lines<'a>; 2],
    ) {
        let (count, group) = (self.t.rows.len(), self.group);
        let (room, room_of_lanes) = (self.left.room(self.isa, count), self.right.room(group));
        let (g, g_packed) = ((cols.start - self.t.cols.start) / group, (cols.start - part.start) / group);
        let at = if self.pieces.len() > self.span() { g } else { 0 };
        let sums = &mut s.sums[at * count * group..][..count * group];
        if let Right::Shared(panels) = self.right {
            ahead[1] = self.panels_ahead(panels, span, g);
        }
        let here = matches!(self.right, Right::Here(_)) && cols.len() == group;
        let panel = |j: usize, piece: &Piece| Panel {
            lanes: match self.right {
                Right::Shared(panels) => self.panel(panels, span.first + j, g),
                Right::Here(words) if here => &words[piece.k0 * self.p.b.ld + cols.start..],
                _ => &s.lanes[j * room_of_lanes + g_packed * apart(piece.cells, group)..],
            },
            rows: match self.left {
                Left::Here(words, form) => &words[form.at(self.t.rows.start, self.cell.cells(piece.k0))..],
                _ => &s.rows[j * room..],
            },
            cells: piece.cells,
        };
        let mut panels = [Panel::NONE; SPAN];
        for (j, (to, piece)) in panels.iter_mut().zip(span.pieces).enumerate() {
            *to = panel(j, piece);
        }
        let product = Multiply {
            panels: &panels[..span.pieces.len()],
            lanes_apart: if here { self.p.b.ld } else { group },
            width: group,
            form: self.left.form(),
            count,
            sums,
            add: span.first > 0,
            finish: (span.first + span.pieces.len() == self.pieces.len()).then(|| self.finish(&cols)),
            ahead,
        };
        product.run(self.isa, self.cell);
    }

    fn finish(&self, cols: &Range<usize>) -> Finish {
        let (rows, ldc) = (&self.t.rows, self.p.ldc);
        let to = self.out.at(self.p.c + rows.start * ldc + cols.start, cols.len(), rows.len(), ldc);
        // SAFETY: products lie apart in the output (asserted by `run`), rows of one lie `ldc >= n` apart, and the tasks
        // partition its rows and columns: no other task touches these elements.
        let finish = unsafe { Finish::new(to, (rows.len(), ldc), cols.len(), self.accumulate) };
        if self.streamed() { finish.past_caches() } else { finish }
    }

    /// Whether what is written is more than is to be in the caches.
    fn streamed(&self) -> bool {
        // On Intel only what nothing reads soon, weight gradients.
        let level = self.isa.level();
        let gains = level == Level::Avx512Bf16 || (level >= Level::Avx512 && !self.p.a.k_contiguous);
        gains && !self.accumulate && streamed(self.out.bytes())
    }

    fn pack_rows(&self, piece: &Piece, rows: &mut [u32]) {
        let part = piece.part(&self.t.rows);
        match self.left {
            Left::Here(..) => {}
            Left::Copied => panel::rows(self.isa, self.p.a, part, self.cell, rows),
            Left::Blocks => panel::row_blocks(self.isa, self.p.a, part, self.cell, block_rows(self.isa), rows),
        }
    }

    fn pack_lanes(&self, cols: &Range<usize>, piece: &Piece, lanes: &mut [u32]) {
        let step = apart(piece.cells, self.group);
        // Of what is read where it lies, the last columns that are no whole group.
        let before = match self.right {
            Right::Shared(_) => return,
            Right::Here(_) => cols.len() / self.group,
            Right::Packed(_) => 0,
        };
        let cols = cols.start + before * self.group..cols.end;
        if !cols.is_empty() {
            let lanes = &mut lanes[before * step..];
            panel::lanes(self.isa, self.p.b, piece.part(&cols), self.cell, (self.group, step), lanes);
        }
    }

    /// The shared panel of a piece and a group of the tile's columns.
    fn panel<'b>(&self, panels: &'b [u32], piece: usize, g: usize) -> &'b [u32] {
        let (groups, Piece { cells, .. }) = (self.t.cols.len().div_ceil(self.group), self.pieces[piece]);
        let at = self.pieces[piece].at(piece, groups, self.group) + g * apart(cells, self.group);
        &panels[at..][..cells * self.group]
    }

    /// The panels that are multiplied after those of a span and group `g`. One that is shorter than the first begins a
    /// little earlier.
    fn panels_ahead(&self, panels: &[u32], span: Span<'_>, g: usize) -> Lines<'a> {
        let groups = self.t.cols.len().div_ceil(self.group);
        let (first, g) = if g + 1 < groups { (span.first, g + 1) } else { (span.first + span.pieces.len(), 0) };
        let count = (self.pieces.len() - first).min(span.pieces.len());
        if count == 0 {
            return Lines::NONE;
        }
        let words = self.panel(panels, first, g);
        let next = if count > 1 { self.panel(panels, first + 1, g) } else { words };
        let apart = next.as_ptr().addr() - words.as_ptr().addr();
        Lines::of_words(words, (count, apart), self.steps(span, self.group))
    }

    /// Steps of the products of all rows with so many columns over a span.
    fn steps(&self, span: Span<'_>, columns: usize) -> usize {
        let steps = span.pieces.iter().map(|piece| steps(self.isa, self.t.rows.len(), piece.cells));
        columns.div_ceil(self.group) * steps.sum::<usize>()
    }

    /// The k of the span after this one, and that of the first span of the next tile.
    fn next_k(&self, span: Span<'_>) -> (Option<Range<usize>>, Option<Range<usize>>) {
        let after = self.pieces[span.first + span.pieces.len()..].chunks(self.span()).next();
        let next = self.next.and_then(|(p, _)| along(p.pieces(self.cell).chunks(SPAN).next()?));
        (after.and_then(along), next)
    }

    /// The rows of the span after this one. Not f32 that are packed, for which there is no room in the second-level cache
    /// beside what is packed of these; packing asks for itself.
    fn left_ahead(&self, span: Span<'_>) -> Lines<'a> {
        if self.p.a.data.dtype() == DType::F32 && !matches!(self.left, Left::Here(..)) {
            return Lines::NONE;
        }
        let steps = self.steps(span, self.t.cols.len());
        match (self.next_k(span), self.next) {
            ((Some(k), _), _) => Lines::of_operand(self.p.a, &self.t.rows, &k, steps),
            ((None, Some(k)), Some((p, t))) if !(std::ptr::eq(p, self.p) && t.rows == self.t.rows) => {
                Lines::of_operand(p.a, &t.rows, &k, steps)
            }
            _ => Lines::NONE,
        }
    }

    /// The columns after these, where they are not shared.
    fn right_ahead(&self, span: Span<'_>, cols: &Range<usize>) -> Lines<'a> {
        if matches!(self.right, Right::Shared(_)) {
            return Lines::NONE;
        }
        let (steps, width) = (self.steps(span, cols.len()), self.right.together() * self.group);
        let of = |p: &Product<'a>, cols: Range<usize>, k| {
            Lines::of_operand(p.b, &(cols.start..cols.end.min(cols.start + width)), &k, steps)
        };
        if cols.end < self.t.cols.end {
            return along(span.pieces).map_or(Lines::NONE, |k| of(self.p, cols.end..self.t.cols.end, k));
        }
        match (self.next_k(span), self.next) {
            ((Some(k), _), _) => of(self.p, self.t.cols.clone(), k),
            ((None, Some(k)), Some((p, t))) => of(p, t.cols.clone(), k),
            _ => Lines::NONE,
        }
    }
}

/// Whether a product's rows are packed, however its operand is aligned.
pub(super) fn packs_rows(p: &Product<'_>, cell: Cell) -> bool {
    !p.a.has_cells(p.k, cell) || evict_one_another(p, cell)
}

/// How the left operand's rows are read.
#[derive(Clone, Copy)]
enum Left<'a> {
    /// Where they lie.
    Here(&'a [u32], Rows),
    /// Copied, or widened, or turned, as [`panel::rows`] does.
    Copied,
    /// As [`panel::row_blocks`] packs them.
    Blocks,
}

/// Rows or cells whole multiples of 4 KiB apart fall on the same few lines of a cache.
fn on_same_lines(words: usize) -> bool {
    words.is_multiple_of(4096 / size_of::<u32>())
}

/// Rows that fall on the same lines are not copied for up to so many columns, a router's: nobody would share the copy, and it
/// takes longer than what it saves.
const FEW_COLUMNS: usize = 64;

/// Whether rows or cells must be packed because of how far they lie apart.
fn evict_one_another(p: &Product<'_>, cell: Cell) -> bool {
    on_same_lines(p.a.ld / cell.depth()) && !(p.a.k_contiguous && p.n <= FEW_COLUMNS)
}

impl<'a> Left<'a> {
    fn of(p: &Product<'a>, cell: Cell) -> Self {
        let apart = p.a.ld / cell.depth();
        let in_place = !evict_one_another(p, cell);
        match p.a.cells(p.k, cell) {
            Some(words) if in_place && p.a.k_contiguous => Self::Here(words, Rows::Along(apart)),
            Some(words) if in_place => Self::Here(words, Rows::Across(apart)),
            _ if p.a.k_contiguous => Self::Copied,
            _ => Self::Blocks,
        }
    }

    /// How they lie for the kernels.
    fn form(self) -> Rows {
        match self {
            Self::Here(_, form) => form,
            Self::Copied => Rows::Along(ROW_CELLS),
            Self::Blocks => Rows::Blocks,
        }
    }

    /// Words that a piece of so many rows needs.
    fn room(self, isa: Isa, rows: usize) -> usize {
        let block = block_rows(isa);
        match self {
            Self::Here(..) => 0,
            Self::Copied => rows.next_multiple_of(SQUARE) * ROW_CELLS,
            Self::Blocks => rows.div_ceil(block) * CELLS * block_width(block),
        }
    }
}

/// A product of so few rows does not pack its columns, where k runs across them: there are few blocks to share them.
const FEW_ROWS: usize = 48;
/// The same of weight gradients where cells fall on enough lines of a cache, on AMD.
const SPREAD_ROWS: usize = 2 * ROWS;

/// How the right operand's lanes are read.
#[derive(Clone, Copy)]
enum Right<'a> {
    /// Packed for several tasks.
    Shared(&'a [u32]),
    /// Where they lie, but for what is no whole group.
    Here(&'a [u32]),
    /// Packed by the task, so many groups at once.
    Packed(usize),
}

impl<'a> Right<'a> {
    fn of(level: Level, p: &Product<'a>, cell: Cell, shared: Option<&'a [u32]>) -> Self {
        let spread = level == Level::Avx512Bf16 && !p.a.k_contiguous && !on_same_lines(p.b.ld);
        let most = if spread { SPREAD_ROWS } else { FEW_ROWS };
        match (shared, p.b.cells(p.k, cell)) {
            (Some(panels), _) => Self::Shared(panels),
            (_, Some(words)) if !p.b.k_contiguous && p.m <= most => Self::Here(words),
            _ => Self::Packed(TOGETHER[usize::from(p.b.k_contiguous)]),
        }
    }

    /// Groups of columns that are taken together.
    fn together(self) -> usize {
        match self {
            Self::Packed(groups) => groups,
            _ => TOGETHER[0],
        }
    }

    /// Words that a piece of them needs.
    fn room(self, group: usize) -> usize {
        match self {
            Self::Shared(_) => 0,
            _ => self.together() * apart(CELLS, group),
        }
    }
}
