//! Grouped products on a GPU: wgmma where the GPU has it and the addresses allow it, else the kernels of `gemm`. The
//! number of blocks comes from the rows' capacity; blocks learn the experts' rows from the offsets in device memory.

use super::{sm90, sm90_weight};
use crate::cuda::Cuda;
use crate::ops::gemm::cuda::{Product, Rows, Side};
use crate::{View, ViewMut, Weight};

pub(super) fn forward(cuda: &Cuda, x: View<'_>, offsets: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    if sm90::supports(cuda, x, w, &y) {
        return sm90::forward(cuda, x, offsets, w, y);
    }
    by_rows(cuda, x, offsets, w, true, y);
}

pub(super) fn backward_input(cuda: &Cuda, dy: View<'_>, offsets: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>) {
    if sm90::supports(cuda, dy, w, &dx) {
        return sm90::backward_input(cuda, dy, offsets, w, dx);
    }
    by_rows(cuda, dy, offsets, w, false, dx);
}

/// Rows times their expert's matrix, or its transpose.
fn by_rows(cuda: &Cuda, x: View<'_>, offsets: View<'_>, w: &Weight<'_>, transposed: bool, y: ViewMut<'_>) {
    let (k, n) = if transposed { (w.cols, w.rows) } else { (w.rows, w.cols) };
    let capacity = x.len() / k;
    if capacity == 0 || n == 0 {
        return;
    }
    let (a, b) = (Side { data: x, ld: k, inner_k: true }, Side { data: w.data, ld: w.cols, inner_k: transposed });
    Product { m: 0, n, k, a, b, ldc: n, add: false, rows: Rows::ByExpert { offsets, capacity } }.run(cuda, y);
}

pub(super) fn backward_weight(
    cuda: &Cuda,
    x: View<'_>,
    dy: View<'_>,
    offsets: View<'_>,
    rows: usize,
    cols: usize,
    mut dw: ViewMut<'_>,
    accumulate: bool,
) {
    if sm90_weight::supports(cuda, x, dy, rows, cols, &dw) {
        return sm90_weight::backward_weight(cuda, x, dy, offsets, (rows, cols), dw, accumulate);
    }
    // Experts without rows have no block that could write their zeros.
    if !accumulate {
        cuda.zero(dw.reborrow());
    }
    if dw.is_empty() {
        return;
    }
    let (a, b) = (Side { data: dy, ld: rows, inner_k: false }, Side { data: x, ld: cols, inner_k: false });
    Product { m: rows, n: cols, k: 0, a, b, ldc: cols, add: true, rows: Rows::Summed { offsets } }.run(cuda, dw);
}
