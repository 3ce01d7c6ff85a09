//! Forward: `[keys][queries]` scores = keys (rows) times queries (columns); `[v][queries]` output += values (rows, turned)
//! times weights (columns).

use super::super::cpu::Disjoint;
use super::pack::{Stage, round_row, turn};
use super::weights::{Softmax, hide, row, set_row};
use super::*;
use crate::isa::{SQUARE, TileJob};
use crate::{Elem, bf16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups of keys whose weights wait for their product with the values, so that the output's sums are seldom read and
/// written.
const WAITING: usize = 8;
/// Bytes of keys and values that stay in the second-level cache while queries pass by: in tests so few that short sequences
/// have more.
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
        let tiles = groups * 2 * (d + w) + together * (2 * d + 4 * w) + 2 * WAITING + 8;
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
    /// `[half][step]`, queries as columns.
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
    /// `[group][half][step]`.
    keys: &'a [Tile],
    /// `[group][v / 16]`.
    values: &'a [Tile],
    /// Two blocks of scores.
    scores: &'a mut [[Tile; 4]; 2],
    /// `[group][half]`, of groups that wait.
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
        let (weights, _) = cut(scratch, 2 * WAITING).as_chunks_mut::<2>();
        let (q, sums) = (cut(scratch, together * 2 * sizes.d), cut(scratch, together * 4 * sizes.w));
        self.pack(sizes, keys, values);
        let mut shared =
            Shared { sizes, seq, keys, values, scores: scores.first_chunk_mut().expect("two of two"), weights };
        let mut stage = Stage::new(sizes.d);
        for from in self.part.clone().step_by(together * GROUP) {
            let mut batch = Vec::with_capacity(together);
            let parts = q.chunks_exact_mut(2 * sizes.d).zip(sums.chunks_exact_mut(4 * sizes.w));
            for (first, (q, sums)) in (from..self.part.end).step_by(GROUP).zip(parts) {
                let count = (self.part.end - first).min(GROUP);
                self.load_queries(&mut stage, first, count, q);
                batch.push(Queries { first, count, q, sums, begun: false, softmax: Softmax::new(s.scale) });
            }
            for k in (0..groups).step_by(at_once) {
                for queries in &mut batch {
                    let end = (k + at_once).min(seq.groups(queries.first + queries.count));
                    // SAFETY: registers are configured.
                    unsafe { shared.pass::<T>(queries, k..end) }
                }
            }
            for queries in &batch {
                self.finish(queries);
            }
        }
    }

    /// Lays out the keys and values that the task sees.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn pack(&self, sizes: Sizes, keys: &mut [Tile], values: &mut [Tile]) {
        let (mut key, mut value) = (Stage::new(sizes.d), Stage::new(sizes.w));
        let all = keys.chunks_exact_mut(2 * sizes.d).zip(values.chunks_exact_mut(2 * sizes.w));
        for (g, (keys, values)) in all.enumerate() {
            load_keys(self.x, self.seq, self.head, g, &mut key, &mut value);
            key.rows(keys);
            value.turned(values);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_queries(&self, stage: &mut Stage, first: usize, count: usize, tiles: &mut [Tile]) {
        let s = &self.x.shape;
        let (q, d) = (bf16::of(self.x.q), s.nope + s.rope);
        stage.fill(count, d, |i, row| {
            row.copy_from_slice(&q[((self.seq.q + first + i) * s.heads + self.head) * d..][..d]);
        });
        stage.columns(tiles);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn finish(&self, queries: &Queries<'_>) {
        let (heads, v) = (self.x.shape.heads, self.x.shape.v);
        let all = queries.softmax.finish();
        let at = |i: usize| (self.seq.q + queries.first + i) * heads + self.head;
        let mut turned = [0; TILE_WORDS];
        for i in 0..queries.count {
            // SAFETY: a query and head belong to one task.
            unsafe { self.lse.part(at(i), 1)[0] = all[i].1 }
        }
        for (t, tile) in queries.sums.iter().enumerate() {
            let (column, half) = (t / 2 * SQUARE, t % 2 * SQUARE);
            if queries.begun {
                turn(tile, &mut turned);
            }
            for i in half..queries.count.min(half + SQUARE) {
                // SAFETY: as above.
                let to = unsafe { self.out.part(at(i) * v, v) };
                round_row(&turned, i - half, all[i].0, to, column);
            }
        }
    }
}

/// Reads group g of the sequence's keys and values.
pub fn load_keys(x: &Problem<'_>, seq: Sequence, head: usize, g: usize, keys: &mut Stage, values: &mut Stage) {
    let s = &x.shape;
    let (kv_up, k_pe) = (bf16::of(x.kv_up), bf16::of(x.k_pe));
    let (at, count) = (seq.k + g * GROUP, (seq.k_len - g * GROUP).min(GROUP));
    let up = |i: usize| &kv_up[((at + i) * s.heads + head) * (s.nope + s.v)..][..s.nope + s.v];
    keys.fill(count, s.nope + s.rope, |i, row| {
        let (nope, pe) = row.split_at_mut(s.nope);
        nope.copy_from_slice(&up(i)[..s.nope]);
        pe.copy_from_slice(&k_pe[(at + i) * s.k_pe_stride..][..s.rope]);
    });
    values.fill(count, s.v, |i, row| row.copy_from_slice(&up(i)[s.nope..]));
}

impl Shared<'_> {
    /// Takes some groups of keys into the output's sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn pass<T: Tiles>(&mut self, x: &mut Queries<'_>, groups: Range<usize>) {
        // The first group whose weights wait, and how many wait; the last block of scores has none yet.
        let (mut first, mut waiting) = (groups.start, 0);
        for g in groups.clone() {
            // SAFETY: registers are configured, here and below.
            unsafe { self.score::<T>(x, g, (g > groups.start).then_some(waiting)) }
            waiting = g - first;
            let visible = self.seq.visible(x.first) - (g * GROUP) as i64;
            if visible < GROUP as i64 {
                hide(&mut self.scores[g % 2], visible);
            }
            let alpha = x.softmax.raise(&self.scores[g % 2]);
            if waiting == WAITING || alpha.is_some() && waiting > 0 {
                // SAFETY: as above.
                unsafe { self.weighted_values::<T>(x, first..g) }
                (first, waiting) = (g, 0);
            }
            if let Some(alpha) = alpha
                && x.begun
            {
                scale(x.sums, alpha);
            }
        }
        if !groups.is_empty() {
            let from = x.softmax.from();
            for i in 0..SQUARE {
                x.softmax.weigh(&from, &self.scores[(groups.end - 1) % 2], &mut self.weights[waiting], i);
            }
            // SAFETY: as above.
            unsafe { self.weighted_values::<T>(x, first..groups.end) }
        }
    }

    /// The scores of group g, and between their steps the weights of the group before.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn score<T: Tiles>(&mut self, x: &mut Queries<'_>, g: usize, before: Option<usize>) {
        let d = self.sizes.d;
        let keys = &self.keys[g * 2 * d..][..2 * d];
        let [even, odd] = self.scores;
        let (now, last) = if g.is_multiple_of(2) { (even, &*odd) } else { (odd, &*even) };
        let from = x.softmax.from();
        // SAFETY: registers are configured.
        unsafe { zero::<T>() }
        let mut i = 0;
        for c in 0..d {
            // SAFETY: as above.
            unsafe { step::<T>([&keys[c], &keys[d + c]], [&x.q[c], &x.q[d + c]]) }
            if let Some(at) = before {
                let until = SQUARE * (c + 1) / d;
                while i < until {
                    x.softmax.weigh(&from, last, &mut self.weights[at], i);
                    i += 1;
                }
            }
        }
        let (top, bottom) = square(now, 0);
        // SAFETY: as above.
        unsafe { keep::<T>(top, bottom) }
    }

    /// Adds the values of groups that wait, times their weights.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weighted_values<T: Tiles>(&self, x: &mut Queries<'_>, groups: Range<usize>) {
        let w = 2 * self.sizes.w;
        for (v, sums) in x.sums.chunks_exact_mut(4).enumerate() {
            let (top, bottom) = square(sums, 0);
            // SAFETY: registers are configured.
            unsafe {
                if x.begun {
                    resume::<T>(top, bottom);
                } else {
                    zero::<T>();
                }
                for (g, weights) in groups.clone().zip(self.weights.iter()) {
                    let values = two(self.values, g * w + 2 * v);
                    step::<T>([&values[0], &values[1]], [&weights[0], &weights[1]]);
                }
                keep::<T>(top, bottom);
            }
        }
        x.begun = true;
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
