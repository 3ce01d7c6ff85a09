//! Row blocks over the workers; the scatter is serial because it is bound by memory and its rows are few (MTP).

use crate::{Cpu, Elem};

/// Rows one task moves.
const BLOCK: usize = 64;

pub fn gather<T: Elem>(cpu: &Cpu, x: &[T], dim: usize, index: &[i32], out: &mut [T]) {
    if dim == 0 {
        return;
    }
    cpu.chunks_mut(out, BLOCK * dim, |b, out| {
        for (row, &i) in out.chunks_exact_mut(dim).zip(&index[b * BLOCK..]) {
            row.copy_from_slice(&x[i as usize * dim..][..dim]);
        }
    });
}

pub fn scatter_add<T: Elem>(d: &[T], dim: usize, index: &[i32], x: &mut [T]) {
    for (n, &i) in index.iter().enumerate() {
        let to = &mut x[i as usize * dim..][..dim];
        for (o, v) in to.iter_mut().zip(&d[n * dim..]) {
            *o = T::round(o.f32() + v.f32());
        }
    }
}

pub fn copy_strided<T: Elem>(
    cpu: &Cpu,
    (from, fs): (&[T], usize),
    (to, ts): (&mut [T], usize),
    rows: usize,
    width: usize,
) {
    if rows == 0 || width == 0 {
        return;
    }
    let used = (rows - 1) * ts + width;
    cpu.chunks_mut(&mut to[..used], BLOCK * ts, |b, to| {
        for (r, to) in to.chunks_mut(ts).enumerate() {
            to[..width].copy_from_slice(&from[(b * BLOCK + r) * fs..][..width]);
        }
    });
}
