//! Forward on the CPU: one task per sequence, query tile and head. Scores of a tile are keys (rows) times queries
//! (lanes), and the output is kept turned, `[v][queries]`: values (rows) times probabilities (lanes). With operands of
//! bf16 the probabilities are rounded to bf16 for that product, their sum is not.

use super::Problem;
use super::panels::{Panels, by_element, by_token, gather_keys, room, round_scaled, scale_columns, turn, values_at};
use super::tile::{self, Softmax, TILE, cut};
use crate::isa::{Job, Lanes};
use crate::{Cpu, Elem, View};
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
pub fn query_tiles(x: &Problem<'_>, s: usize) -> impl Iterator<Item = QueryTile> + use<> {
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

/// See [`super::forward`].
pub fn forward<T: Elem>(cpu: &Cpu, x: &Problem<'_>, out: &mut [T], lse: &mut [f32]) {
    let heads = x.shape.heads;
    let mut tiles: Vec<_> = (0..x.cu_q.len() - 1).flat_map(|s| query_tiles(x, s)).collect();
    // The longest first, so that none is left over at the end; the order of tasks changes no bit.
    tiles.sort_by_key(|t| std::cmp::Reverse(t.keys));
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    let panels = Panels::new(cpu, T::DTYPE);
    cpu.for_each(tiles.len() * heads, |i| {
        Forward { x, panels, tile: tiles[i / heads], head: i % heads, out: &out, lse: &lse }.run();
    });
}

/// One task: a query tile of one head.
struct Forward<'a, T> {
    x: &'a Problem<'a>,
    panels: Panels,
    tile: QueryTile,
    head: usize,
    out: &'a Disjoint<'a, T>,
    lse: &'a Disjoint<'a, f32>,
}

impl<T: Elem> Forward<'_, T> {
    fn run(&self) {
        let (s, p) = (&self.x.shape, &self.panels);
        let d = s.nope + s.rope;
        let lanes = p.lanes_len(TILE, d) + p.lanes_len(TILE, TILE);
        let rows = p.rows_len(TILE, d).max(p.rows_len(s.v, TILE));
        tile::with_scratch(lanes + rows + TILE * (TILE + 2 * room(s.v)), |scratch| self.walk(scratch));
    }

    fn walk(&self, mut scratch: &mut [f32]) {
        let (x, t, s, p) = (self.x, self.tile, &self.x.shape, &self.panels);
        let d = s.nope + s.rope;
        let query = bytemuck::cast_slice_mut(cut(&mut scratch, p.lanes_len(TILE, d)));
        let weights = bytemuck::cast_slice_mut(cut(&mut scratch, p.lanes_len(TILE, TILE)));
        let rows_len = p.rows_len(TILE, d).max(p.rows_len(s.v, TILE));
        let rows: &mut [u32] = bytemuck::cast_slice_mut(cut(&mut scratch, rows_len));
        let scores = cut(&mut scratch, TILE * TILE);
        let sum = cut(&mut scratch, room(s.v) * TILE);
        let turned = cut(&mut scratch, room(s.v) * TILE);
        let mut keys = vec![T::round(0.0); TILE * d];
        p.lanes(by_token(x.q, (t.q * s.heads + self.head) * d, s.heads * d), t.nq, TILE, d, query);
        let mut softmax = Softmax::new();
        sum.fill(0.0);
        for base in (0..t.keys).step_by(TILE) {
            let nk = (t.keys - base).min(TILE);
            gather_keys(x, self.head, t.k + base, nk, &mut keys);
            p.rows(by_token(T::view(&keys), 0, d), nk, d, rows);
            p.multiply((query, TILE), (rows, nk), d, scores, false);
            let scores = &mut scores[..nk * TILE];
            p.isa.run(Weigh { softmax: &mut softmax, scores, scale: s.scale, visible: &t.visible(base) });
            scale_columns(p.isa, sum, &softmax.alpha);
            p.lanes(by_element(View::F32(scores), 0, TILE), TILE, TILE, nk, weights);
            let (at, ld) = values_at(s, self.head, t.k + base);
            p.rows(by_element(x.kv_up, at, ld), s.v, nk, rows);
            p.multiply((weights, TILE), (rows, s.v), nk, sum, true);
        }
        turn(p.isa, sum, s.v, turned);
        self.finish(&softmax, turned);
    }

    fn finish(&self, softmax: &Softmax, turned: &[f32]) {
        let (t, s) = (self.tile, &self.x.shape);
        for (q, row) in turned.chunks_exact(room(s.v)).enumerate().take(t.nq) {
            let at = (t.q + q) * s.heads + self.head;
            let (factor, lse) = softmax.finish(q);
            // SAFETY: a query and head belong to one task.
            unsafe {
                round_scaled(self.panels.isa, &row[..s.v], factor, self.out.part(at * s.v, s.v));
                self.lse.part(at, 1)[0] = lse;
            }
        }
    }
}

/// One tile's step of the online softmax.
struct Weigh<'a> {
    softmax: &'a mut Softmax,
    scores: &'a mut [f32],
    scale: f32,
    visible: &'a [i32; TILE],
}

impl Job for Weigh<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        self.softmax.tile::<V>(self.scores, TILE, self.scale, self.visible);
    }
}
