//! Forward: `[keys][queries]` scores = keys (rows) times queries (columns); `[v][queries]` output += values (rows, turned)
//! times weights (columns).

use super::pack::{Rows, columns, round_turned, store_row, turned};
use super::weights::{Softmax, Weighing, hide, row, set_row};
use super::*;
use crate::buffer::Disjoint;
use crate::isa::{SQUARE, TileJob};
use crate::{Elem, bf16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups of keys whose weights wait for their product with the values, so that the output's sums are seldom read and
/// written.
const WAITING: usize = 8;
/// Bytes of keys and values that stay in the second-level cache while queries pass by.
const CACHED: usize = if cfg!(test) { 1 << 14 } else { 5 << 18 };
/// Groups of queries that pass by together where the keys do not fit.
const TOGETHER: usize = 8;

/// See [`super::super::forward`].
pub fn forward(cpu: &Cpu, x: &Problem<'_>, out: &mut [bf16], lse: &mut [f32]) {
    let (heads, count) = (x.shape.heads, x.cu_q.len() - 1);
    // Keys are packed for each task anew, so that a head is one where there are enough of them for the cores. How
    // queries are cut changes no bit.
    let pieces = cpu.threads().div_ceil((heads * count).max(1));
    let mut parts = Vec::new();
    for s in (0..count).map(|s| Sequence::new(x, s)) {
        let len = s.q_len.div_ceil(pieces).next_multiple_of(GROUP).max(GROUP);
        parts.extend((0..s.q_len).step_by(len).map(|from| (s, from..(from + len).min(s.q_len))));
    }
    // The longest first, so that none is left over at the end.
    parts.sort_by_key(|(s, part)| std::cmp::Reverse(part.len() * s.groups(part.end)));
    let (out, lse) = (Disjoint::new(out), Disjoint::new(lse));
    cpu.for_each(parts.len() * heads, |i| {
        let (seq, part) = parts[i / heads].clone();
        cpu.isa().run_tiles(Task { x, seq, head: i % heads, part, out: &out, lse: &lse });
    });
}

/// One head of some of a sequence's queries.
struct Task<'a> {
    x: &'a Problem<'a>,
    seq: Sequence,
    head: usize,
    part: Range<usize>,
    out: &'a Disjoint<'a, bf16>,
    lse: &'a Disjoint<'a, f32>,
}

impl TileJob for Task<'_> {
    fn run<T: Tiles>(self) {
        let Sizes { d, w } = Sizes::new(&self.x.shape);
        let groups = self.seq.groups(self.part.end);
        let at_once = (CACHED / ((d + w) * 2 * size_of::<Tile>())).max(1);
        let together = if groups <= at_once { 1 } else { TOGETHER };
        let tiles = groups * 2 * (d + w) + together * (2 * d + 4 * w) + 4 * WAITING + 8 + 2 * d.max(w);
        with_tiles(tiles, |scratch| {
            // SAFETY: the level is AMX, which includes AVX-512 BF16. Registers are configured before all else and
            // released after.
            unsafe {
                T::configure();
                self.walk::<T>(scratch, groups, at_once, together);
                T::release();
            }
        });
    }
}

/// What a group of queries has of its own.
struct Queries<'a> {
    /// First query, in the sequence, and their number.
    first: usize,
    count: usize,
    /// `[step][half]`, queries as columns.
    q: &'a [Tile],
    /// `[v / 16][half]`.
    sums: &'a mut [Tile],
    /// Whether there is anything in them.
    begun: bool,
    softmax: Softmax,
}

/// What all queries of a task share.
struct Shared<'a> {
    sizes: Sizes,
    seq: Sequence,
    /// `[group][step][half]`, keys as rows.
    keys: &'a mut [Tile],
    /// `[group][v / 16]`, elements as rows.
    values: &'a mut [Tile],
    /// Two blocks of scores.
    scores: &'a mut [[Tile; 4]; 2],
    /// `[place][group][half]`, of groups that wait.
    weights: &'a mut [[Tile; 2]],
}

impl Task<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn walk<T: Tiles>(&self, mut scratch: &mut [Tile], groups: usize, at_once: usize, together: usize) {
        let (s, sizes, seq) = (&self.x.shape, Sizes::new(&self.x.shape), self.seq);
        let scratch = &mut scratch;
        let keys = cut(scratch, groups * 2 * sizes.d);
        let values = cut(scratch, groups * 2 * sizes.w);
        let (scores, _) = cut(scratch, 8).as_chunks_mut::<4>();
        let (weights, _) = cut(scratch, 4 * WAITING).as_chunks_mut::<2>();
        let rows = cut(scratch, 2 * sizes.d.max(sizes.w));
        let (q, sums) = (cut(scratch, together * 2 * sizes.d), cut(scratch, together * 4 * sizes.w));
        let mut packed = 0;
        let mut shared =
            Shared { sizes, seq, keys, values, scores: scores.first_chunk_mut().expect("two of two"), weights };
        for from in self.part.clone().step_by(together * GROUP) {
            let mut batch = Vec::with_capacity(together);
            let parts = q.chunks_exact_mut(2 * sizes.d).zip(sums.chunks_exact_mut(4 * sizes.w));
            for (first, (q, sums)) in (from..self.part.end).step_by(GROUP).zip(parts) {
                let count = (self.part.end - first).min(GROUP);
                self.load_queries(first, count, rows, q);
                batch.push(Queries { first, count, q, sums, begun: false, softmax: Softmax::new(s.scale) });
            }
            let seen = seq.groups((from + together * GROUP).min(self.part.end));
            for g in packed..seen {
                let of_values = &mut rows[..2 * sizes.w];
                load_keys(self.x, seq, self.head, g, &mut shared.keys[g * 2 * sizes.d..], of_values);
                turned(of_values, &mut shared.values[g * 2 * sizes.w..]);
            }
            packed = packed.max(seen);
            let steps = seen * batch.len() * sizes.d;
            let mut ahead = self.ahead(from + together * GROUP, together * GROUP, packed, steps);
            for k in (0..seen).step_by(at_once) {
                for queries in &mut batch {
                    let end = (k + at_once).min(seq.groups(queries.first + queries.count));
                    // SAFETY: registers are configured.
                    unsafe { shared.pass::<T>(queries, k..end, &mut ahead) }
                }
            }
            for queries in &batch {
                self.finish(queries, rows);
            }
        }
    }

    /// Rows that are read once `first` is reached: of some queries from there on, and of keys from group `packed` on.
    fn ahead(&self, first: usize, count: usize, packed: usize, steps: usize) -> Ahead<'_> {
        let (s, seq) = (&self.x.shape, self.seq);
        let queries = first.min(self.part.end)..(first + count).min(self.part.end);
        let keys = packed * GROUP..(seq.groups(queries.end) * GROUP).min(seq.k_len);
        let width = s.nope + s.rope;
        let query = |i: usize| &bf16::of(self.x.q)[((seq.q + i) * s.heads + self.head) * width..][..width];
        Ahead::new(queries.map(query).chain(keys.map(|i| key_row(self.x, seq, self.head, i))).collect(), steps)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_queries(&self, first: usize, count: usize, rows: &mut [Tile], tiles: &mut [Tile]) {
        let (s, rows) = (&self.x.shape, &mut rows[..tiles.len()]);
        let width = s.nope + s.rope;
        let of = &bf16::of(self.x.q)[((self.seq.q + first) * s.heads + self.head) * width..];
        Rows { of, stride: s.heads * width, width }.gather(count, 0, rows);
        columns(rows, tiles);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn finish(&self, queries: &Queries<'_>, rows: &mut [Tile]) {
        let (heads, v) = (self.x.shape.heads, self.x.shape.v);
        let (factors, lse) = queries.softmax.finish();
        for (sums, rows) in queries.sums.as_chunks::<4>().0.iter().zip(rows.as_chunks_mut::<2>().0) {
            if queries.begun { round_turned(sums, factors, rows) } else { rows.as_flattened_mut().fill(0) }
        }
        for (i, lse) in lse.into_iter().enumerate().take(queries.count) {
            let at = (self.seq.q + queries.first + i) * heads + self.head;
            // SAFETY: a query and head belong to one task.
            unsafe {
                self.lse.part(at, 1)[0] = lse;
                store_row(rows, i, self.out.part(at * v, v));
            }
        }
    }
}

/// What key i of the sequence has of its own, and its value.
pub fn key_row<'a>(x: &Problem<'a>, seq: Sequence, head: usize, i: usize) -> &'a [bf16] {
    let (s, width) = (&x.shape, x.shape.nope + x.shape.v);
    &bf16::of(x.kv_up)[((seq.k + i) * s.heads + head) * width..][..width]
}

/// Reads group g of the sequence's keys and values as rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn load_keys(x: &Problem<'_>, seq: Sequence, head: usize, g: usize, keys: &mut [Tile], values: &mut [Tile]) {
    let s = &x.shape;
    let (at, count) = (seq.k + g * GROUP, (seq.k_len - g * GROUP).min(GROUP));
    let width = s.nope + s.v;
    let of = &bf16::of(x.kv_up)[(at * s.heads + head) * width..];
    Rows { of, stride: s.heads * width, width: s.nope }.gather(count, 0, keys);
    Rows { of: &bf16::of(x.k_pe)[at * s.k_pe_stride..], stride: s.k_pe_stride, width: s.rope }
        .gather(count, s.nope, keys);
    Rows { of: &of[s.nope..], stride: s.heads * width, width: s.v }.gather(count, 0, values);
}

/// Groups of keys whose weights wait in one of two places, and how many of the output's parts, of 32 elements each, have
/// taken them in.
#[derive(Clone)]
struct Batch {
    groups: Range<usize>,
    place: usize,
    part: usize,
}

impl Batch {
    fn new(first: usize, place: usize) -> Self {
        Self { groups: first..first, place, part: 0 }
    }
}

impl Shared<'_> {
    /// Takes some groups of keys into the output's sums. While tiles are multiplied, vectors weigh the group before, whose weights
    /// then wait in the new batch. Once that has [`WAITING`] groups it becomes the old one, of which the output takes in a share
    /// after each group while the next batch fills:
    ///
    /// ```text
    /// tiles     scores (g)   share of values x weights (old) | scores (g + 1)   share of values x weights (old) | ..
    /// vectors   weights (g - 1)                              | weights (g)                                      | ..
    /// ```
    ///
    /// Where a group's weights turn out too large, both batches are taken in first, for they were weighed from the old bases, and
    /// the group is weighed again ([`Self::again`]). At the end the last group is weighed, and both are taken in.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn pass<T: Tiles>(&mut self, x: &mut Queries<'_>, groups: Range<usize>, ahead: &mut Ahead<'_>) {
        let Sizes { d, w } = self.sizes;
        let (mut old, mut new) = (Batch::new(0, 1), Batch::new(groups.start, 0));
        for g in groups.clone() {
            let [even, odd] = &mut *self.scores;
            let (scores, before) = if g.is_multiple_of(2) { (even, odd) } else { (odd, even) };
            let (low, high) = self.weights.split_at_mut(WAITING);
            let (new_weights, old_weights) = if new.place == 0 { (low, &*high) } else { (high, &*low) };
            let until = if old.groups.is_empty() { 0 } else { w * (g - new.groups.start) / WAITING };
            let products = 4 * (d + (until - old.part) * old.groups.len());
            let mut beside = (g > groups.start)
                .then(|| x.softmax.weigh(before, &mut new_weights[g - 1 - new.groups.start], products));
            // SAFETY: registers are configured, here and below.
            unsafe {
                score::<T>(d, &self.keys[g * 2 * d..][..2 * d], x.q, scores, (&mut beside, ahead));
                for part in old.part..until {
                    values::<T>((self.values, w), x.sums, x.begun, &old, old_weights, part, &mut beside);
                }
            }
            old.part = until;
            if let Some(beside) = beside {
                let sums = beside.rest();
                if let Some(over) = x.softmax.settle(sums) {
                    // SAFETY: as above.
                    unsafe { self.again::<T>(x, g - 1, over, &mut old, &mut new) }
                } else if g - new.groups.start == WAITING {
                    x.begun |= !old.groups.is_empty();
                    new.groups.end = g;
                    let place = 1 - new.place;
                    old = std::mem::replace(&mut new, Batch::new(g, place));
                }
            }
            let scores = &mut self.scores[g % 2];
            let visible = self.seq.visible(x.first) - (g * GROUP) as i64;
            if visible < GROUP as i64 {
                hide(scores, visible);
            }
            if g == 0 {
                x.softmax.raise(scores, [u16::MAX; 2]);
            }
        }
        if groups.is_empty() {
            return;
        }
        let g = groups.end - 1;
        let at = new.place * WAITING + g - new.groups.start;
        let sums = x.softmax.weigh(&self.scores[g % 2], &mut self.weights[at], 1).rest();
        // SAFETY: as above.
        unsafe {
            if let Some(over) = x.softmax.settle(sums) {
                self.again::<T>(x, g, over, &mut old, &mut new);
            }
            new.groups.end = g + 1;
            self.take::<T>(x, &mut old);
            self.take::<T>(x, &mut new);
        }
    }

    /// Weighs a group again, which begins a batch, after the bases of some queries have followed its scores. What waits
    /// was weighed from the old ones.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn again<T: Tiles>(
        &mut self,
        x: &mut Queries<'_>,
        g: usize,
        over: [u16; 2],
        old: &mut Batch,
        new: &mut Batch,
    ) {
        new.groups.end = g;
        // SAFETY: registers are configured.
        unsafe {
            self.take::<T>(x, old);
            self.take::<T>(x, new);
        }
        *new = Batch::new(g, new.place);
        let scores = &self.scores[g % 2];
        let alpha = x.softmax.raise(scores, over);
        if x.begun {
            scale(x.sums, alpha);
        }
        let sums = x.softmax.weigh(scores, &mut self.weights[new.place * WAITING], 1).rest();
        x.softmax.accept(sums);
    }

    /// Takes in what waits of a batch.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn take<T: Tiles>(&mut self, x: &mut Queries<'_>, batch: &mut Batch) {
        if batch.groups.is_empty() {
            return;
        }
        let w = self.sizes.w;
        let weights = &self.weights[batch.place * WAITING..][..WAITING];
        for part in batch.part..w {
            // SAFETY: registers are configured.
            unsafe { values::<T>((self.values, w), x.sums, x.begun, batch, weights, part, &mut None) }
        }
        *batch = Batch::new(0, batch.place);
        x.begun = true;
    }
}

/// The scores of a group of keys.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn score<T: Tiles>(
    d: usize,
    keys: &[Tile],
    q: &[Tile],
    to: &mut [Tile; 4],
    (beside, ahead): (&mut Option<Weighing<'_>>, &mut Ahead<'_>),
) {
    // SAFETY: registers are configured.
    unsafe {
        zero::<T>();
        for c in 0..d {
            let (keys, q) = (two(keys, 2 * c), two(q, 2 * c));
            step!(T, load_once [&keys[0], &keys[1]], load [&q[0], &q[1]], weigh(beside));
            ahead.step();
        }
        let (top, bottom) = square(to, 0);
        keep::<T>(top, bottom);
    }
}

/// Adds to a part of the output the values of a batch times their weights.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn values<T: Tiles>(
    (of, w): (&[Tile], usize),
    sums: &mut [Tile],
    begun: bool,
    batch: &Batch,
    weights: &[[Tile; 2]],
    part: usize,
    beside: &mut Option<Weighing<'_>>,
) {
    let (top, bottom) = square(sums, 4 * part);
    // SAFETY: registers are configured.
    unsafe {
        if begun {
            resume::<T>(top, bottom);
        } else {
            zero::<T>();
        }
        for (g, [left, right]) in batch.groups.clone().zip(weights) {
            let values = two(of, (g * w + part) * 2);
            step!(T, load_once [&values[0], &values[1]], load [left, right], weigh(beside));
        }
        keep::<T>(top, bottom);
    }
}

/// What is due after a product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn weigh(beside: &mut Option<Weighing<'_>>) {
    if let Some(beside) = beside {
        beside.beside();
    }
}

/// Multiplies columns.
#[target_feature(enable = "avx512f")]
fn scale(sums: &mut [Tile], alpha: [__m512; 2]) {
    for (i, tile) in sums.iter_mut().enumerate() {
        for r in 0..SQUARE {
            set_row(tile, r, _mm512_castps_si512(_mm512_mul_ps(row(tile, r), alpha[i % 2])));
        }
    }
}
