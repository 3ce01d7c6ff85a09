//! Backward on the CPU (FlashAttention-2's equations): one task per sequence and head, which recomputes the
//! probabilities from the log-sum-exp tile by tile.
//!   D = rowsum(dout * out), P = exp(S - lse), dV = P^T dout, dS = P * (dout V^T - D) * scale, dQ = dS K, dK = dS^T Q.
//! Query tiles are walked in order and, in each, key tiles in order, so every sum has a fixed order. dK and dV of the
//! whole sequence stay in f32 until the end; the rope part of dK goes to a plane per head, and the planes are summed
//! in head order afterwards.

use super::cpu::{Disjoint, QueryTile, query_tiles};
use super::panels::{Panels, by_element, by_token, gather_keys, room, round_scaled, turn, values_at};
use super::tile::{self, TILE, cut};
use super::{Backward, Problem, Shape};
use crate::isa::{Isa, Job, Lanes, fma, vectorised};
use crate::math::exp_fused;
use crate::{Cpu, Elem, View};

/// Keys per task of the sum over heads.
const ROWS: usize = 64;

/// See [`super::backward`].
pub fn backward<T: Elem>(cpu: &Cpu, x: &Problem<'_>, b: Backward<'_>) {
    let s = &x.shape;
    let nk = x.cu_k[x.cu_k.len() - 1] as usize;
    let plane = nk * s.rope;
    let mut pe_planes = cpu.empty::<f32>(s.heads * plane);
    let (dq, dkv_up) = (Disjoint::new(T::of_mut(b.dq)), Disjoint::new(T::of_mut(b.dkv_up)));
    let pe = Disjoint::new(&mut pe_planes);
    let (panels, lse) = (Panels::new(cpu, T::DTYPE), b.lse.f32());
    cpu.for_each((x.cu_q.len() - 1) * s.heads, |i| {
        let (seq, head) = (i / s.heads, i % s.heads);
        Task { x, panels, seq, head, out: b.out, lse, dout: b.dout, dq: &dq, dkv_up: &dkv_up, pe: &pe }.run();
    });
    sum_heads(cpu, x, &pe_planes, T::of_mut(b.dk_pe), b.dk_pe_stride);
}

/// Sums the heads' planes `[Nk, R]` into dk_pe, in the order of heads.
pub fn sum_heads<T: Elem>(cpu: &Cpu, x: &Problem<'_>, planes: &[f32], dk_pe: &mut [T], stride: usize) {
    let (rope, nk) = (x.shape.rope, x.cu_k[x.cu_k.len() - 1] as usize);
    let plane = nk * rope;
    if plane == 0 {
        return;
    }
    let dk_pe = &mut dk_pe[..(nk - 1) * stride + rope];
    cpu.chunks_mut(dk_pe, ROWS * stride, |i, rows| {
        for (j, row) in rows.chunks_mut(stride).enumerate() {
            sum_planes(cpu.isa(), planes, plane, (i * ROWS + j) * rope, &mut row[..rope]);
        }
    });
}

/// Columns that are summed at once.
const COLUMNS: usize = 64;

vectorised! {
    /// Sums the planes' elements from `at` on, in the order of the planes.
    fn sum_planes<T: Elem>(isa: Isa, planes: &[f32], plane: usize, at: usize, out: &mut [T]) {
        for (c, out) in out.chunks_mut(COLUMNS).enumerate() {
            let mut sums = [0.0f32; COLUMNS];
            for plane in planes.chunks_exact(plane) {
                sums.iter_mut().zip(&plane[at + c * COLUMNS..][..out.len()]).for_each(|(s, x)| *s += x);
            }
            out.iter_mut().zip(sums).for_each(|(o, s)| *o = T::round(s));
        }
    }
}

/// One task: a sequence of one head.
struct Task<'a, T> {
    x: &'a Problem<'a>,
    panels: Panels,
    seq: usize,
    head: usize,
    out: View<'a>,
    lse: &'a [f32],
    dout: View<'a>,
    dq: &'a Disjoint<'a, T>,
    dkv_up: &'a Disjoint<'a, T>,
    pe: &'a Disjoint<'a, f32>,
}

/// Sizes of a task's scratch.
#[derive(Clone, Copy)]
struct Sizes {
    /// P + R, and room for it.
    d: usize,
    dp: usize,
    /// W, and room for it.
    w: usize,
    wp: usize,
    /// Room for the sequence's keys.
    keys: usize,
}

impl Sizes {
    fn new(s: &Shape, keys: usize) -> Self {
        let d = s.nope + s.rope;
        Self { d, dp: room(d), w: s.v, wp: room(s.v), keys: keys.next_multiple_of(TILE) }
    }

    /// Words of the largest panel of rows.
    fn rows(&self, p: &Panels) -> usize {
        let by_token = p.rows_len(TILE, self.d).max(p.rows_len(TILE, self.w)).max(p.rows_len(TILE, TILE));
        by_token.max(p.rows_len(self.d, TILE))
    }

    /// Words of all the scratch.
    fn all(&self, p: &Panels) -> usize {
        let Self { d, dp, w, wp, keys } = *self;
        let queries = p.lanes_len(TILE, d) + p.lanes_len(TILE, w);
        let elements = p.lanes_len(dp, TILE) + p.lanes_len(wp, TILE) + p.lanes_len(TILE, TILE);
        queries + elements + self.rows(p) + keys * (dp + wp) + TILE * (2 * TILE + 2 * dp)
    }
}

/// Bytes of what grows with the sequence.
pub fn bytes_of_keys(s: &Shape, keys: usize) -> usize {
    let Sizes { dp, wp, keys, .. } = Sizes::new(s, keys);
    keys * (dp + wp) * size_of::<f32>()
}

/// The panels and tiles of a task.
struct Tiles<'a> {
    /// Lanes: queries; k: elements.
    query: &'a mut [u32],
    dout: &'a mut [u32],
    /// Lanes: elements; k: queries.
    query_t: &'a mut [u32],
    dout_t: &'a mut [u32],
    /// Lanes: queries; k: keys.
    ds_lanes: &'a mut [u32],
    /// Rows of whatever is multiplied next.
    rows: &'a mut [u32],
    /// `[keys][queries]`: scores, then probabilities.
    p: &'a mut [f32],
    /// `[keys][queries]`: gradients of the probabilities, then of the scores.
    ds: &'a mut [f32],
    /// `[elements][queries]`.
    dq: &'a mut [f32],
    /// `[queries][elements]`.
    turned: &'a mut [f32],
    /// Log-sum-exp of each query.
    lse: [f32; TILE],
    /// rowsum(dout * out) of each query.
    d: [f32; TILE],
}

impl<T: Elem> Task<'_, T> {
    fn keys(&self) -> std::ops::Range<usize> {
        self.x.cu_k[self.seq] as usize..self.x.cu_k[self.seq + 1] as usize
    }

    fn run(&self) {
        let sizes = Sizes::new(&self.x.shape, self.keys().len());
        tile::with_scratch(sizes.all(&self.panels), |scratch| self.walk(sizes, scratch));
    }

    fn walk(&self, sizes: Sizes, mut scratch: &mut [f32]) {
        let (p, Sizes { d, dp, w, wp, keys }) = (&self.panels, sizes);
        let scratch = &mut scratch;
        let dk = cut(scratch, keys * dp);
        let dv = cut(scratch, keys * wp);
        dk.fill(0.0);
        dv.fill(0.0);
        let mut tiles = Tiles {
            query: bytemuck::cast_slice_mut(cut(scratch, p.lanes_len(TILE, d))),
            dout: bytemuck::cast_slice_mut(cut(scratch, p.lanes_len(TILE, w))),
            query_t: bytemuck::cast_slice_mut(cut(scratch, p.lanes_len(dp, TILE))),
            dout_t: bytemuck::cast_slice_mut(cut(scratch, p.lanes_len(wp, TILE))),
            ds_lanes: bytemuck::cast_slice_mut(cut(scratch, p.lanes_len(TILE, TILE))),
            rows: bytemuck::cast_slice_mut(cut(scratch, sizes.rows(p))),
            p: cut(scratch, TILE * TILE),
            ds: cut(scratch, TILE * TILE),
            dq: cut(scratch, TILE * dp),
            turned: cut(scratch, TILE * dp),
            lse: [0.0; TILE],
            d: [0.0; TILE],
        };
        let mut keys = vec![T::round(0.0); TILE * d];
        for t in query_tiles(self.x, self.seq) {
            self.load_queries(t, sizes, &mut tiles);
            for base in (0..t.keys).step_by(TILE) {
                let nk = (t.keys - base).min(TILE);
                gather_keys(self.x, self.head, t.k + base, nk, &mut keys);
                self.score_gradients(t, base, (&keys, nk), &mut tiles);
                self.accumulate(t, (&keys, nk), sizes, &mut tiles, &mut dk[base * dp..], &mut dv[base * wp..]);
            }
            turn(p.isa, tiles.dq, d, tiles.turned);
            self.store_queries(t, tiles.turned);
        }
        self.store_keys(dk, dv);
    }

    /// Queries and output gradients of one tile, both ways round, and what the softmax's gradient needs of them.
    fn load_queries(&self, t: QueryTile, Sizes { d, dp, w, wp, .. }: Sizes, tiles: &mut Tiles<'_>) {
        let (p, heads) = (&self.panels, self.x.shape.heads);
        let at = t.q * heads + self.head;
        p.lanes(by_token(self.x.q, at * d, heads * d), t.nq, TILE, d, tiles.query);
        p.lanes(by_token(self.dout, at * w, heads * w), t.nq, TILE, w, tiles.dout);
        p.lanes(by_element(self.x.q, at * d, heads * d), d, dp, t.nq, tiles.query_t);
        p.lanes(by_element(self.dout, at * w, heads * w), w, wp, t.nq, tiles.dout_t);
        tiles.dq.fill(0.0);
        let (out, dout) = (T::of(self.out), T::of(self.dout));
        for q in 0..t.nq {
            let at = at + q * heads;
            tiles.d[q] = dot(p.isa, &out[at * w..][..w], &dout[at * w..][..w]);
            tiles.lse[q] = self.lse[at];
        }
    }

    /// p = P and ds = dS of the tile that is loaded; both are exactly 0 where a query does not see a key.
    fn score_gradients(&self, t: QueryTile, base: usize, (keys, nk): (&[T], usize), tiles: &mut Tiles<'_>) {
        let (s, p) = (&self.x.shape, &self.panels);
        let d = s.nope + s.rope;
        p.rows(by_token(T::view(keys), 0, d), nk, d, tiles.rows);
        p.multiply((tiles.query, TILE), (tiles.rows, nk), d, tiles.p, false);
        let (at, ld) = values_at(s, self.head, t.k + base);
        p.rows(by_token(self.x.kv_up, at, ld), nk, s.v, tiles.rows);
        p.multiply((tiles.dout, TILE), (tiles.rows, nk), s.v, tiles.ds, false);
        p.isa.run(ScoreGradients {
            p: &mut tiles.p[..nk * TILE],
            ds: &mut tiles.ds[..nk * TILE],
            lse: &tiles.lse,
            d: &tiles.d,
            visible: &seen(t, base),
            scale: s.scale,
        });
    }

    /// dV += P^T dout, dK += dS^T Q, dQ += dS K.
    fn accumulate(
        &self,
        t: QueryTile,
        (keys, nk): (&[T], usize),
        Sizes { d, dp, wp, .. }: Sizes,
        tiles: &mut Tiles<'_>,
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let p = &self.panels;
        p.rows(by_token(View::F32(tiles.p), 0, TILE), nk, t.nq, tiles.rows);
        p.multiply((tiles.dout_t, wp), (tiles.rows, nk), t.nq, dv, true);
        p.rows(by_token(View::F32(tiles.ds), 0, TILE), nk, t.nq, tiles.rows);
        p.multiply((tiles.query_t, dp), (tiles.rows, nk), t.nq, dk, true);
        p.lanes(by_element(View::F32(tiles.ds), 0, TILE), TILE, TILE, nk, tiles.ds_lanes);
        p.rows(by_element(T::view(keys), 0, d), d, nk, tiles.rows);
        p.multiply((tiles.ds_lanes, TILE), (tiles.rows, d), nk, tiles.dq, true);
    }

    fn store_queries(&self, t: QueryTile, dq: &[f32]) {
        let s = &self.x.shape;
        let d = s.nope + s.rope;
        for (q, row) in dq.chunks_exact(room(d)).enumerate().take(t.nq) {
            let at = ((t.q + q) * s.heads + self.head) * d;
            // SAFETY: a query and head belong to one task.
            let to = unsafe { self.dq.part(at, d) };
            round_scaled(self.panels.isa, &row[..d], 1.0, to);
        }
    }

    fn store_keys(&self, dk: &[f32], dv: &[f32]) {
        let s = &self.x.shape;
        let (d, isa) = (s.nope + s.rope, self.panels.isa);
        let nk = self.x.cu_k[self.x.cu_k.len() - 1] as usize;
        for ((key, dk), dv) in self.keys().zip(dk.chunks_exact(room(d))).zip(dv.chunks_exact(room(s.v))) {
            let at = (key * s.heads + self.head) * (s.nope + s.v);
            // SAFETY: a key and head belong to one task.
            let (row, pe) =
                unsafe { (self.dkv_up.part(at, s.nope + s.v), self.pe.part((self.head * nk + key) * s.rope, s.rope)) };
            round_scaled(isa, &dk[..s.nope], 1.0, &mut row[..s.nope]);
            round_scaled(isa, &dv[..s.v], 1.0, &mut row[s.nope..]);
            pe.copy_from_slice(&dk[s.nope..d]);
        }
    }
}

/// As `visible`, but nothing for queries that the tile does not have.
fn seen(t: QueryTile, base: usize) -> [i32; TILE] {
    let mut visible = t.visible(base);
    visible[t.nq..].fill(0);
    visible
}

/// From scores and gradients of the probabilities to the probabilities and the gradients of the scores.
struct ScoreGradients<'a> {
    p: &'a mut [f32],
    ds: &'a mut [f32],
    lse: &'a [f32; TILE],
    d: &'a [f32; TILE],
    visible: &'a [i32; TILE],
    scale: f32,
}

impl Job for ScoreGradients<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (p, _) = self.p.as_chunks_mut::<TILE>();
        let (ds, _) = self.ds.as_chunks_mut::<TILE>();
        for (j, (p, ds)) in p.iter_mut().zip(ds).enumerate() {
            for q in 0..TILE {
                let seen = (j as i32) < self.visible[q];
                let weight = exp_fused(V::FMA, fma(V::FMA, p[q], self.scale, -self.lse[q]));
                let weight = if seen { weight } else { 0.0 };
                p[q] = weight;
                ds[q] = if seen { weight * (ds[q] - self.d[q]) * self.scale } else { 0.0 };
            }
        }
    }
}

vectorised! {
    /// a . b in 16 partial sums, added in order.
    pub fn dot<T: Elem>(isa: Isa, a: &[T], b: &[T]) -> f32 {
        let mut sums = [0.0f32; 16];
        let (a_full, a_rest) = a.as_chunks::<16>();
        let (b_full, b_rest) = b.as_chunks::<16>();
        for (a, b) in a_full.iter().zip(b_full) {
            for i in 0..16 {
                sums[i] += a[i].f32() * b[i].f32();
            }
        }
        for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
            sums[i] += a.f32() * b.f32();
        }
        sums.iter().sum()
    }
}
