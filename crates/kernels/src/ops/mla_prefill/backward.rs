//! Backward on the CPU (FlashAttention-2's equations): one task per sequence and head, which recomputes the
//! probabilities from the log-sum-exp tile by tile.
//!   D = rowsum(dout * out), P = exp(S - lse), dV = P^T dout, dS = P * (dout V^T - D) * scale, dQ = dS K, dK = dS^T Q.
//! Query tiles are walked in order and, in each, key tiles in order, so every sum has a fixed order. dK and dV of the
//! whole sequence stay in f32 until the end; the rope part of dK goes to a plane per head, and the planes are summed
//! in head order afterwards.

use super::backward_tiles::{CACHED, KEYS, Sizes, Tiles};
use super::panels::{Ahead, Keys, LEAST_GROUP, Panels, by_element, by_token, gather, gathered, store};
use super::queries::{QUERIES, QueryTile, Seen, query_tiles, spans};
use super::scratch::with_scratch;
use super::weigh::Gradients;
use super::{Backward, Problem};
use crate::buffer::Disjoint;
use crate::isa::{Isa, SQUARE, transpose, vectorised};
use crate::panel::Rows;
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

impl<T: Elem> Task<'_, T> {
    fn keys(&self) -> std::ops::Range<usize> {
        self.x.cu_k[self.seq] as usize..self.x.cu_k[self.seq + 1] as usize
    }

    fn run(&self) {
        let queries = self.x.cu_q[self.seq + 1] - self.x.cu_q[self.seq];
        let sizes = Sizes::new(&self.x.shape, &self.panels, queries as usize, self.keys().len());
        let len = Tiles::lens(&sizes, &self.panels).iter().sum();
        with_scratch(len, |scratch| self.walk(sizes, Tiles::new(&sizes, &self.panels, scratch)));
    }

    fn walk(&self, sizes: Sizes, mut tiles: Tiles<'_>) {
        tiles.dk.fill(0.0);
        tiles.dv.fill(0.0);
        let ahead = &mut Ahead::new();
        for t in query_tiles(self.x, self.seq, sizes.queries) {
            self.load_queries(t, sizes, &mut tiles);
            self.ask_after(t, sizes, ahead);
            for base in (0..t.keys).step_by(KEYS) {
                let nk = (t.keys - base).min(KEYS);
                self.load_keys(Keys { h: self.head, at: t.k + base, n: nk }, sizes, &mut tiles);
                self.ask_sums(base, nk, sizes, &tiles, ahead);
                let mut seen = [Seen::default(); QUERIES / LEAST_GROUP];
                let seen = &mut seen[..t.nq.div_ceil(self.panels.group)];
                for (g, seen) in seen.iter_mut().enumerate() {
                    *seen = t.seen(g, self.panels.group, base, nk);
                    if seen.keys > 0 {
                        self.score_gradients(g, *seen, sizes, &mut tiles, ahead);
                    }
                }
                ahead.keys::<T>(self.x, Keys { h: self.head, at: t.k + base + nk, n: (t.keys - base - nk).min(KEYS) });
                self.accumulate_keys(base, seen, sizes, &mut tiles, ahead);
                self.accumulate_queries(t, nk, seen, sizes, &mut tiles, ahead);
            }
            self.store_queries(t, sizes, tiles.dq);
        }
        self.store_keys(sizes, tiles.dk, tiles.dv);
    }

    /// Asks for what comes after a tile: its gradients' rows, the next tile, or the next head's first.
    fn ask_after(&self, t: QueryTile, z: Sizes, ahead: &mut Ahead) {
        let heads = self.x.shape.heads;
        ahead.rows(self.dq.at((t.q * heads + self.head) * z.d), (t.nq, heads * z.d), z.d);
        let queries = self.x.cu_q[self.seq] as usize..self.x.cu_q[self.seq + 1] as usize;
        let (mut h, mut at) = (self.head, t.q + t.nq);
        if at == queries.end {
            let s = &self.x.shape;
            let up = s.nope + s.v;
            ahead.rows(self.dkv_up.at((t.k * heads + h) * up), (z.keys, heads * up), up);
            // This core's next task, mostly.
            (h, at) = (h + 1, queries.start);
            if h == heads {
                return;
            }
            ahead.keys::<T>(self.x, Keys { h, at: t.k, n: self.keys().len().min(KEYS) });
        }
        for (data, width) in [(self.x.q, z.d), (self.dout, z.w), (self.out, z.w)] {
            ahead.tokens::<T>(data, (at, h, heads), (queries.end - at).min(z.queries), width);
        }
    }

    /// Asks for the sums of some keys, if they may have left the second-level cache.
    fn ask_sums(&self, base: usize, nk: usize, z: Sizes, tiles: &Tiles<'_>, ahead: &mut Ahead) {
        if z.sums() * size_of::<f32>() <= CACHED {
            return;
        }
        let group = self.panels.group;
        for (sums, width) in [(&tiles.dv, z.w), (&tiles.dk, z.d)] {
            ahead.rows(sums[base * group..].as_ptr(), (width.div_ceil(group), z.keys * group), nk * group);
        }
    }

    /// Queries and output gradients of one tile, both ways round, and what the softmax's gradient needs of them.
    fn load_queries(&self, t: QueryTile, z: Sizes, tiles: &mut Tiles<'_>) {
        let (p, heads, Sizes { d, d_cells, w, w_cells, .. }) = (&self.panels, self.x.shape.heads, z);
        let at = t.q * heads + self.head;
        let q_cells = p.cells(t.nq.next_multiple_of(p.group));
        p.lanes(by_token(self.x.q, at * d, heads * d), t.nq, (d, d_cells), tiles.query);
        p.lanes(by_token(self.dout, at * w, heads * w), t.nq, (w, w_cells), tiles.dout);
        p.lanes(by_element(self.x.q, at * d, heads * d), d, (t.nq, q_cells), tiles.query_t);
        p.lanes(by_element(self.dout, at * w, heads * w), w, (t.nq, q_cells), tiles.dout_t);
        for sums in tiles.dq.chunks_exact_mut(z.queries * p.group) {
            sums[..t.nq * p.group].fill(0.0);
        }
        dots(p.isa, T::of(self.out), T::of(self.dout), (at * w, heads * w, w), &mut tiles.d[..t.nq]);
        for (q, lse) in tiles.lse[..t.nq].iter_mut().enumerate() {
            *lse = self.lse[at + q * heads];
        }
    }

    /// Keys, both ways round, and values.
    fn load_keys(&self, which: Keys, z: Sizes, tiles: &mut Tiles<'_>) {
        let p = &self.panels;
        gather::<T>(p, self.x, which, tiles.keys, tiles.values);
        p.lanes(gathered(p, tiles.keys, z.d_cells), z.d, (which.n, p.cells(which.n)), tiles.keys_t);
    }

    /// P and dS of a group of queries; both are exactly 0 where a query does not see a key.
    fn score_gradients(&self, g: usize, seen: Seen, z: Sizes, tiles: &mut Tiles<'_>, ahead: &mut Ahead) {
        let (s, p) = (&self.x.shape, &self.panels);
        let at = g * p.group;
        let keys = (&*tiles.keys, Rows::Along(z.d_cells));
        p.multiply(&tiles.query[at * z.d_cells..], keys, (seen.keys, z.d_cells), tiles.scores, false, ahead);
        let values = (&*tiles.values, Rows::Along(z.w_cells));
        p.multiply(&tiles.dout[at * z.w_cells..], values, (seen.keys, z.w_cells), tiles.dp, false, ahead);
        p.isa.run(Gradients {
            scores: tiles.scores,
            dp: tiles.dp,
            lse: &tiles.lse[at..],
            d: &tiles.d[at..],
            scale: s.scale,
            seen,
            pairs: p.pairs(),
            apart: z.queries,
            p: &mut tiles.p[p.cells(at)..],
            ds: if p.pairs() { &mut tiles.ds[p.cells(at)..] } else { &mut [] },
            ds_cells: &mut tiles.ds_cells[at..],
        });
    }

    /// dV += P^T dout, dK += dS^T Q: keys that the same groups see, from the first of these groups on.
    fn accumulate_keys(&self, base: usize, seen: &[Seen], z: Sizes, tiles: &mut Tiles<'_>, ahead: &mut Ahead) {
        let p = &self.panels;
        let (all, apart) = (p.cells(seen.len() * p.group), p.cells(z.queries));
        let ds = if p.pairs() { &*tiles.ds } else { &*tiles.ds_cells };
        let mut from = 0;
        for (g, seen) in seen.iter().enumerate() {
            let (first, to) = (p.cells(g * p.group), seen.keys);
            let mut add = |lanes: &[u32], rows: &[u32], sums: &mut [f32]| {
                let sums = sums.chunks_exact_mut(z.keys * p.group);
                for (lanes, sums) in lanes.chunks_exact(all * p.group).zip(sums) {
                    let (lanes, sums) = (&lanes[first * p.group..], &mut sums[(base + from) * p.group..]);
                    let rows = (&rows[from * apart + first..], Rows::Along(apart));
                    p.multiply(lanes, rows, (to - from, all - first), sums, true, ahead);
                }
            };
            if from < to {
                add(&tiles.dout_t[..z.w.next_multiple_of(p.group) * all], tiles.p, tiles.dv);
                add(&tiles.query_t[..z.d.next_multiple_of(p.group) * all], ds, tiles.dk);
                from = to;
            }
        }
    }

    /// dQ += dS K.
    fn accumulate_queries(
        &self,
        t: QueryTile,
        nk: usize,
        seen: &[Seen],
        z: Sizes,
        tiles: &mut Tiles<'_>,
        ahead: &mut Ahead,
    ) {
        let p = &self.panels;
        let lanes = z.d.next_multiple_of(p.group) * p.cells(nk);
        for (from, to, keys) in spans(seen) {
            let (from, to) = (from * p.group, (to * p.group).min(t.nq));
            let ds = (&tiles.ds_cells[from..], Rows::Across(z.queries));
            let groups = tiles.keys_t[..lanes].chunks_exact(p.cells(nk) * p.group);
            for (keys_t, sums) in groups.zip(tiles.dq.chunks_exact_mut(z.queries * p.group)) {
                p.multiply(keys_t, ds, (to - from, p.cells(keys)), &mut sums[from * p.group..], true, ahead);
            }
        }
    }

    fn store_queries(&self, t: QueryTile, z: Sizes, dq: &[f32]) {
        let (p, heads) = (&self.panels, self.x.shape.heads);
        let to = (self.dq, (t.q * heads + self.head) * z.d, heads * z.d);
        store(p.isa, (dq, p.group, z.queries), &[1.0; QUERIES][..t.nq], z.d, to);
    }

    fn store_keys(&self, z: Sizes, dk: &[f32], dv: &[f32]) {
        let (s, p) = (&self.x.shape, &self.panels);
        let nk = self.x.cu_k[self.x.cu_k.len() - 1] as usize;
        let (first, apart) = ((self.keys().start * s.heads + self.head) * (s.nope + s.v), s.heads * (s.nope + s.v));
        for i in (0..z.keys).step_by(QUERIES) {
            let ones = &[1.0; QUERIES][..QUERIES.min(z.keys - i)];
            let to = first + i * apart;
            store(p.isa, (&dk[i * p.group..], p.group, z.keys), ones, s.nope, (self.dkv_up, to, apart));
            store(p.isa, (&dv[i * p.group..], p.group, z.keys), ones, s.v, (self.dkv_up, to + s.nope, apart));
        }
        for (i, key) in self.keys().enumerate() {
            // SAFETY: a key and head belong to one task.
            let pe = unsafe { self.pe.part((self.head * nk + key) * s.rope, s.rope) };
            let mut e = s.nope;
            while e < z.d {
                let (group, lane) = (e / p.group, e % p.group);
                let some = (p.group - lane).min(z.d - e);
                let from = &dk[(group * z.keys + i) * p.group + lane..][..some];
                pe[e - s.nope..][..some].copy_from_slice(from);
                e += some;
            }
        }
    }
}

vectorised! {
    /// out . dout of rows of `w` from `at` on, `ld` apart: in 16 partial sums, added in order.
    fn dots<T: Elem>(isa: Isa, out: &[T], dout: &[T], rows: (usize, usize, usize), d: &mut [f32]) {
        let (at, ld, w) = rows;
        for (some, d) in d.chunks_mut(SQUARE).enumerate() {
            let (mut sums, mut turned) = ([0u32; SQUARE * SQUARE], [0u32; SQUARE * SQUARE]);
            for (q, sums) in sums.as_chunks_mut::<SQUARE>().0.iter_mut().enumerate().take(d.len()) {
                let at = at + (some * SQUARE + q) * ld;
                *sums = partial_sums(&out[at..][..w], &dout[at..][..w]).map(f32::to_bits);
            }
            transpose(isa, &sums, SQUARE, &mut turned, SQUARE, SQUARE);
            let mut all = [-0.0f32; SQUARE];
            for line in turned.as_chunks::<SQUARE>().0 {
                for q in 0..SQUARE {
                    all[q] += f32::from_bits(line[q]);
                }
            }
            d.copy_from_slice(&all[..d.len()]);
        }
    }
}

/// a . b in 16 partial sums.
#[inline(always)]
fn partial_sums<T: Elem>(a: &[T], b: &[T]) -> [f32; SQUARE] {
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
    sums
}

#[cfg(all(test, target_arch = "x86_64"))]
vectorised! {
    /// out . dout of one row.
    pub fn dot<T: Elem>(isa: Isa, a: &[T], b: &[T]) -> f32 {
        partial_sums(a, b).iter().sum()
    }
}
