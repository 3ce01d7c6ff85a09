//! Forward copies rows. Backward gives each task a block of the table's rows and the positions that point into it, so
//! that no two tasks add to one row and the order of a row's sum is that of the positions.

use crate::{Cpu, Elem, View, ViewMut, Weight};

/// Elements that a task of the forward writes, at least.
const PIECE: usize = 1 << 14;
/// Table rows per task of the backward.
const BLOCK: usize = 64;
/// Columns summed at once, in registers.
const COLS: usize = 64;

fn row(id: i32, rows: usize) -> usize {
    assert!(id >= 0 && (id as usize) < rows, "token id {id} outside a table of {rows} rows");
    id as usize
}

pub fn forward<W: Elem, T: Elem>(cpu: &Cpu, ids: &[i32], table: &Weight<'_>, y: ViewMut<'_>) {
    let (d, w) = (table.cols, W::of(table.data));
    let rows = PIECE.div_ceil(d.max(1));
    cpu.chunks_mut(T::of_mut(y), rows * d.max(1), |i, y| {
        for (y, &id) in y.chunks_exact_mut(d).zip(&ids[i * rows..]) {
            for (y, w) in y.iter_mut().zip(&w[row(id, table.rows) * d..][..d]) {
                *y = T::round(w.f32());
            }
        }
    });
}

pub fn backward<T: Elem>(cpu: &Cpu, ids: &[i32], dy: View<'_>, d: usize, dtable: ViewMut<'_>) {
    let (dy, dtable) = (T::of(dy), dtable.f32());
    let rows = dtable.len() / d;
    // Positions by id; equal ids stay in order of position.
    let mut by_id: Vec<(usize, usize)> = ids.iter().enumerate().map(|(n, &id)| (row(id, rows), n)).collect();
    by_id.sort_unstable();
    cpu.chunks_mut(dtable, BLOCK * d, |block, dtable| {
        let first = by_id.partition_point(|&(id, _)| id < block * BLOCK);
        let last = by_id.partition_point(|&(id, _)| id < (block + 1) * BLOCK);
        for positions in by_id[first..last].chunk_by(|a, b| a.0 == b.0) {
            let at = (positions[0].0 - block * BLOCK) * d;
            add_rows(dy, d, positions, &mut dtable[at..at + d]);
        }
    });
}

/// `out[D]` += sum of dy's rows at the positions, in their order.
fn add_rows<T: Elem>(dy: &[T], d: usize, positions: &[(usize, usize)], out: &mut [f32]) {
    for (c, out) in out.chunks_mut(COLS).enumerate() {
        let mut sum = [0.0f32; COLS];
        for &(_, n) in positions {
            let dy = &dy[n * d + c * COLS..][..out.len()];
            sum.iter_mut().zip(dy).for_each(|(s, x)| *s += x.f32());
        }
        out.iter_mut().zip(&sum).for_each(|(o, s)| *o += s);
    }
}
