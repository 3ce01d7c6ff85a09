//! Permutation on the cores, in fixed blocks of rows or tokens. All of it is bound by memory; only `plan` is serial, a
//! counting sort over N * K small integers that costs less than handing it out.

use super::Combine;
use crate::isa::{Isa, vectorised};
use crate::{Cpu, Elem};

/// Elements of one task, about.
const BLOCK: usize = 16_384;
/// Columns summed at a time: the f32 sums stay in the first-level cache.
const TILE: usize = 512;

fn block_rows(dim: usize) -> usize {
    (BLOCK / dim).max(1)
}

/// Stable counting sort of the slots by expert.
pub fn plan(indices: &[i32], offsets: &mut [i32], row_of_slot: &mut [i32], slot_of_row: &mut [i32]) {
    let experts = offsets.len() - 1;
    offsets.fill(0);
    for (slot, &e) in indices.iter().enumerate() {
        assert!(
            e >= 0 && (e as usize) < experts,
            "moe_permute: slot {slot} chose {e}, expected one of {experts} experts"
        );
        offsets[e as usize + 1] += 1;
    }
    for e in 0..experts {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets[..experts].to_vec();
    for (slot, &e) in indices.iter().enumerate() {
        let row = next[e as usize];
        next[e as usize] += 1;
        row_of_slot[slot] = row;
        slot_of_row[row as usize] = slot as i32;
    }
}

/// `rows[r]` = `x[slot_of_row[r] / K]`.
pub fn permute<T: Elem>(cpu: &Cpu, x: &[T], dim: usize, top_k: usize, slot_of_row: &[i32], rows: &mut [T]) {
    let block = block_rows(dim);
    cpu.chunks_mut(rows, block * dim, |b, rows| {
        for (row, &slot) in rows.chunks_exact_mut(dim).zip(&slot_of_row[b * block..]) {
            row.copy_from_slice(&x[slot as usize / top_k * dim..][..dim]);
        }
    });
}

/// `dx[n]` (+)= sum over k of `d_rows[row_of_slot[n * K + k]]`.
pub fn permute_backward<T: Elem>(
    cpu: &Cpu,
    d_rows: &[T],
    dim: usize,
    top_k: usize,
    row_of_slot: &[i32],
    dx: &mut [T],
    accumulate: bool,
) {
    by_token(cpu, dx, dim, |n, at, sums, dx| {
        for &row in &row_of_slot[n * top_k..][..top_k] {
            add(cpu.isa(), sums, &d_rows[row as usize * dim + at..]);
        }
        if accumulate {
            add(cpu.isa(), sums, dx);
        }
        round(cpu.isa(), sums, dx);
    });
}

/// `y[n]` = `base[n]` + sum over k of `weights[n, k]` * `rows[row_of_slot[n * K + k]]` + `extra[n]`.
pub fn combine<T: Elem>(cpu: &Cpu, a: Combine<'_>) {
    let (rows, row_of_slot, weights) = (T::of(a.rows), a.row_of_slot.i32(), a.weights.f32());
    let (base, extra) = (a.base.map(T::of), a.extra.map(T::of));
    let (dim, top_k) = (a.dim, a.top_k);
    by_token(cpu, T::of_mut(a.y), dim, |n, at, sums, y| {
        if let Some(base) = base {
            add(cpu.isa(), sums, &base[n * dim + at..]);
        }
        for slot in n * top_k..(n + 1) * top_k {
            let (weight, row) = (weights[slot], row_of_slot[slot] as usize);
            add_weighted(cpu.isa(), sums, weight, &rows[row * dim + at..]);
        }
        if let Some(extra) = extra {
            add(cpu.isa(), sums, &extra[n * dim + at..]);
        }
        round(cpu.isa(), sums, y);
    });
}

/// Runs `f(n, first column, sums, columns)` for the tiles of each token's row of `out`; `sums` starts as zeros.
fn by_token<T: Elem>(cpu: &Cpu, out: &mut [T], dim: usize, f: impl Fn(usize, usize, &mut [f32], &mut [T]) + Sync) {
    let block = block_rows(dim);
    cpu.chunks_mut(out, block * dim, |b, rows| {
        let mut sums = vec![0.0f32; TILE.min(dim)];
        for (r, row) in rows.chunks_exact_mut(dim).enumerate() {
            for (tile, columns) in row.chunks_mut(TILE).enumerate() {
                let sums = &mut sums[..columns.len()];
                sums.fill(0.0);
                f(b * block + r, tile * TILE, sums, columns);
            }
        }
    });
}

vectorised! {
    fn add<T: Elem>(isa: Isa, sums: &mut [f32], x: &[T]) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x.f32());
    }
}

vectorised! {
    fn add_weighted<T: Elem>(isa: Isa, sums: &mut [f32], weight: f32, x: &[T]) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += weight * x.f32());
    }
}

vectorised! {
    fn round<T: Elem>(isa: Isa, sums: &[f32], out: &mut [T]) {
        out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = T::round(sum));
    }
}
