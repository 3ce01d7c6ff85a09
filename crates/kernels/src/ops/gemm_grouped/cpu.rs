//! One product per expert, all in one list, so that the cores share them tile by tile whatever the split of the rows.

use super::Rows;
use crate::ops::gemm::cpu::{Product, run};
use crate::panel::{Operand, Tokens};
use crate::{Cpu, ViewMut, Weight};
use std::ops::Range;

/// The experts' row ranges, checked against the rows that there are: of so many columns each.
fn ranges(offsets: &[i32], all: [(usize, usize); 2]) -> Vec<Range<usize>> {
    assert!(offsets[0] == 0 && offsets.is_sorted(), "offsets do not start at 0 or fall: {offsets:?}");
    let end = offsets[offsets.len() - 1] as usize;
    for (len, cols) in all {
        assert!(end * cols <= len, "{end} rows of {cols} in a buffer of {len}");
    }
    offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).collect()
}

/// Elements of so many columns: as many as the rows have, wherever they are.
fn elements(x: &Rows<'_>, cols: usize) -> usize {
    match x {
        Rows::Sorted(x) => x.len(),
        Rows::Tokens { slot_of_row, .. } => slot_of_row.len() * cols,
    }
}

fn rows_of<'a>(x: Rows<'a>, rows: &Range<usize>, cols: usize, k_contiguous: bool) -> Operand<'a> {
    match x {
        Rows::Sorted(x) => Operand::new(x.slice(rows.start * cols..rows.end * cols), cols, k_contiguous),
        Rows::Tokens { x, slot_of_row, top_k } => {
            let tokens = Tokens::new(&slot_of_row.i32()[rows.clone()], top_k);
            Operand { tokens: Some(tokens), ..Operand::new(x, cols, k_contiguous) }
        }
    }
}

fn matrix<'a>(w: &Weight<'a>, expert: usize, k_contiguous: bool) -> Operand<'a> {
    let len = w.rows * w.cols;
    Operand::new(w.data.slice(expert * len..(expert + 1) * len), w.cols, k_contiguous)
}

pub fn forward(cpu: &Cpu, x: Rows<'_>, offsets: &[i32], w: &Weight<'_>, y: ViewMut<'_>) {
    let ranges = ranges(offsets, [(elements(&x, w.cols), w.cols), (y.len(), w.rows)]);
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

pub fn backward_input(cpu: &Cpu, dy: Rows<'_>, offsets: &[i32], w: &Weight<'_>, dx: ViewMut<'_>) {
    let ranges = ranges(offsets, [(elements(&dy, w.rows), w.rows), (dx.len(), w.cols)]);
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
    x: Rows<'_>,
    dy: Rows<'_>,
    offsets: &[i32],
    rows: usize,
    cols: usize,
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let ranges = ranges(offsets, [(elements(&x, cols), cols), (elements(&dy, rows), rows)]);
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
