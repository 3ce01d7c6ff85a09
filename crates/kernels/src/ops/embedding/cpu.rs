//! Forward copies rows. Backward gives each task a block of the table's rows and the positions that point into it, so
//! that no two tasks add to one row and the order of a row's sum is that of the positions.

use crate::isa::{Isa, copied_rows, copy_rows, vectorised};
use crate::ops::add::cpu::convert_piece;
use crate::{Cpu, Elem, View, ViewMut, Weight};

/// Elements that a task of the forward converts, at least.
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
    let y = T::of_mut(y);
    if W::DTYPE == T::DTYPE {
        let all = y.len();
        let rows = copied_rows::<T>(d, all);
        return cpu.chunks_mut(y, rows * d.max(1), |i, y| {
            let source = |j: usize| ids.get(i * rows + j).map(|&id| &w[row(id, table.rows) * d..]);
            copy_rows(cpu.isa(), y, d, all, |j| source(j).map(bytemuck::cast_slice));
        });
    }
    let rows = PIECE.div_ceil(d.max(1));
    cpu.chunks_mut(y, rows * d.max(1), |i, y| {
        for (y, &id) in y.chunks_exact_mut(d).zip(&ids[i * rows..]) {
            convert_piece(cpu.isa(), &w[row(id, table.rows) * d..][..d], y);
        }
    });
}

pub fn backward<T: Elem>(cpu: &Cpu, ids: &[i32], dy: View<'_>, d: usize, dtable: ViewMut<'_>, accumulate: bool) {
    let (dy, dtable) = (T::of(dy), dtable.f32());
    let rows = dtable.len() / d;
    // Positions by id; equal ids stay in order of position.
    let mut by_id: Vec<Place> = ids.iter().enumerate().map(|(n, &id)| place(row(id, rows), n)).collect();
    by_id.sort_unstable();
    cpu.chunks_mut(dtable, BLOCK * d, |block, dtable| {
        if !accumulate {
            dtable.fill(0.0);
        }
        let first = by_id.partition_point(|&p| id_of(p) < block * BLOCK);
        let last = by_id.partition_point(|&p| id_of(p) < (block + 1) * BLOCK);
        for positions in by_id[first..last].chunk_by(|&a, &b| id_of(a) == id_of(b)) {
            let at = (id_of(positions[0]) - block * BLOCK) * d;
            add_rows(cpu.isa(), dy, positions, &mut dtable[at..at + d]);
        }
    });
}

/// An id, and below it a position: one number, which sorts faster than a pair.
type Place = u64;

fn place(id: usize, n: usize) -> Place {
    (id as u64) << 32 | n as u64
}

fn id_of(p: Place) -> usize {
    (p >> 32) as usize
}

vectorised! {
    /// `out[D]` += sum of dy's rows at the positions, in their order.
    fn add_rows<T: Elem>(isa: Isa, dy: &[T], positions: &[Place], out: &mut [f32]) {
        let d = out.len();
        let whole = d / COLS * COLS;
        for c in (0..whole).step_by(COLS) {
            add_columns::<T, COLS>(dy, d, c, positions, out);
        }
        for c in whole..d {
            add_columns::<T, 1>(dy, d, c, positions, out);
        }
    }
}

/// The N columns from the c-th on.
#[inline(always)]
fn add_columns<T: Elem, const N: usize>(dy: &[T], d: usize, c: usize, positions: &[Place], out: &mut [f32]) {
    let mut sum = [0.0f32; N];
    for &p in positions {
        let dy = &dy[p as u32 as usize * d + c..][..N];
        for i in 0..N {
            sum[i] += dy[i].f32();
        }
    }
    let out = &mut out[c..c + N];
    for i in 0..N {
        out[i] += sum[i];
    }
}
