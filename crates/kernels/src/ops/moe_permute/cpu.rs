//! Permutation on the cores, in fixed blocks of rows or tokens. All of it is bound by memory; only `plan` is serial, a
//! counting sort over N * K small integers that costs less than handing it out.

use super::Combine;
use crate::isa::{Cache, Isa, LINE, ask, copied_rows, copy_rows, vectorised};
use crate::{Cpu, Elem};

/// Elements of one task, about.
const BLOCK: usize = 16_384;
/// Rows of so many bytes are asked for before their turn; longer ones the CPU fetches ahead on its own.
const SHORT: usize = 1024;
/// Columns summed at a time.
const TILE: usize = 64;

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
    let all = rows.len();
    let block = copied_rows::<T>(dim, all);
    cpu.chunks_mut(rows, block * dim, |b, rows| {
        let slot = |i: usize| slot_of_row.get(b * block + i);
        copy_rows(cpu.isa(), rows, dim, all, |i| slot(i).map(|&slot| &x[slot as usize / top_k * dim..]));
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
    let block = block_rows(dim);
    cpu.chunks_mut(dx, block * dim, |b, dx| {
        for (r, dx) in dx.chunks_exact_mut(dim).enumerate() {
            let [slots, next] = slots_of(row_of_slot, top_k, b * block + r);
            let s = Sum { rows: d_rows, row_of_slot: slots, weights: None, base: None, extra: None, next };
            sum_rows(cpu.isa(), s, accumulate, dx);
        }
    });
}

/// `y[n]` = `base[n]` + sum over k of `weights[n, k]` * `rows[row_of_slot[n * K + k]]` + `extra[n]`.
pub fn combine<T: Elem>(cpu: &Cpu, a: Combine<'_>) {
    let (rows, row_of_slot, weights) = (T::of(a.rows), a.row_of_slot.i32(), a.weights.f32());
    let (base, extra) = (a.base.map(T::of), a.extra.map(T::of));
    let (dim, top_k) = (a.dim, a.top_k);
    let block = block_rows(dim);
    cpu.chunks_mut(T::of_mut(a.y), block * dim, |b, y| {
        for (r, y) in y.chunks_exact_mut(dim).enumerate() {
            let n = b * block + r;
            let [slots, next] = slots_of(row_of_slot, top_k, n);
            let s = Sum {
                rows,
                row_of_slot: slots,
                weights: Some(&weights[n * top_k..][..top_k]),
                base: base.map(|x| &x[n * dim..][..dim]),
                extra: extra.map(|x| &x[n * dim..][..dim]),
                next,
            };
            sum_rows(cpu.isa(), s, false, y);
        }
    });
}

/// The rows of the n-th token and of the one after it, if there is one.
fn slots_of(row_of_slot: &[i32], top_k: usize, n: usize) -> [&[i32]; 2] {
    let (slots, rest) = row_of_slot[n * top_k..].split_at(top_k);
    [slots, &rest[..top_k.min(rest.len())]]
}

/// What one token's row is the sum of, in this order: `base`, the rows of its slots times their weights, `extra`.
struct Sum<'a, T> {
    base: Option<&'a [T]>,
    rows: &'a [T],
    row_of_slot: &'a [i32],
    weights: Option<&'a [f32]>,
    extra: Option<&'a [T]>,
    /// The next token's rows, which are asked for meanwhile if they are short.
    next: &'a [i32],
}

vectorised! {
    /// out = the sum, to which `accumulate` adds out.
    fn sum_rows<T: Elem>(isa: Isa, s: Sum<'_, T>, accumulate: bool, out: &mut [T]) {
        let whole = out.len() / TILE * TILE;
        let next = if size_of_val(out) <= SHORT { s.next } else { &[] };
        for at in (0..whole).step_by(TILE) {
            for next in next.iter().map(|&row| &s.rows[row as usize * out.len() + at..]) {
                let line = |i: usize| next.as_ptr().wrapping_add(i).cast();
                (0..TILE).step_by(LINE / size_of::<T>()).for_each(|i| ask(Cache::First, line(i)));
            }
            sum_columns::<T, TILE>(&s, at, accumulate, out);
        }
        for at in whole..out.len() {
            sum_columns::<T, 1>(&s, at, accumulate, out);
        }
    }
}

/// N columns, the sums of which stay in registers.
#[inline(always)]
fn sum_columns<T: Elem, const N: usize>(s: &Sum<'_, T>, at: usize, accumulate: bool, out: &mut [T]) {
    let dim = out.len();
    let mut sums = [0.0f32; N];
    if let Some(base) = s.base {
        add(&mut sums, 1.0, &base[at..]);
    }
    for (k, &row) in s.row_of_slot.iter().enumerate() {
        add(&mut sums, s.weights.map_or(1.0, |w| w[k]), &s.rows[row as usize * dim + at..]);
    }
    if let Some(extra) = s.extra {
        add(&mut sums, 1.0, &extra[at..]);
    }
    if accumulate {
        add(&mut sums, 1.0, &out[at..]);
    }
    let out = &mut out[at..at + N];
    for i in 0..N {
        out[i] = T::round(sums[i]);
    }
}

/// sums += weight * x; a weight of 1 changes no bits.
#[inline(always)]
fn add<T: Elem, const N: usize>(sums: &mut [f32; N], weight: f32, x: &[T]) {
    let x = &x[..N];
    for i in 0..N {
        sums[i] += weight * x[i].f32();
    }
}
