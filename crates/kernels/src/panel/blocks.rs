//! Products on AMX's tiles, by blocks of 32 x 32 sums that stay in four tile registers while k passes by.
//!
//! A step is 32 of k: two tiles of the left operand times two of the right, so that each tile that is loaded is
//! multiplied twice. Rows of the left operand are read where they lie if k runs along them; on the way they can be
//! copied to where the next blocks find them close together. The right operand is packed: of each 32 columns and step
//! two tiles of 1 KiB, whose rows are pairs of k.
//!
//! Every sum is one chain over the steps in their order, whatever the block; stored and loaded sums are not rounded.

use super::Operand;
use crate::bf16;
use crate::isa::{TILE_COLUMNS, TILE_ROWS, Tiles, transpose_cells};
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

    /// Rows that were packed or copied.
    ///
    /// # Safety
    /// As for `rows`, of as many steps as are used.
    pub unsafe fn packed(cells: *const u32) -> Self {
        Self { at: cells.cast(), row: 2 * BLOCK, step: STEP_BYTES }
    }
}

/// `sums` (+)= left . right over `steps` steps; with `COPY` the left operand is left in `copy`, packed. `beside` runs
/// once a step, while tiles are multiplied: what it does in vectors costs little there.
///
/// # Safety
/// Tiles are configured. `left` has so many steps; so many times [`STEP_CELLS`] are there from `right` and, with `COPY`,
/// from `copy`, and [`SUMS`] from `sums`.
#[inline(always)]
pub(crate) unsafe fn block<T: Tiles, const COPY: bool>(
    left: Left,
    copy: *mut u32,
    right: *const u32,
    sums: *mut f32,
    (steps, add): (usize, bool),
    mut beside: impl FnMut(),
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
        let (mut upper, mut right, mut copy) = (left.at, right.cast::<u8>(), copy.cast::<u8>());
        for _ in 0..steps {
            T::load::<4>(upper, left.row);
            T::load::<6>(right, 2 * BLOCK);
            if COPY {
                T::store::<4>(copy, 2 * BLOCK);
            }
            T::dot::<0, 4, 6>();
            T::load::<7>(right.add(HALF), 2 * BLOCK);
            T::dot::<1, 4, 7>();
            T::load::<5>(upper.add(TILE_ROWS * left.row), left.row);
            if COPY {
                T::store::<5>(copy.add(HALF), 2 * BLOCK);
                copy = copy.add(STEP_BYTES);
            }
            T::dot::<2, 5, 6>();
            beside();
            T::dot::<3, 5, 7>();
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

/// Packs rows `outer` (32 at most) of the left operand over `k`; the rows and k that are missing are zeros.
#[inline(always)]
pub(crate) fn pack_left(op: Operand<'_>, outer: &Range<usize>, k: &Range<usize>, dst: &mut [u32]) {
    let src = op.data.bf16();
    for (k0, step) in k.clone().step_by(BLOCK).zip(dst.chunks_exact_mut(STEP_CELLS)) {
        let kc = BLOCK.min(k.end - k0);
        if op.k_contiguous {
            for (r, row) in step.as_chunks_mut::<TILE_COLUMNS>().0.iter_mut().enumerate() {
                *row = if r < outer.len() { cells_along(&src[(outer.start + r) * op.ld + k0..][..kc]) } else { [0; _] };
            }
        } else {
            let mut across = [0; STEP_CELLS];
            cells_across(src, op.ld, outer, &(k0..k0 + kc), &mut across);
            let (upper, lower) = across.split_at(STEP_CELLS / 2);
            let (to_upper, to_lower) = step.split_at_mut(STEP_CELLS / 2);
            // SAFETY: squares of 16 rows of 16 cells, close together.
            unsafe {
                transpose_cells(upper.as_ptr().cast(), 4 * TILE_COLUMNS, to_upper.as_mut_ptr());
                transpose_cells(lower.as_ptr().cast(), 4 * TILE_COLUMNS, to_lower.as_mut_ptr());
            }
        }
    }
}

/// Packs columns `outer` of the right operand over `k`: `[32 columns][step]`, two tiles each. What is missing of the last
/// columns and of the last step are zeros.
#[inline(always)]
pub(crate) fn pack_right(op: Operand<'_>, outer: &Range<usize>, k: &Range<usize>, dst: &mut [u32]) {
    let src = op.data.bf16();
    let steps = k.len().div_ceil(BLOCK);
    if steps == 0 {
        return;
    }
    if op.k_contiguous {
        let halves = outer.clone().step_by(TILE_COLUMNS);
        for (h, first) in halves.enumerate() {
            let last = outer.end.min(first + TILE_COLUMNS);
            let tiles = &mut dst[h / 2 * steps * STEP_CELLS + h % 2 * STEP_CELLS / 2..];
            for (s, k0) in k.clone().step_by(BLOCK).enumerate() {
                let tile = &mut tiles[s * STEP_CELLS..][..STEP_CELLS / 2];
                let kc = BLOCK.min(k.end - k0);
                if last - first == TILE_COLUMNS && kc == BLOCK {
                    let square = &src[first * op.ld + k0..(last - 1) * op.ld + k0 + kc];
                    // SAFETY: 16 rows of 32 elements, `ld` apart, and a tile to write.
                    unsafe { transpose_cells(square.as_ptr().cast(), 2 * op.ld, tile.as_mut_ptr()) }
                } else {
                    let mut rows = [[0; TILE_COLUMNS]; TILE_COLUMNS];
                    for (row, o) in rows.iter_mut().zip(first..last) {
                        *row = cells_along(&src[o * op.ld + k0..][..kc]);
                    }
                    // SAFETY: 16 rows of 16 cells, close together, and a tile to write.
                    unsafe { transpose_cells(rows.as_ptr().cast(), 4 * TILE_COLUMNS, tile.as_mut_ptr()) }
                }
            }
        }
        if !outer.len().next_multiple_of(TILE_COLUMNS).is_multiple_of(BLOCK) {
            let tiles = &mut dst[outer.len() / BLOCK * steps * STEP_CELLS..][..steps * STEP_CELLS];
            tiles.chunks_exact_mut(STEP_CELLS).for_each(|step| step[STEP_CELLS / 2..].fill(0));
        }
    } else {
        for (s, k0) in k.clone().step_by(BLOCK).enumerate() {
            let k = k0..k.end.min(k0 + BLOCK);
            for (g, first) in outer.clone().step_by(BLOCK).enumerate() {
                let to = &mut dst[(g * steps + s) * STEP_CELLS..][..STEP_CELLS];
                let to = to.try_into().expect("a slice of this length");
                cells_across(src, op.ld, &(first..outer.end.min(first + BLOCK)), &k, to);
            }
        }
    }
}

fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// The cells of up to 32 elements along k, zeros after them.
#[inline(always)]
fn cells_along(from: &[bf16]) -> [u32; TILE_COLUMNS] {
    let at = |i: usize| from.get(i).copied().unwrap_or(bf16::ZERO);
    match <&[bf16; BLOCK]>::try_from(from) {
        Ok(from) => std::array::from_fn(|c| pair(from[2 * c], from[2 * c + 1])),
        Err(_) => std::array::from_fn(|c| pair(at(2 * c), at(2 * c + 1))),
    }
}

/// The cells of up to 32 outer indices over up to 32 steps of k that lie `ld` apart: `[half][cell][16 outer]`.
#[inline(always)]
fn cells_across(src: &[bf16], ld: usize, outer: &Range<usize>, k: &Range<usize>, to: &mut [u32; STEP_CELLS]) {
    let row = |k: usize| &src[k * ld + outer.start..][..outer.len()];
    let (left, right) = to.split_at_mut(STEP_CELLS / 2);
    let lines = left.as_chunks_mut::<TILE_COLUMNS>().0.iter_mut().zip(right.as_chunks_mut::<TILE_COLUMNS>().0);
    for ((left, right), k0) in lines.zip((k.start..).step_by(2)) {
        let rows = (k0 + 1 < k.end).then(|| (row(k0), row(k0 + 1)));
        if let Some((x, y)) = rows
            && let (Ok(x), Ok(y)) = (<&[bf16; BLOCK]>::try_from(x), <&[bf16; BLOCK]>::try_from(y))
        {
            *left = std::array::from_fn(|i| pair(x[i], y[i]));
            *right = std::array::from_fn(|i| pair(x[TILE_COLUMNS + i], y[TILE_COLUMNS + i]));
            continue;
        }
        let at = |k0: usize, i: usize| if k0 < k.end { row(k0).get(i).copied().unwrap_or(bf16::ZERO) } else { bf16::ZERO };
        *left = std::array::from_fn(|i| pair(at(k0, i), at(k0 + 1, i)));
        *right = std::array::from_fn(|i| pair(at(k0, TILE_COLUMNS + i), at(k0 + 1, TILE_COLUMNS + i)));
    }
}
