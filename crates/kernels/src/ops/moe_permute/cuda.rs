//! Permutation on a GPU. Nothing is known of the choice on the host: launches are sized by slots.

use super::Combine;
use crate::DType::{F32, I32};
use crate::cuda::{Cuda, Grid, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::blocks;
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("moe_permute.cu");
const THREADS: usize = 256;
/// Slots of a block of the plan.
const TILE: usize = 1024;

fn grid(items: usize) -> Grid {
    Grid::new([blocks(items, THREADS), 1, 1], THREADS as u32)
}

/// Stable counting sort of the slots by expert. A choice that is no expert's ends the program: it would be written
/// outside of every buffer.
pub(super) fn plan(
    cuda: &Cuda,
    indices: View<'_>,
    mut offsets: ViewMut<'_>,
    mut row_of_slot: ViewMut<'_>,
    mut slot_of_row: ViewMut<'_>,
) {
    let (experts, slots) = (offsets.len() - 1, indices.len());
    assert!(experts <= 1024, "moe_permute: {experts} experts: at most 1024 on a GPU");
    let tiles = slots.div_ceil(TILE);
    let (counts, totals) = (cuda.empty(I32, experts * tiles), cuda.empty(I32, experts));
    let kernel = |name| cuda.kernel(&SOURCE, name, &[("EXPERTS", Int(experts as i64))]);
    let (indices, counts, totals) = (indices.typed_ptr(I32), counts.view().ptr(), totals.view().ptr());
    let (slots, blocks) = (slots as i32, tiles as i32);
    cuda.launch(&kernel("moe_count"), grid(tiles * THREADS), &args![indices, counts, slots, blocks]);
    cuda.launch(&kernel("moe_scan"), grid(experts * THREADS), &args![counts, totals, blocks]);
    let places = (offsets.typed_ptr(I32), row_of_slot.typed_ptr(I32), slot_of_row.typed_ptr(I32));
    let args = args![indices, counts, totals, places.0, places.1, places.2, slots, blocks];
    // The offsets are written even if there are no slots.
    cuda.launch(&kernel("moe_place"), grid(tiles.max(1) * THREADS), &args);
}

/// `rows[row_of_slot[n * K + k]]` = `x[n]`.
pub(super) fn permute(
    cuda: &Cuda,
    x: View<'_>,
    dim: usize,
    top_k: usize,
    row_of_slot: View<'_>,
    mut rows: ViewMut<'_>,
) {
    let dtype = rows.dtype();
    let (x, rows) = (x.typed_ptr(dtype), rows.typed_ptr(dtype));
    let bytes = dim * dtype.size();
    let unit = widest(bytes as u64 | x | rows);
    let defines =
        [("UNIT_BYTES", Int(unit as i64)), ("UNITS", Int((bytes / unit) as i64)), ("TOP_K", Int(top_k as i64))];
    let units = row_of_slot.len() / top_k * (bytes / unit);
    let args = args![x, row_of_slot.typed_ptr(I32), rows, units as i64];
    cuda.launch(&cuda.kernel(&SOURCE, "moe_spread", &defines), grid(units), &args);
}

/// The most bytes, of 16, 8, 4 and 2, that divide everything of which these are the bits.
fn widest(bits: u64) -> usize {
    1 << bits.trailing_zeros().min(4)
}

/// `dx[n]` (+)= sum over k of `d_rows[row_of_slot[n * K + k]]`.
pub(super) fn permute_backward(
    cuda: &Cuda,
    d_rows: View<'_>,
    dim: usize,
    top_k: usize,
    row_of_slot: View<'_>,
    dx: ViewMut<'_>,
    accumulate: bool,
) {
    let s = Sum { rows: d_rows, dim, top_k, row_of_slot, weights: None, base: None, extra: None, accumulate };
    sum(cuda, s, dx);
}

/// `y[n]` = `base[n]` + sum over k of `weights[n, k]` * `rows[row_of_slot[n * K + k]]` + `extra[n]`.
pub(super) fn combine(cuda: &Cuda, a: Combine<'_>) {
    let Combine { rows, dim, top_k, row_of_slot, weights, base, extra, y } = a;
    let weights = Some(weights);
    sum(cuda, Sum { rows, dim, top_k, row_of_slot, weights, base, extra, accumulate: false }, y);
}

/// What is summed, in this order: `base`, the rows of a token's slots times their weights, `extra`, and if `accumulate`
/// what the output held.
struct Sum<'a> {
    rows: View<'a>,
    dim: usize,
    top_k: usize,
    row_of_slot: View<'a>,
    weights: Option<View<'a>>,
    base: Option<View<'a>>,
    extra: Option<View<'a>>,
    accumulate: bool,
}

fn sum(cuda: &Cuda, s: Sum<'_>, mut out: ViewMut<'_>) {
    let dtype = out.dtype();
    assert!(dtype != DType::I32, "moe_permute: expected a float buffer, found I32");
    let optional = |v: Option<View<'_>>| v.map_or(0, |v| v.typed_ptr(dtype));
    let (rows, base, extra, to) = (s.rows.typed_ptr(dtype), optional(s.base), optional(s.extra), out.typed_ptr(dtype));
    let bytes = (s.dim * dtype.size()) as u64;
    let wide = widest(bytes | rows | base | extra | to) == 16;
    let pieces = out.len() / if wide { 16 / dtype.size() } else { 1 };
    let defines = [
        ("ELEM", Type(dtype)),
        ("DIM", Int(s.dim as i64)),
        ("WIDE", Int(i64::from(wide))),
        ("TOP_K", Int(s.top_k as i64)),
    ];
    let args = args![
        rows,
        s.row_of_slot.typed_ptr(I32),
        s.weights.map_or(0, |w| w.typed_ptr(F32)),
        base,
        extra,
        to,
        pieces as i64,
        i32::from(s.accumulate),
    ];
    cuda.launch(&cuda.kernel(&SOURCE, "moe_sum", &defines), grid(pieces), &args);
}
