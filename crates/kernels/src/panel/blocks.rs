//! Products on AMX's tiles, by blocks of 32 x 32 sums that stay in four tile registers while k passes by.
//!
//! A step is 32 of k: two tiles of the left operand times two of the right, so that each tile that is loaded is
//! multiplied twice. Rows of the left operand can be read where they lie if k runs along them; else they are packed, as the
//! right operand always is: of each 32 columns and step two tiles of 1 KiB, whose rows are pairs of k.
//!
//! Every sum is one chain over the steps in their order, whatever the block; stored and loaded sums are not rounded.

use super::{Operand, pair};
use crate::bf16;
use crate::isa::{TILE_COLUMNS, TILE_ROWS, Tiles, pair_rows, transpose_cells, transpose_halves};
use std::ops::Range;

/// Rows and columns of a block, and k of a step.
pub(crate) const BLOCK: usize = 2 * TILE_ROWS;
/// Sums of a block, `[row][column]`.
pub(crate) const SUMS: usize = BLOCK * BLOCK;
/// Cells of two tiles: those of one operand at one step.
pub(crate) const STEP_CELLS: usize = 2 * TILE_ROWS * TILE_COLUMNS;
/// Bytes of those.
const STEP_BYTES: usize = 4 * STEP_CELLS;
/// Bytes of a row of sums.
const SUMS_ROW: usize = 4 * BLOCK;
/// Lines so far apart, or several times that, share so few sets of the first-level cache that 32 of them evict one
/// another.
const CROWDED: usize = 2048;

/// 32 rows of the left operand over some steps. Element k of row r is at `r * row + k / 32 * step + k % 32 * 2` bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    at: *const u8,
    row: usize,
    step: usize,
}

impl Left {
    /// Rows where they lie, `ld` elements apart.
    ///
    /// # Safety
    /// As long as it is used 32 rows from `at` are there to be read, as far as it is used along them.
    pub unsafe fn rows(at: *const bf16, ld: usize) -> Self {
        Self { at: at.cast(), row: 2 * ld, step: 2 * BLOCK }
    }

    /// Rows that were packed.
    ///
    /// # Safety
    /// As for `rows`, of as many steps as are used.
    pub unsafe fn packed(cells: *const u32) -> Self {
        Self { at: cells.cast(), row: 2 * BLOCK, step: STEP_BYTES }
    }
}

/// What is done while tiles are multiplied: in vectors it costs little there. Not a closure, which would be compiled
/// for no more than the build's target.
pub(crate) trait Beside {
    /// Does a little of it. Must be `#[inline(always)]`, as must all it calls.
    fn step(&mut self);
}

/// `sums` (+)= left . right over `steps` steps, with a step of what is done beside in each. With `STREAM` left is what passes
/// through the first-level cache while right stays there, else right.
///
/// # Safety
/// Tiles are configured. `left` has so many steps; so many times [`STEP_CELLS`] are there from `right`, and [`SUMS`] from
/// `sums`.
#[inline(always)]
pub(crate) unsafe fn block<T: Tiles, const STREAM: bool>(
    left: Left,
    right: *const u32,
    sums: *mut f32,
    (steps, add): (usize, bool),
    beside: &mut impl Beside,
) {
    const LOWER: usize = TILE_ROWS * SUMS_ROW;
    const HALF: usize = STEP_BYTES / 2;
    let sums = sums.cast::<u8>();
    // SAFETY: the caller's promise.
    unsafe {
        if add {
            T::load::<0>(sums, SUMS_ROW);
            T::load::<1>(sums.add(SUMS_ROW / 2), SUMS_ROW);
            T::load::<2>(sums.add(LOWER), SUMS_ROW);
            T::load::<3>(sums.add(LOWER + SUMS_ROW / 2), SUMS_ROW);
        } else {
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
        }
        let (mut upper, mut right) = (left.at, right.cast::<u8>());
        for _ in 0..steps {
            // All loads before all products: each then comes well before what needs it.
            if STREAM {
                T::load_once::<4>(upper, left.row);
                T::load::<6>(right, 2 * BLOCK);
                T::load::<7>(right.add(HALF), 2 * BLOCK);
                T::load_once::<5>(upper.add(TILE_ROWS * left.row), left.row);
            } else {
                T::load::<4>(upper, left.row);
                T::load_once::<6>(right, 2 * BLOCK);
                T::load_once::<7>(right.add(HALF), 2 * BLOCK);
                T::load::<5>(upper.add(TILE_ROWS * left.row), left.row);
            }
            T::dot::<0, 4, 6>();
            T::dot::<1, 4, 7>();
            T::dot::<2, 5, 6>();
            T::dot::<3, 5, 7>();
            beside.step();
            // Behind the last step there may be nothing.
            upper = upper.wrapping_add(left.step);
            right = right.add(STEP_BYTES);
        }
        T::store::<0>(sums, SUMS_ROW);
        T::store::<1>(sums.add(SUMS_ROW / 2), SUMS_ROW);
        T::store::<2>(sums.add(LOWER), SUMS_ROW);
        T::store::<3>(sums.add(LOWER + SUMS_ROW / 2), SUMS_ROW);
    }
}

/// Where an operand's rows begin that a step has: those of the outer indices if k runs along them, else those of k.
pub(crate) type Starts = [usize; BLOCK];

/// Packs rows `outer` (32 at most) of the left operand at one step, `k` (32 at most); the rows and k that are missing are
/// zeros. Called within work on tiles alone, whose CPUs have AVX-512.
#[inline(always)]
pub(crate) fn pack_left(
    op: Operand<'_>,
    starts: &Starts,
    outer: &Range<usize>,
    k: &Range<usize>,
    to: &mut [u32; STEP_CELLS],
) {
    if op.k_contiguous {
        rows_along(op, starts, outer, k, to);
    } else if outer.len() == BLOCK && k.len() == BLOCK {
        let (src, stride, to) = (op.data.bf16(), 2 * op.ld, to.as_mut_ptr().cast());
        check_rows(&op, starts, outer.end);
        // SAFETY: rows of 32 elements are there, 32 of them and `ld` apart if they are not copied; two tiles are written.
        // Where there are tiles, or they are played, there is AVX-512.
        unsafe {
            let row = |k: usize| src.as_ptr().add(starts[k] + outer.start);
            if op.tokens.is_some() || stride.is_multiple_of(CROWDED) {
                let copy: [[bf16; BLOCK]; BLOCK] = std::array::from_fn(|k| *row(k).cast());
                transpose_halves(copy.as_ptr().cast(), 2 * BLOCK, to);
            } else {
                transpose_halves(row(0).cast(), stride, to);
            }
        }
    } else {
        let mut across = [0; STEP_CELLS];
        cells_across(op, starts, outer, k, &mut across);
        transpose_tiles(&across, to);
    }
}

/// Packs columns `outer` (32 at most) of the right operand at one step, as `pack_left` does rows.
#[inline(always)]
pub(crate) fn pack_right(
    op: Operand<'_>,
    starts: &Starts,
    outer: &Range<usize>,
    k: &Range<usize>,
    to: &mut [u32; STEP_CELLS],
) {
    if !op.k_contiguous && outer.len() == BLOCK && k.len() == BLOCK {
        let (src, to) = (op.data.bf16(), to.as_mut_ptr());
        check_rows(&op, starts, outer.end);
        for i in 0..TILE_ROWS {
            // SAFETY: 32 elements of each row are there, as was just checked; a line of each of the two tiles is
            // written. AVX-512 is there, as said above.
            unsafe {
                let rows = [2 * i, 2 * i + 1].map(|row| src.as_ptr().add(starts[row] + outer.start).cast());
                let low = to.add(i * TILE_COLUMNS);
                pair_rows(rows, low, low.add(STEP_CELLS / 2));
            }
        }
    } else if !op.k_contiguous {
        cells_across(op, starts, outer, k, to);
    } else if outer.len() == BLOCK && k.len() == BLOCK && op.tokens.is_none() {
        let part = &op.data.bf16()[starts[0] + k.start..starts[BLOCK - 1] + k.end];
        let (at, stride, to) = (part.as_ptr().cast::<u8>(), 2 * op.ld, to.as_mut_ptr());
        // SAFETY: the part has 32 rows of 32 elements, `ld` apart; two tiles are written.
        unsafe {
            transpose_cells(at, stride, to, TILE_COLUMNS);
            transpose_cells(at.add(TILE_ROWS * stride), stride, to.add(STEP_CELLS / 2), TILE_COLUMNS);
        }
    } else {
        let mut along = [0; STEP_CELLS];
        rows_along(op, starts, outer, k, &mut along);
        transpose_tiles(&along, to);
    }
}

/// That all rows of a step go as far as `end`.
#[inline(always)]
fn check_rows(op: &Operand<'_>, starts: &Starts, end: usize) {
    // The last is the furthest of those that lie in their order.
    let furthest = if op.tokens.is_some() { starts.iter().copied().fold(0, usize::max) } else { starts[BLOCK - 1] };
    assert!(furthest + end <= op.data.len(), "a row from {furthest} to {end} of {}", op.data.len());
}

#[inline(always)]
fn transpose_tiles(from: &[u32; STEP_CELLS], to: &mut [u32; STEP_CELLS]) {
    let (from, to) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr());
    // SAFETY: both are two tiles, whose rows lie close together.
    unsafe {
        transpose_cells(from, 4 * TILE_COLUMNS, to, TILE_COLUMNS);
        transpose_cells(from.add(STEP_BYTES / 2), 4 * TILE_COLUMNS, to.add(STEP_CELLS / 2), TILE_COLUMNS);
    }
}

/// The cells of up to 32 outer indices over up to 32 steps of k along which they lie: `[outer][cell]`.
#[inline(always)]
fn rows_along(op: Operand<'_>, starts: &Starts, outer: &Range<usize>, k: &Range<usize>, to: &mut [u32; STEP_CELLS]) {
    let src = op.data.bf16();
    // A cell in memory is its two elements, the first one first.
    let rows = bytemuck::cast_slice_mut::<u32, bf16>(to).as_chunks_mut::<BLOCK>().0;
    for (r, row) in rows.iter_mut().enumerate() {
        let from = if r < outer.len() { &src[starts[r] + k.start..][..k.len()] } else { &[] };
        match from.try_into() {
            Ok(from) => *row = from,
            Err(_) => {
                row[..from.len()].copy_from_slice(from);
                row[from.len()..].fill(bf16::ZERO);
            }
        }
    }
}

/// The cells of up to 32 outer indices over up to 32 steps of k that lie `ld` apart: `[half][cell][16 outer]`.
#[inline(always)]
fn cells_across(op: Operand<'_>, starts: &Starts, outer: &Range<usize>, k: &Range<usize>, to: &mut [u32; STEP_CELLS]) {
    let src = op.data.bf16();
    let row = |k0: usize| &src[starts[k0 - k.start] + outer.start..][..outer.len()];
    let (left, right) = to.split_at_mut(STEP_CELLS / 2);
    let lines = left.as_chunks_mut::<TILE_COLUMNS>().0.iter_mut().zip(right.as_chunks_mut::<TILE_COLUMNS>().0);
    for ((left, right), k0) in lines.zip((k.start..).step_by(2)) {
        if k0 + 1 < k.end && outer.len() == BLOCK {
            let rows = [row(k0), row(k0 + 1)].map(|row| row.as_ptr().cast());
            // SAFETY: rows of 32 elements, and a line of each tile. Where there are tiles, or they are played, there is AVX-512.
            unsafe { pair_rows(rows, left.as_mut_ptr(), right.as_mut_ptr()) }
            continue;
        }
        let at =
            |k0: usize, i: usize| if k0 < k.end { row(k0).get(i).copied().unwrap_or(bf16::ZERO) } else { bf16::ZERO };
        *left = std::array::from_fn(|i| pair(at(k0, i), at(k0 + 1, i)));
        *right = std::array::from_fn(|i| pair(at(k0, TILE_COLUMNS + i), at(k0 + 1, TILE_COLUMNS + i)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panel::Tokens;
    use crate::testing::isas;
    use crate::{Level, View};

    /// Every cell of a packed step, of parts that are whole, ragged, or one element, in both layouts; around the part the
    /// operand has numbers that must not be seen.
    #[test]
    fn steps_are_packed() {
        if isas().iter().all(|isa| isa.level() < Level::Avx512) {
            return;
        }
        let size = 70;
        let value = |outer: usize, k: usize| bf16::from_f32((outer * 128 + k) as f32 / 7.0);
        // The second is a distance at which lines evict one another.
        for (k_contiguous, ld) in [(true, 77), (false, 77), (true, 1024), (false, 1024)] {
            let at = |o: usize, k: usize| if k_contiguous { o * ld + k } else { k * ld + o };
            let mut data = vec![bf16::NAN; size * ld];
            for (o, k) in (0..size).flat_map(|o| (0..size).map(move |k| (o, k))) {
                data[at(o, k)] = value(o, k);
            }
            // The same rows in their order, and as those of tokens.
            let slots: Vec<i32> = (0..size).map(|i| ((i * 3 + i % 3) % (3 * size)) as i32).collect();
            let in_order = Operand::new(View::Bf16(&data), ld, k_contiguous);
            let of_tokens = Operand { tokens: Some(Tokens::new(&slots, 3)), ..in_order };
            let parts = [0..32, 3..35, 38..70, 1..2, 5..20, 64..70, 7..38, 16..32];
            let all = parts.iter().flat_map(|o| parts.iter().map(move |k| (o, k)));
            for (op, (outer, k)) in all.flat_map(|part| [(in_order, part), (of_tokens, part)]) {
                let (mut left, mut right) = ([7; STEP_CELLS], [7; STEP_CELLS]);
                let starts = op.rows(if k_contiguous { outer } else { k });
                pack_left(op, &starts, outer, k, &mut left);
                pack_right(op, &starts, outer, k, &mut right);
                for (o, c) in (0..BLOCK).flat_map(|o| (0..TILE_COLUMNS).map(move |c| (o, c))) {
                    let held = |k0: usize| o < outer.len() && k0 < k.len();
                    let of = |k0: usize| if held(k0) { value(outer.start + o, k.start + k0) } else { bf16::ZERO };
                    let cell = pair(of(2 * c), of(2 * c + 1));
                    let name = format!("{outer:?} {k:?} {k_contiguous} {ld}: outer {o}, cell {c}");
                    assert_eq!(left[o * TILE_COLUMNS + c], cell, "left, {name}");
                    let half = o / TILE_COLUMNS * STEP_CELLS / 2;
                    assert_eq!(right[half + c * TILE_COLUMNS + o % TILE_COLUMNS], cell, "right, {name}");
                }
            }
        }
    }
}
