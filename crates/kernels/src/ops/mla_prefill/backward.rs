//! Backward on the CPU (FlashAttention-2's equations): one task per sequence and head, which recomputes the
//! probabilities from the log-sum-exp tile by tile.
//!   D = rowsum(dout * out), P = exp(S - lse), dV = P^T dout, dS = P * (dout V^T - D) * scale, dQ = dS K, dK = dS^T Q.
//! Query tiles are walked in order and, in each, key tiles in order, so every sum has a fixed order. dK and dV of the
//! whole sequence stay in f32 until the end; the rope part of dK goes to a plane per head, and the planes are summed
//! in head order afterwards.

use super::cpu::{Disjoint, QueryTile, gather, gather_keys, padded_widths, query_tiles, scores_of};
use super::tile::{self, Product, TILE, cut, padded};
use super::{Backward, Problem};
use crate::isa::{Job, Lanes, fma};
use crate::math::exp_fused;
use crate::{AlignedVec, Cpu, Elem};

/// Keys per task of the sum over heads.
const ROWS: usize = 64;

/// See [`super::backward`].
pub fn backward<T: Elem>(cpu: &Cpu, x: &Problem<'_, T>, b: Backward<'_>) {
    let s = &x.shape;
    let nk = x.cu_k[x.cu_k.len() - 1] as usize;
    let plane = nk * s.rope;
    let mut pe_planes = AlignedVec::<f32>::zeros(s.heads * plane);
    let (out, lse, dout) = (T::of(b.out), b.lse.f32(), T::of(b.dout));
    let (dq, dkv_up) = (Disjoint::new(T::of_mut(b.dq)), Disjoint::new(T::of_mut(b.dkv_up)));
    let pe = Disjoint::new(&mut pe_planes);
    cpu.for_each((x.cu_q.len() - 1) * s.heads, |i| {
        let (seq, head) = (i / s.heads, i % s.heads);
        cpu.isa().run(Task { x, seq, head, out, lse, dout, dq: &dq, dkv_up: &dkv_up, pe: &pe });
    });
    if plane == 0 {
        return;
    }
    let dk_pe = &mut T::of_mut(b.dk_pe)[..(nk - 1) * b.dk_pe_stride + s.rope];
    cpu.chunks_mut(dk_pe, ROWS * b.dk_pe_stride, |i, rows| {
        for (j, row) in rows.chunks_mut(b.dk_pe_stride).enumerate() {
            for (c, o) in row[..s.rope].iter_mut().enumerate() {
                let at = (i * ROWS + j) * s.rope + c;
                *o = T::round((0..s.heads).map(|h| pe_planes[h * plane + at]).sum());
            }
        }
    });
}

/// One task: a sequence of one head.
struct Task<'a, T> {
    x: &'a Problem<'a, T>,
    seq: usize,
    head: usize,
    out: &'a [T],
    lse: &'a [f32],
    dout: &'a [T],
    dq: &'a Disjoint<'a, T>,
    dkv_up: &'a Disjoint<'a, T>,
    pe: &'a Disjoint<'a, f32>,
}

/// The f32 tiles of a task.
struct Tiles<'a> {
    /// `[queries][dp]`.
    query: &'a mut [f32],
    /// `[dp][queries]`.
    query_t: &'a mut [f32],
    /// `[queries][wp]`.
    dout: &'a mut [f32],
    /// `[wp][queries]`.
    dout_t: &'a mut [f32],
    /// `[queries][dp]`.
    dq: &'a mut [f32],
    /// `[keys][dp]`.
    key: &'a mut [f32],
    /// `[keys][wp]`.
    value: &'a mut [f32],
    /// `[keys][queries]`: scores, then probabilities.
    p: &'a mut [f32],
    /// `[keys][queries]`: gradients of the probabilities, then of the scores.
    ds: &'a mut [f32],
    /// Log-sum-exp of each query.
    lse: [f32; TILE],
    /// rowsum(dout * out) of each query.
    d: [f32; TILE],
}

impl<T: Elem> Job for Task<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (dp, wp) = padded_widths(&self.x.shape);
        let keys = self.keys().len();
        let len = keys * (dp + wp) + TILE * (4 * dp + 3 * wp + 2 * TILE);
        tile::with_scratch(
            len,
            #[inline(always)]
            |scratch| self.walk::<V>(scratch),
        );
    }
}

impl<T: Elem> Task<'_, T> {
    fn keys(&self) -> std::ops::Range<usize> {
        self.x.cu_k[self.seq] as usize..self.x.cu_k[self.seq + 1] as usize
    }

    #[inline(always)]
    fn walk<V: Lanes>(&self, mut scratch: &mut [f32]) {
        let (dp, wp) = padded_widths(&self.x.shape);
        let keys = self.keys().len();
        let dk = cut(&mut scratch, keys * dp);
        let dv = cut(&mut scratch, keys * wp);
        dk.fill(0.0);
        dv.fill(0.0);
        let mut tiles = Tiles {
            query: cut(&mut scratch, TILE * dp),
            query_t: cut(&mut scratch, TILE * dp),
            dout: cut(&mut scratch, TILE * wp),
            dout_t: cut(&mut scratch, TILE * wp),
            dq: cut(&mut scratch, TILE * dp),
            key: cut(&mut scratch, TILE * dp),
            value: cut(&mut scratch, TILE * wp),
            p: cut(&mut scratch, TILE * TILE),
            ds: cut(&mut scratch, TILE * TILE),
            lse: [0.0; TILE],
            d: [0.0; TILE],
        };
        for t in query_tiles(self.x, self.seq) {
            self.load_queries(t, &mut tiles);
            for base in (0..t.keys).step_by(TILE) {
                let nk = (t.keys - base).min(TILE);
                gather_keys(self.x, self.head, t.k + base, nk, tiles.key, tiles.value);
                self.score_gradients::<V>(t, base, nk, &mut tiles);
                self.accumulate::<V>(t, nk, &mut tiles, &mut dk[base * dp..], &mut dv[base * wp..]);
            }
            self.store_queries(t, tiles.dq);
        }
        self.store_keys(dk, dv);
    }

    /// Queries and output gradients of one tile, both ways round, and what the softmax's gradient needs of them.
    #[inline(always)]
    fn load_queries(&self, t: QueryTile, tiles: &mut Tiles<'_>) {
        let s = &self.x.shape;
        let (d, (dp, wp)) = (s.nope + s.rope, padded_widths(s));
        let at = t.q * s.heads + self.head;
        gather(&self.x.q[at * d..], s.heads * d, d, t.nq, dp, tiles.query);
        gather(&self.dout[at * s.v..], s.heads * s.v, s.v, t.nq, wp, tiles.dout);
        tile::transpose(tiles.query, t.nq, dp, tiles.query_t);
        tile::transpose(tiles.dout, t.nq, wp, tiles.dout_t);
        tiles.dq[..t.nq * dp].fill(0.0);
        for q in 0..t.nq {
            let out = &self.out[(at + q * s.heads) * s.v..][..s.v];
            tiles.d[q] = tile::dot(out, &tiles.dout[q * wp..q * wp + s.v]);
            tiles.lse[q] = self.lse[at + q * s.heads];
        }
    }

    /// p = P and ds = dS of the tile that is loaded; both are exactly 0 where a query does not see a key.
    #[inline(always)]
    fn score_gradients<V: Lanes>(&self, t: QueryTile, base: usize, nk: usize, tiles: &mut Tiles<'_>) {
        let s = &self.x.shape;
        let (dp, wp) = padded_widths(s);
        let columns = padded(t.nq);
        scores_of::<V>(nk, columns, s.nope + s.rope, tiles.key, dp, tiles.query_t, tiles.p);
        scores_of::<V>(nk, columns, s.v, tiles.value, wp, tiles.dout_t, tiles.ds);
        let visible = t.visible(base);
        let (p, _) = tiles.p.as_chunks_mut::<TILE>();
        let (ds, _) = tiles.ds.as_chunks_mut::<TILE>();
        for (j, (p, ds)) in p.iter_mut().zip(ds).enumerate().take(nk) {
            for q in 0..columns {
                let seen = (j as i32) < visible[q];
                let weight = exp_fused(V::FMA, fma(V::FMA, p[q], s.scale, -tiles.lse[q]));
                let weight = if seen { weight } else { 0.0 };
                p[q] = weight;
                ds[q] = if seen { weight * (ds[q] - tiles.d[q]) * s.scale } else { 0.0 };
            }
        }
    }

    /// dV += P^T dout, dK += dS^T Q, dQ += dS K.
    #[inline(always)]
    fn accumulate<V: Lanes>(&self, t: QueryTile, nk: usize, tiles: &mut Tiles<'_>, dk: &mut [f32], dv: &mut [f32]) {
        let (dp, wp) = padded_widths(&self.x.shape);
        let to_keys = |a, b, width| Product {
            m: nk,
            n: width,
            k: t.nq,
            a,
            a_row: TILE,
            a_col: 1,
            b,
            b_row: width,
            c_row: width,
            add: true,
        };
        to_keys(&*tiles.p, &*tiles.dout, wp).write::<V>(dv);
        to_keys(&*tiles.ds, &*tiles.query, dp).write::<V>(dk);
        Product {
            m: t.nq,
            n: dp,
            k: nk,
            a: tiles.ds,
            a_row: 1,
            a_col: TILE,
            b: tiles.key,
            b_row: dp,
            c_row: dp,
            add: true,
        }
        .write::<V>(tiles.dq);
    }

    #[inline(always)]
    fn store_queries(&self, t: QueryTile, dq: &[f32]) {
        let s = &self.x.shape;
        let (d, (dp, _)) = (s.nope + s.rope, padded_widths(s));
        for q in 0..t.nq {
            let at = ((t.q + q) * s.heads + self.head) * d;
            // SAFETY: a query and head belong to one task.
            let row = unsafe { self.dq.part(at, d) };
            tile::round_scaled(&dq[q * dp..q * dp + d], 1.0, row);
        }
    }

    #[inline(always)]
    fn store_keys(&self, dk: &[f32], dv: &[f32]) {
        let s = &self.x.shape;
        let (dp, wp) = padded_widths(s);
        let nk = self.x.cu_k[self.x.cu_k.len() - 1] as usize;
        for (j, key) in self.keys().enumerate() {
            let at = (key * s.heads + self.head) * (s.nope + s.v);
            // SAFETY: a key and head belong to one task.
            let (row, pe) =
                unsafe { (self.dkv_up.part(at, s.nope + s.v), self.pe.part((self.head * nk + key) * s.rope, s.rope)) };
            tile::round_scaled(&dk[j * dp..j * dp + s.nope], 1.0, &mut row[..s.nope]);
            tile::round_scaled(&dv[j * wp..j * wp + s.v], 1.0, &mut row[s.nope..]);
            pe.copy_from_slice(&dk[j * dp + s.nope..j * dp + s.nope + s.rope]);
        }
    }
}
