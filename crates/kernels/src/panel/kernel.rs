//! The microkernels: panels in, sums out. A block of sums stays in registers while k passes by.
//!
//! Every sum is one chain: it starts at zero or where the panels before left it, and takes in one cell after the other
//! in order of k, each by the same instruction. How rows and lanes are blocked decides which sums are computed together,
//! never how one is computed; so a row's bits depend on nothing but the row, the other operand and k.

use super::{CELLS, Cell, Finish, Lines};
use crate::isa::{Isa, Job, Lanes, Level, SQUARE};

/// Lanes of a group on the widest level.
pub(crate) const WIDEST_GROUP: usize = 32;

/// Lanes of a group: what the widest block of the level takes.
pub(crate) fn group_width(level: Level) -> usize {
    if level >= Level::Avx512 { WIDEST_GROUP } else { WIDEST_GROUP / 2 }
}

/// Rows that the level computes at once.
pub(crate) fn block_rows(isa: Isa) -> usize {
    match isa.level() {
        Level::Portable => 2,
        Level::Avx2 => 6,
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => 12,
    }
}

/// Words from one cell to the next in blocks of so many rows: they fill a part of a cache line that does not straddle two.
pub(crate) const fn block_width(rows: usize) -> usize {
    rows.next_power_of_two()
}

/// How rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// `[row][cell]`, so many words from one row to the next: what k runs along, where it lies or copied as it is.
    Along(usize),
    /// `[block][cell][row]`, blocks of [`block_rows`] in lines of [`block_width`]: what k runs across is never turned.
    Blocks,
    /// `[cell][row]`, so many words from one cell to the next: what k runs across, where it lies.
    Across(usize),
}

impl Rows {
    /// Where the cell of a row is, of what is not packed.
    pub fn at(self, row: usize, cell: usize) -> usize {
        match self {
            Self::Along(apart) => row * apart + cell,
            Self::Across(apart) => cell * apart + row,
            Self::Blocks => unreachable!("blocks are packed"),
        }
    }
}

/// Panels of some consecutive cells.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    /// `[group][cells][width]`, of the level's width.
    pub lanes: &'a [u32],
    pub rows: &'a [u32],
    pub cells: usize,
}

impl Panel<'_> {
    /// No cells.
    pub const NONE: Self = Self { lanes: &[], rows: &[], cells: 0 };
}

/// `sums[row][lane]` (+)= rows . lanes, over all cells of all panels: sums stay in registers from one to the next.
pub(crate) struct Multiply<'a, 'l> {
    pub panels: &'a [Panel<'a>],
    /// Words from one cell's lanes to the next: a group, or what it is where the lanes of a single group lie.
    pub lanes_apart: usize,
    /// Lanes, whole groups of them.
    pub width: usize,
    /// How rows lie.
    pub form: Rows,
    pub count: usize,
    /// `[count][width]`.
    pub sums: &'a mut [f32],
    /// Continue the sums instead of starting at zero.
    pub add: bool,
    /// Where sums go that are finished, of one group of lanes; what is in `sums` then is anything.
    pub finish: Option<Finish>,
    /// What is asked for beside, a few lines for every [`SQUARE`] cells of a block of rows.
    pub ahead: &'a mut [Lines<'l>; 2],
}

/// The same pointer, of which the compiler knows nothing: that of each row it would compute anew from those before, one
/// addition after the other.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read"))]
fn opaque(p: *const f32) -> *const f32 {
    #[cfg(target_arch = "x86_64")]
    {
        let mut p = p;
        // SAFETY: no instruction.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
        p
    }
    #[cfg(not(target_arch = "x86_64"))]
    p
}

/// Steps in which `count` rows by `cells` cells ask for what comes next.
pub(crate) fn steps(isa: Isa, count: usize, cells: usize) -> usize {
    count.div_ceil(block_rows(isa)) * cells.div_ceil(SQUARE)
}

impl Multiply<'_, '_> {
    /// Computes it.
    pub fn run(self, isa: Isa, cell: Cell) {
        isa.run(OnVectors(self, cell));
    }

    /// That panels hold whole groups of lanes and all rows, in blocks of `block` if they are.
    fn check(&self, group: usize, block: usize) {
        assert!(self.width.is_multiple_of(group));
        assert!(self.lanes_apart == group || self.width == group);
        let count = self.count;
        let before = |n: usize, apart: usize| n.saturating_sub(1).checked_mul(apart).expect("within memory");
        for &Panel { lanes, rows, cells } in self.panels {
            assert!(cells <= CELLS);
            let held = match self.form {
                Rows::Along(apart) => before(count, apart) + cells,
                Rows::Blocks => count.div_ceil(block) * cells * block_width(block),
                Rows::Across(apart) => before(cells, apart) + count,
            };
            let wide =
                if self.lanes_apart == group { self.width * cells } else { before(cells, self.lanes_apart) + group };
            assert!(cells == 0 || count == 0 || (lanes.len() >= wide && rows.len() >= held));
        }
        assert!(self.sums.len() >= count * self.width);
        assert!(self.finish.as_ref().is_none_or(|f| self.width == group && f.count() >= count));
    }
}

struct OnVectors<'a, 'l>(Multiply<'a, 'l>, Cell);

impl Job for OnVectors<'_, '_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let pairs = self.1 == Cell::Pair;
        assert!(V::PAIRS || !pairs, "pairs on {}", V::LEVEL.name());
        if V::PAIRS && pairs { self.0.groups::<V, true>() } else { self.0.groups::<V, false>() }
    }
}

impl Multiply<'_, '_> {
    #[inline(always)]
    fn groups<V: Lanes, const PAIRS: bool>(&mut self) {
        match V::LEVEL {
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => self.forms::<V, PAIRS, 12, 2>(),
            Level::Avx2 => self.forms::<V, PAIRS, 6, 2>(),
            Level::Portable => self.forms::<V, PAIRS, 2, 4>(),
        }
    }

    #[inline(always)]
    fn forms<V: Lanes, const PAIRS: bool, const MR: usize, const NV: usize>(&mut self) {
        match self.form {
            Rows::Along(apart) => self.blocks::<V, PAIRS, true, MR, NV>(apart),
            Rows::Blocks => self.blocks::<V, PAIRS, false, MR, NV>(block_width(MR)),
            Rows::Across(apart) => self.blocks::<V, PAIRS, false, MR, NV>(apart),
        }
    }

    /// All groups; within one, all rows, `MR` at a time, then the rest in powers of two. `apart` words from one row to the
    /// next (`ALONG`) or from one cell to the next.
    #[inline(always)]
    fn blocks<V: Lanes, const PAIRS: bool, const ALONG: bool, const MR: usize, const NV: usize>(
        &mut self,
        apart: usize,
    ) {
        let group = NV * V::N;
        self.check(group, MR);
        for first in (0..self.width).step_by(group) {
            let mut i = 0;
            while i < self.count {
                // SAFETY: V is used inside a function compiled for it. The rows of each block are below count and its
                // lanes below width, and `check` bounds all panels by these; a block of rows begins at a multiple of MR,
                // and what is left of the last stays within it.
                unsafe {
                    i += match self.count - i {
                        left if left >= MR => self.block::<V, PAIRS, ALONG, MR, MR, NV>(apart, i, first),
                        left if left >= 8 && MR > 8 => self.block::<V, PAIRS, ALONG, MR, 8, NV>(apart, i, first),
                        left if left >= 4 && MR > 4 => self.block::<V, PAIRS, ALONG, MR, 4, NV>(apart, i, first),
                        left if left >= 2 && MR > 2 => self.block::<V, PAIRS, ALONG, MR, 2, NV>(apart, i, first),
                        _ => self.block::<V, PAIRS, ALONG, MR, 1, NV>(apart, i, first),
                    };
                }
            }
        }
    }

    /// Rows i .. i + R of the group at lane `first`; returns R.
    #[inline(always)]
    unsafe fn block<
        V: Lanes,
        const PAIRS: bool,
        const ALONG: bool,
        const MR: usize,
        const R: usize,
        const NV: usize,
    >(
        &mut self,
        apart: usize,
        i: usize,
        first: usize,
    ) -> usize {
        debug_assert!(i + R <= self.count && first + NV * V::N <= self.width);
        if let Some(finish) = &self.finish
            && V::LEVEL >= Level::Avx512
        {
            finish.ask(i, R);
        }
        // SAFETY: the caller's promise.
        unsafe {
            let sums = self.sums.as_mut_ptr().add(i * self.width + first);
            let mut sum = [[V::splat(0.0); NV]; R];
            if self.add {
                for (r, row) in sum.iter_mut().enumerate() {
                    for (v, s) in row.iter_mut().enumerate() {
                        *s = V::load(sums.add(r * self.width + v * V::N));
                    }
                }
            }
            for panel in self.panels {
                let at = match self.form {
                    Rows::Blocks => i / MR * panel.cells * apart + i % MR,
                    form => form.at(i, 0),
                };
                let lanes = panel.lanes.as_ptr().add(first * panel.cells).cast();
                let rows = panel.rows.as_ptr().wrapping_add(at).cast();
                self.panel::<V, PAIRS, ALONG, R, NV>((lanes, rows), apart, panel.cells, &mut sum);
            }
            self.leave(sum, i, first);
        }
        R
    }

    /// Adds the products of a panel's cells.
    ///
    /// # Safety
    /// As of `block`; the lanes and the rows begin here.
    #[inline(always)]
    unsafe fn panel<V: Lanes, const PAIRS: bool, const ALONG: bool, const R: usize, const NV: usize>(
        &mut self,
        (mut lanes, rows): (*const f32, *const f32),
        apart: usize,
        cells: usize,
        sum: &mut [[V; NV]; R],
    ) {
        let (row_step, cell_step) = if ALONG { (apart, 1) } else { (1, apart) };
        // A pointer for every four rows: with one for each they would not fit the registers.
        let mut fours: [*const f32; 3] = std::array::from_fn(|four| rows.wrapping_add(four * 4 * row_step));
        for some in (0..cells).step_by(SQUARE) {
            self.ahead.iter_mut().for_each(Lines::step);
            for _ in some..cells.min(some + SQUARE) {
                // SAFETY: the caller's promise.
                unsafe {
                    let mut right = [V::splat(0.0); NV];
                    for (v, x) in right.iter_mut().enumerate() {
                        *x = V::load(lanes.add(v * V::N));
                    }
                    for (r, row) in sum.iter_mut().enumerate() {
                        let left = V::splat(*fours[r / 4].add(r % 4 * row_step));
                        for (s, x) in row.iter_mut().zip(right) {
                            *s = if PAIRS { left.dot(x, *s) } else { left.mul_add(x, *s) };
                        }
                    }
                }
                lanes = lanes.wrapping_add(self.lanes_apart);
                for four in &mut fours {
                    *four = four.wrapping_add(cell_step);
                    if ALONG {
                        *four = opaque(*four);
                    }
                }
            }
        }
    }

    /// Sums of rows from i on go to the output if they are finished, else back to where they wait.
    #[inline(always)]
    unsafe fn leave<V: Lanes, const R: usize, const NV: usize>(&mut self, sum: [[V; NV]; R], i: usize, first: usize) {
        let finish = self.finish.as_ref();
        // SAFETY: as in `block`; the output has all rows, of one group of lanes, as `check` found.
        unsafe {
            let (to, apart, old) = match finish.and_then(|f| Some((f.plain(i, self.width)?, f.apart()))) {
                Some(((to, _), apart)) if V::LEVEL >= Level::Avx512 && finish.is_some_and(Finish::streamed) => {
                    for (r, row) in sum.into_iter().enumerate() {
                        row.into_iter().enumerate().for_each(|(v, s)| s.stream(to.add(r * apart + v * V::N)));
                    }
                    return;
                }
                Some(((to, old), apart)) => (to, apart, old),
                None => (self.sums.as_mut_ptr().add(i * self.width + first), self.width, false),
            };
            for (r, row) in sum.into_iter().enumerate() {
                for (v, s) in row.into_iter().enumerate() {
                    let to = to.add(r * apart + v * V::N);
                    // Times one: the sum itself, whose addition is rounded once.
                    let s = if old { s.mul_add(V::splat(1.0), V::load(to)) } else { s };
                    s.store(to);
                }
            }
        }
        if let Some(finish) = finish
            && finish.plain(i, self.width).is_none()
        {
            finish.rows(i, &self.sums[i * self.width..(i + R) * self.width], self.width);
        }
    }
}
