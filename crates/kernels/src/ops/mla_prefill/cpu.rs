//! Forward on the CPU: one task per sequence, query tile and head. Scores of a tile are keys (rows) times queries
//! (lanes); weights then are the rows and values the lanes, so that the output lies as `[query][v]`. With operands of
//! bf16 the probabilities are rounded to bf16 for that product, their sum is not.

use super::Problem;
use super::panels::{Ahead, Keys, LEAST_GROUP, Panels, by_element, by_token, gather, store, values_at};
use super::queries::{QUERIES, QueryTile, Seen, query_tiles, spans};
use super::scratch::{cut, with_scratch};
use super::weigh::{Softmax, Weigh};
use crate::buffer::Disjoint;
use crate::isa::{Isa, vectorised};
use crate::panel::{Rows, WIDEST_GROUP};
use crate::{Cpu, Elem};

/// Keys of a tile: how often the maxima, and with them the sums, may move.
const KEYS: usize = 64;

/// Fewest queries of a tile, but for what is left of a sequence.
const LEAST_QUERIES: usize = 64;

/// Tasks for each core that keep all of them busy to the end.
const TASKS: usize = 4;

/// See [`super::forward`].
pub fn forward<T: Elem>(cpu: &Cpu, x: &Problem<'_>, out: &mut [T], lse: &mut [f32]) {
    let heads = x.shape.heads;
    // Smaller tiles where large ones would leave cores without work.
    let tasks = |most: usize| x.q.len() / (x.shape.nope + x.shape.rope) / most;
    let mut most = QUERIES;
    while most > LEAST_QUERIES && tasks(most) < TASKS * cpu.threads() {
        most /= 2;
    }
    let mut tiles: Vec<_> = (0..x.cu_q.len() - 1).flat_map(|s| query_tiles(x, s, most)).collect();
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
        let (key_cells, group, w) = (p.cells(s.nope + s.rope), p.group, s.v.next_multiple_of(p.group));
        let (queries, cells) = (self.tile.nq.next_multiple_of(group), p.cells(KEYS));
        let lanes = queries * key_cells + w * cells;
        with_scratch(lanes + KEYS * key_cells + cells * queries + KEYS * group + w * queries, |mut scratch| {
            let scratch = &mut scratch;
            self.walk(Parts {
                query: bytemuck::cast_slice_mut(cut(scratch, queries * key_cells)),
                values: bytemuck::cast_slice_mut(cut(scratch, w * cells)),
                keys: bytemuck::cast_slice_mut(cut(scratch, KEYS * key_cells)),
                weights: bytemuck::cast_slice_mut(cut(scratch, cells * queries)),
                scores: cut(scratch, KEYS * group),
                sums: cut(scratch, w * queries),
            });
        });
    }

    fn walk(&self, mut parts: Parts<'_>) {
        let (x, t, s, p) = (self.x, self.tile, &self.x.shape, &self.panels);
        let d = s.nope + s.rope;
        let mut ahead = Ahead::new();
        ahead.rows(self.out.at((t.q * s.heads + self.head) * s.v), (t.nq, s.heads * s.v), s.v);
        let token = by_token(x.q, (t.q * s.heads + self.head) * d, s.heads * d);
        p.lanes(token, t.nq, (d, p.cells(d)), parts.query);
        let mut softmax = Softmax::new();
        parts.sums.fill(0.0);
        for base in (0..t.keys).step_by(KEYS) {
            if base + KEYS >= t.keys && self.head + 1 < s.heads {
                // This core's next task, mostly.
                ahead.keys::<T>(x, Keys { h: self.head + 1, at: t.k, n: t.keys.min(KEYS) });
                ahead.tokens::<T>(x.q, (t.q, self.head + 1, s.heads), t.nq, d);
            }
            self.keys(base, &mut softmax, &mut parts, &mut ahead);
        }
        let rows = t.nq.next_multiple_of(p.group);
        let at = t.q * s.heads + self.head;
        let mut factors = [0.0; QUERIES];
        for (q, factor) in factors[..t.nq].iter_mut().enumerate() {
            let lse;
            (*factor, lse) = softmax.finish(q);
            // SAFETY: a query and head belong to one task.
            unsafe { self.lse.part(at + q * s.heads, 1)[0] = lse }
        }
        let (sums, to) = ((&*parts.sums, p.group, rows), (self.out, at * s.v, s.heads * s.v));
        store(p.isa, sums, &factors[..t.nq], s.v, to);
    }

    /// Takes in the keys from `base` on.
    fn keys(&self, base: usize, softmax: &mut Softmax, parts: &mut Parts<'_>, ahead: &mut Ahead) {
        let (x, t, s, p) = (self.x, self.tile, &self.x.shape, &self.panels);
        let (nk, group, key_cells) = ((t.keys - base).min(KEYS), p.group, p.cells(s.nope + s.rope));
        gather::<T>(p, x, Keys { h: self.head, at: t.k + base, n: nk }, parts.keys, &mut []);
        ahead.keys::<T>(x, Keys { h: self.head, at: t.k + base + nk, n: (t.keys - base - nk).min(KEYS) });
        let (at, ld) = values_at(s, self.head, t.k + base);
        let cells = p.cells(nk);
        p.lanes(by_element(x.kv_up, at, ld), s.v, (nk, cells), parts.values);
        let rows = t.nq.next_multiple_of(group);
        let mut seen = [Seen::default(); QUERIES / LEAST_GROUP];
        let seen = &mut seen[..t.nq.div_ceil(group)];
        for (g, seen) in seen.iter_mut().enumerate() {
            *seen = t.seen(g, group, base, nk);
            if seen.keys == 0 {
                continue;
            }
            let query = &parts.query[g * group * key_cells..];
            let keys = (&*parts.keys, Rows::Along(key_cells));
            p.multiply(query, keys, (seen.keys, key_cells), parts.scores, false, ahead);
            p.isa.run(Weigh {
                softmax,
                at: g * group,
                scores: parts.scores,
                scale: s.scale,
                seen: *seen,
                pairs: p.pairs(),
                apart: rows,
                weights: &mut parts.weights[g * group..],
            });
        }
        for (from, to, keys) in spans(seen) {
            let (from, to) = (from * group, (to * group).min(t.nq));
            let weights = (&parts.weights[from..], Rows::Across(rows));
            let alpha = &softmax.alpha[from..to];
            let grew = alpha.iter().any(|alpha| *alpha != 1.0);
            for (values, sums) in parts.values.chunks(cells * group).zip(parts.sums.chunks_mut(rows * group)) {
                let sums = &mut sums[from * group..to * group];
                if grew {
                    rescale(p.isa, sums, alpha);
                }
                p.multiply(values, weights, (to - from, p.cells(keys)), sums, true, ahead);
            }
        }
    }
}

/// Scratch of a task.
struct Parts<'a> {
    /// Lanes: queries; k: elements.
    query: &'a mut [u32],
    /// Lanes: elements; k: keys.
    values: &'a mut [u32],
    /// Rows: keys; k: elements.
    keys: &'a mut [u32],
    /// `[cell of keys][query]`.
    weights: &'a mut [u32],
    /// `[keys][lane]` of a group of queries.
    scores: &'a mut [f32],
    /// `[group of elements][query][lane]`.
    sums: &'a mut [f32],
}

vectorised! {
    /// Multiplies every row by its alpha.
    fn rescale(isa: Isa, sums: &mut [f32], alpha: &[f32]) {
        let group = sums.len() / alpha.len();
        for (row, alpha) in sums.chunks_exact_mut(group).zip(alpha) {
            if let Some(row) = row.first_chunk_mut::<WIDEST_GROUP>() {
                row.iter_mut().for_each(|s| *s *= alpha);
            } else {
                row.iter_mut().for_each(|s| *s *= alpha);
            }
        }
    }
}
