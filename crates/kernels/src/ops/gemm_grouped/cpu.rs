//! One product per expert, all in one list, so that the cores share them tile by tile whatever the split of the rows.

use crate::ops::gemm::cpu::{Product, run};
use crate::panel::Operand;
use crate::{Cpu, View, ViewMut, Weight};
use std::ops::Range;

/// The experts' row ranges, checked against the row buffers `[cap, cols]`.
fn ranges(offsets: &[i32], buffers: [(usize, usize); 2]) -> Vec<Range<usize>> {
    assert!(offsets[0] == 0 && offsets.is_sorted(), "offsets do not start at 0 or fall: {offsets:?}");
    let end = offsets[offsets.len() - 1] as usize;
    for (len, cols) in buffers {
        assert!(end * cols <= len, "{end} rows of {cols} in a buffer of {len}");
    }
    offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect()
}

fn rows_of<'a>(x: View<'a>, rows: &Range<usize>, cols: usize, k_contiguous: bool) -> Operand<'a> {
    Operand { data: x.slice(rows.start * cols..rows.end * cols), ld: cols, k_contiguous }
}

fn matrix<'a>(w: &Weight<'a>, expert: usize, k_contiguous: bool) -> Operand<'a> {
    let len = w.rows * w.cols;
    Operand { data: w.data.slice(expert * len..(expert + 1) * len), ld: w.cols, k_contiguous }
}

pub fn forward(cpu: &Cpu, x: View<'_>, offsets: &[i32], w: &Weight<'_>, y: ViewMut<'_>) {
    let ranges = ranges(offsets, [(x.len(), w.cols), (y.len(), w.rows)]);
    let products = ranges.iter().enumerate().map(|(e, r)| Product {
        m: r.len(),
        n: w.rows,
        k: w.cols,
        a: rows_of(x, r, w.cols, true),
        b: matrix(w, e, true),
        c: r.start * w.rows,
        ldc: w.rows,
    });
    run(cpu, &products.collect::<Vec<_>>(), y, false);
}

pub fn backward_input(cpu: &Cpu, dy: View<'_>, offsets: &[i32], w: &Weight<'_>, dx: ViewMut<'_>) {
    let ranges = ranges(offsets, [(dy.len(), w.rows), (dx.len(), w.cols)]);
    let products = ranges.iter().enumerate().map(|(e, r)| Product {
        m: r.len(),
        n: w.cols,
        k: w.rows,
        a: rows_of(dy, r, w.rows, true),
        b: matrix(w, e, false),
        c: r.start * w.cols,
        ldc: w.cols,
    });
    run(cpu, &products.collect::<Vec<_>>(), dx, false);
}

pub fn backward_weight(
    cpu: &Cpu,
    x: View<'_>,
    dy: View<'_>,
    offsets: &[i32],
    rows: usize,
    cols: usize,
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let ranges = ranges(offsets, [(x.len(), cols), (dy.len(), rows)]);
    let products = ranges.iter().enumerate().map(|(e, r)| Product {
        m: rows,
        n: cols,
        k: r.len(),
        a: rows_of(dy, r, rows, false),
        b: rows_of(x, r, cols, false),
        c: e * rows * cols,
        ldc: cols,
    });
    run(cpu, &products.collect::<Vec<_>>(), dw, accumulate);
}
