//! Forward on the CPU: one task per sequence, query tile and head. A task keeps its queries transposed, so that scores
//! come out as `[keys][queries]`: keys are then only widened, never transposed, and the softmax runs along contiguous
//! queries without a horizontal sum.

use super::tile::{self, Product, Softmax, TILE, cut, padded};
use super::{Problem, Shape};
use crate::isa::{Job, Lanes};
use crate::{Cpu, Elem};
use std::marker::PhantomData;

/// 64 queries (or fewer, at the end) of one sequence.
#[derive(Clone, Copy)]
pub struct QueryTile {
    /// First query, in the packed batch.
    pub q: usize,
    /// Number of queries.
    pub nq: usize,
    /// First key of the sequence, in the packed batch.
    pub k: usize,
    /// Keys that the tile's last query sees: those of the others are fewer.
    pub keys: usize,
    /// Keys that the first query sees; not positive when it sees none.
    pub first: i64,
}

impl QueryTile {
    /// For every query, how many of the keys from `base` on it sees (any number <= 0 is none).
    #[inline(always)]
    pub fn visible(&self, base: usize) -> [i32; TILE] {
        let first = (self.first - base as i64).clamp(-(TILE as i64), i64::from(i32::MAX / 2)) as i32;
        std::array::from_fn(|i| first + i as i32)
    }
}

/// The query tiles of sequence s, in order.
pub fn query_tiles<T>(x: &Problem<'_, T>, s: usize) -> impl Iterator<Item = QueryTile> + use<T> {
    let (q0, q1) = (x.cu_q[s] as usize, x.cu_q[s + 1] as usize);
    let (k0, k1) = (x.cu_k[s] as usize, x.cu_k[s + 1] as usize);
    (q0..q1).step_by(TILE).map(move |q| {
        let nq = (q1 - q).min(TILE);
        // Aligned at the end: the last query sees all keys.
        let first = (k1 - k0) as i64 - (q1 - q) as i64 + 1;
        QueryTile { q, nq, k: k0, keys: (first + nq as i64 - 1).max(0) as usize, first }
    })
}

/// Shared memory of which tasks write parts that do not overlap.
pub struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: access is only through `part`, whose callers write parts that do not overlap.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows the whole for as long as parts are written.
    pub fn new(all: &'a mut [T]) -> Self {
        Self { ptr: all.as_mut_ptr(), len: all.len(), life: PhantomData }
    }

    /// Elements `at .. at + len`.
    ///
    /// # Safety
    /// No two tasks may hold overlapping parts.
    #[allow(clippy::mut_from_ref, reason = "disjoint by the caller's contract")]
    pub unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "part {at} + {len} of {}", self.len);
        // SAFETY: inside the borrowed slice, and disjoint from every other part by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }
}

/// Padded widths of a head's query-key part and of its value part.
pub fn padded_widths(s: &Shape) -> (usize, usize) {
    (padded(s.nope + s.rope), padded(s.v))
}

/// Widens n rows of `width` that lie `stride` apart into rows of `ld`, filled up with zeros.
#[inline(always)]
pub fn gather<T: Elem>(from: &[T], stride: usize, width: usize, n: usize, ld: usize, to: &mut [f32]) {
    for (i, row) in to.chunks_exact_mut(ld).enumerate().take(n) {
        tile::widen(&from[i * stride..i * stride + width], &mut row[..width]);
        row[width..].fill(0.0);
    }
}

/// Gathers n keys and values of head h from key `at` on: key rows `[nope | rope]`, value rows.
#[inline(always)]
pub fn gather_keys<T: Elem>(x: &Problem<'_, T>, h: usize, at: usize, n: usize, key: &mut [f32], value: &mut [f32]) {
    let s = &x.shape;
    let (dp, wp) = padded_widths(s);
    let row = s.nope + s.v;
    for j in 0..n {
        let up = &x.kv_up[((at + j) * s.heads + h) * row..][..row];
        let key = &mut key[j * dp..(j + 1) * dp];
        tile::widen(&up[..s.nope], &mut key[..s.nope]);
        tile::widen(&x.k_pe[(at + j) * s.k_pe_stride..][..s.rope], &mut key[s.nope..s.nope + s.rope]);
        key[s.nope + s.rope..].fill(0.0);
        let value = &mut value[j * wp..(j + 1) * wp];
        tile::widen(&up[s.nope..], &mut value[..s.v]);
        value[s.v..].fill(0.0);
    }
}

/// See [`super::forward`].
pub fn forward<T: Elem>(cpu: &Cpu, x: &Problem<'_, T>, out: &mut [T], lse: &mut [f32]) {
    let heads = x.shape.heads;
    let mut tiles: Vec<_> = (0..x.cu_q.len() - 1).flat_map(|s| query_tiles(x, s)).collect();
    // The longest first, so that none is left over at the end; the order of tasks changes no bit.
    tiles.sort_by_key(|t| std::cmp::Reverse(t.keys));
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    cpu.for_each(tiles.len() * heads, |i| {
        cpu.isa().run(Forward { x, tile: tiles[i / heads], head: i % heads, out: &out, lse: &lse });
    });
}

/// One task: a query tile of one head.
struct Forward<'a, T> {
    x: &'a Problem<'a, T>,
    tile: QueryTile,
    head: usize,
    out: &'a Disjoint<'a, T>,
    lse: &'a Disjoint<'a, f32>,
}

impl<T: Elem> Job for Forward<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (dp, wp) = padded_widths(&self.x.shape);
        let len = TILE * (2 * dp + 2 * wp + TILE);
        tile::with_scratch(
            len,
            #[inline(always)]
            |scratch| self.walk::<V>(scratch),
        );
    }
}

impl<T: Elem> Forward<'_, T> {
    #[inline(always)]
    fn walk<V: Lanes>(&self, mut scratch: &mut [f32]) {
        let (x, t, s) = (self.x, self.tile, &self.x.shape);
        let (d, (dp, wp)) = (s.nope + s.rope, padded_widths(s));
        let columns = padded(t.nq);
        let query = cut(&mut scratch, TILE * dp);
        let key = cut(&mut scratch, TILE * dp);
        let value = cut(&mut scratch, TILE * wp);
        let sum = cut(&mut scratch, TILE * wp);
        let scores = cut(&mut scratch, TILE * TILE);
        // The key tile is free until the walk begins: the queries pass through it on their way to being transposed.
        gather(&x.q[(t.q * s.heads + self.head) * d..], s.heads * d, d, t.nq, dp, key);
        tile::transpose(key, t.nq, dp, query);
        let mut softmax = Softmax::new();
        sum[..t.nq * wp].fill(0.0);
        for base in (0..t.keys).step_by(TILE) {
            let nk = (t.keys - base).min(TILE);
            gather_keys(x, self.head, t.k + base, nk, key, value);
            scores_of::<V>(nk, columns, d, key, dp, query, scores);
            softmax.tile::<V>(&mut scores[..nk * TILE], columns, s.scale, &t.visible(base));
            for (q, row) in sum.chunks_exact_mut(wp).enumerate().take(t.nq) {
                row.iter_mut().for_each(|o| *o *= softmax.alpha[q]);
            }
            Product {
                m: t.nq,
                n: wp,
                k: nk,
                a: scores,
                a_row: 1,
                a_col: TILE,
                b: value,
                b_row: wp,
                c_row: wp,
                add: true,
            }
            .write::<V>(sum);
        }
        self.finish(&softmax, sum, wp);
    }

    #[inline(always)]
    fn finish(&self, softmax: &Softmax, sum: &[f32], wp: usize) {
        let (t, s) = (self.tile, &self.x.shape);
        for (q, row) in sum.chunks_exact(wp.max(1)).enumerate().take(t.nq) {
            let at = (t.q + q) * s.heads + self.head;
            let (factor, lse) = softmax.finish(q);
            // SAFETY: a query and head belong to one task.
            unsafe {
                tile::round_scaled(&row[..s.v], factor, self.out.part(at * s.v, s.v));
                self.lse.part(at, 1)[0] = lse;
            }
        }
    }
}

/// `scores[key][query]` = key . query, over `d` elements, for the first `nk` keys and `columns` queries.
#[inline(always)]
pub fn scores_of<V: Lanes>(
    nk: usize,
    columns: usize,
    d: usize,
    key: &[f32],
    ld: usize,
    query: &[f32],
    scores: &mut [f32],
) {
    Product { m: nk, n: columns, k: d, a: key, a_row: ld, a_col: 1, b: query, b_row: TILE, c_row: TILE, add: false }
        .write::<V>(scores);
}
