//! Backward. A block is some groups of keys by some groups of queries: first its weights and the gradients of its
//! scores, then three products over all of it, so that sums are seldom read and written:
//!   dV += P^T dO, dK += dS^T Q with keys as rows, dQ^T += K^T dS^T with the elements of a head as rows.
//! Queries are walked through block by block, and for each of their blocks the keys, in order: every sum has its order.
//! What scores are scaled by is left to the end.

use super::super::backward::{dot, sum_heads};
use super::super::cpu::Disjoint;
use super::super::{Backward, Problem};
use super::forward::load_keys;
use super::pack::{Stage, round_row, turn};
use super::weights::{exp2, hide, round, row, set_row};
use super::*;
use crate::isa::{Isa, SQUARE, TileJob};
use crate::{Elem, bf16};
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups of queries of a block.
const QUERIES: usize = 8;
/// Groups of keys of a block.
const KEYS: usize = 4;

/// See [`super::super::backward`].
pub fn backward(cpu: &Cpu, x: &Problem<'_>, b: Backward<'_>) {
    let heads = x.shape.heads;
    let nk = x.cu_k[x.cu_k.len() - 1] as usize;
    let mut planes = cpu.empty::<f32>(heads * nk * x.shape.rope);
    let mut sequences: Vec<Sequence> = (0..x.cu_q.len() - 1).map(|s| Sequence::new(x, s)).collect();
    // The longest first, so that none is left over at the end.
    sequences.sort_by_key(|s| std::cmp::Reverse(s.q_len * s.k_len));
    let (dq, dkv_up) = (Disjoint::new(bf16::of_mut(b.dq)), Disjoint::new(bf16::of_mut(b.dkv_up)));
    let pe = Disjoint::new(&mut planes);
    let given = Given { out: bf16::of(b.out), lse: b.lse.f32(), dout: bf16::of(b.dout) };
    cpu.for_each(sequences.len() * heads, |i| {
        let (seq, head) = (sequences[i / heads], i % heads);
        let isa = cpu.isa();
        isa.run_tiles(Task { isa, x, seq, head, given, dq: &dq, dkv_up: &dkv_up, pe: &pe, nk });
    });
    sum_heads(cpu, x, &planes, bf16::of_mut(b.dk_pe), b.dk_pe_stride);
}

/// What the forward left, and the gradient of its output.
#[derive(Clone, Copy)]
struct Given<'a> {
    out: &'a [bf16],
    lse: &'a [f32],
    dout: &'a [bf16],
}

/// One head of a sequence.
struct Task<'a> {
    isa: Isa,
    x: &'a Problem<'a>,
    seq: Sequence,
    head: usize,
    given: Given<'a>,
    dq: &'a Disjoint<'a, bf16>,
    dkv_up: &'a Disjoint<'a, bf16>,
    pe: &'a Disjoint<'a, f32>,
    /// Keys of all sequences.
    nk: usize,
}

/// Keys and values of the sequence, and the sums of their gradients.
struct Keys<'a> {
    /// `[group][half][step]`, keys as rows.
    keys: &'a mut [Tile],
    /// `[group][step][2]`, elements as rows, pairs of keys.
    keys_turned: &'a mut [Tile],
    /// `[group][half][step]`, keys as rows.
    values: &'a mut [Tile],
    /// `[group][step][half][2]`.
    dk: &'a mut [Tile],
    dv: &'a mut [Tile],
}

/// A block's queries and output gradients, and the sums of the queries' gradients.
struct Queries<'a> {
    /// `[group][half][step]`, queries as columns.
    q: &'a mut [Tile],
    dout: &'a mut [Tile],
    /// `[step][group][2]`, pairs of queries as rows, elements as columns.
    q_pairs: &'a mut [Tile],
    dout_pairs: &'a mut [Tile],
    /// `[group][step][2][half]`, elements as rows.
    dq: &'a mut [Tile],
    /// Of each group and query the log-sum-exp as a power of two, and rowsum(dout * out).
    of: Vec<[[f32; GROUP]; 2]>,
}

/// What is computed of a block.
struct Block<'a> {
    /// Scores and gradients of the weights, of two blocks of a group by a group.
    scores: &'a mut [[[Tile; 4]; 2]; 2],
    /// `[group of keys][half][group of queries]`, keys as rows, pairs of queries.
    p: &'a mut [Tile],
    ds: &'a mut [Tile],
    /// `[group of keys][group of queries][2]`, pairs of keys as rows; of each eight queries the first half of a tile has
    /// four and the second the others.
    ds_pairs: &'a mut [Tile],
}

impl TileJob for Task<'_> {
    fn run<T: Tiles>(self) {
        let Sizes { d, w } = Sizes::new(&self.x.shape);
        let of_keys = self.seq.k_len.div_ceil(GROUP) * (8 * d + 6 * w);
        let of_queries = QUERIES * (8 * d + 4 * w);
        with_tiles(of_keys + of_queries + 16 + 6 * KEYS * QUERIES, |scratch| {
            // SAFETY: the level is AMX, which includes AVX-512 BF16. Registers are configured before all else and
            // released after.
            unsafe {
                T::configure();
                self.walk::<T>(scratch);
                T::release();
            }
        });
    }
}

impl Task<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn walk<T: Tiles>(&self, mut scratch: &mut [Tile]) {
        let (seq, sizes) = (self.seq, Sizes::new(&self.x.shape));
        let Sizes { d, w } = sizes;
        let groups = seq.k_len.div_ceil(GROUP);
        let scratch = &mut scratch;
        let mut keys = Keys {
            keys: cut(scratch, groups * 2 * d),
            keys_turned: cut(scratch, groups * 2 * d),
            values: cut(scratch, groups * 2 * w),
            dk: cut(scratch, groups * 4 * d),
            dv: cut(scratch, groups * 4 * w),
        };
        let mut queries = Queries {
            q: cut(scratch, QUERIES * 2 * d),
            dout: cut(scratch, QUERIES * 2 * w),
            q_pairs: cut(scratch, QUERIES * 2 * d),
            dout_pairs: cut(scratch, QUERIES * 2 * w),
            dq: cut(scratch, QUERIES * 4 * d),
            of: vec![[[0.0; GROUP]; 2]; QUERIES],
        };
        let (scores, _) = cut(scratch, 16).as_chunks_mut::<4>();
        let (scores, _) = scores.as_chunks_mut::<2>();
        let mut block = Block {
            scores: scores.first_chunk_mut().expect("two of two"),
            p: cut(scratch, 2 * KEYS * QUERIES),
            ds: cut(scratch, 2 * KEYS * QUERIES),
            ds_pairs: cut(scratch, 2 * KEYS * QUERIES),
        };
        let (mut of_d, mut of_w) = (Stage::new(d), Stage::new(w));
        for g in 0..groups {
            load_keys(self.x, seq, self.head, g, &mut of_d, &mut of_w);
            of_d.rows(&mut keys.keys[g * 2 * d..]);
            of_d.turned(&mut keys.keys_turned[g * 2 * d..]);
            of_w.rows(&mut keys.values[g * 2 * w..]);
        }
        // Groups of keys that have sums.
        let mut begun = 0;
        for first in (0..seq.q_len).step_by(QUERIES * GROUP) {
            let count = (seq.q_len - first).min(QUERIES * GROUP);
            self.load_queries(first, count, (&mut of_d, &mut of_w), &mut queries);
            let of = Extent { seq, sizes, first, count, factor: self.x.shape.scale * std::f32::consts::LOG2_E };
            let seen = seq.groups(first + count);
            for k in (0..seen).step_by(KEYS) {
                let range = k..(k + KEYS).min(seen);
                // SAFETY: registers are configured.
                unsafe {
                    of.weights::<T>(range.clone(), &keys, &queries, &mut block);
                    of.key_gradients::<T>(range.clone(), begun, &mut keys, &queries, &block);
                    of.query_gradients::<T>(range, &keys, &mut queries, &block);
                }
            }
            begun = seen;
            self.store_queries(&of, &queries);
        }
        keys.dk[begun * 4 * d..].as_flattened_mut().fill(0);
        keys.dv[begun * 4 * w..].as_flattened_mut().fill(0);
        self.store_keys(&keys);
    }

    /// Lays out queries and output gradients both ways, and what the softmax's gradient needs of them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_queries(&self, first: usize, count: usize, (of_d, of_w): (&mut Stage, &mut Stage), to: &mut Queries<'_>) {
        let (s, Sizes { d, w }) = (&self.x.shape, Sizes::new(&self.x.shape));
        let (q, width) = (bf16::of(self.x.q), s.nope + s.rope);
        let Given { out, lse, dout } = self.given;
        for g in 0..count.div_ceil(GROUP) {
            let count = (count - g * GROUP).min(GROUP);
            let at = |i: usize| (self.seq.q + first + g * GROUP + i) * s.heads + self.head;
            of_d.fill(count, width, |i, row| row.copy_from_slice(&q[at(i) * width..][..width]));
            of_w.fill(count, s.v, |i, row| row.copy_from_slice(&dout[at(i) * s.v..][..s.v]));
            of_d.columns(&mut to.q[g * 2 * d..]);
            of_w.columns(&mut to.dout[g * 2 * w..]);
            (0..d).for_each(|c| of_d.pairs(c, two_mut(to.q_pairs, (c * QUERIES + g) * 2)));
            (0..w).for_each(|c| of_w.pairs(c, two_mut(to.dout_pairs, (c * QUERIES + g) * 2)));
            // No weight is left of a query that is not there or sees no key.
            to.of[g] = [[f32::INFINITY; GROUP], [0.0; GROUP]];
            for i in 0..count {
                let row = at(i) * s.v..(at(i) + 1) * s.v;
                if lse[at(i)] != f32::NEG_INFINITY {
                    to.of[g][0][i] = lse[at(i)] * std::f32::consts::LOG2_E;
                }
                to.of[g][1][i] = dot(self.isa, &out[row.clone()], &dout[row]);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn store_queries(&self, of: &Extent, queries: &Queries<'_>) {
        let (s, Extent { first, count, .. }) = (&self.x.shape, *of);
        let (d, width) = (Sizes::new(s).d, s.nope + s.rope);
        let mut turned = [0; TILE_WORDS];
        for (i, tile) in queries.dq[..count.div_ceil(GROUP) * 4 * d].iter().enumerate() {
            let (g, column) = (i / (4 * d), i % (4 * d) / 2 * SQUARE);
            // Sums of queries that see no key were never begun.
            if of.seen(g) > 0 {
                turn(tile, &mut turned)
            } else {
                turned.fill(0)
            }
            for r in 0..SQUARE {
                let query = g * GROUP + r / 4 * 8 + i % 2 * 4 + r % 4;
                if query < count {
                    let at = ((self.seq.q + first + query) * s.heads + self.head) * width;
                    // SAFETY: a query and head belong to one task.
                    let to = unsafe { self.dq.part(at, width) };
                    round_row(&turned, r, s.scale, to, column);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn store_keys(&self, keys: &Keys<'_>) {
        let s = &self.x.shape;
        let (Sizes { d, w }, width) = (Sizes::new(s), s.nope + s.v);
        let up = |key: usize| {
            // SAFETY: a key and head belong to one task.
            unsafe { self.dkv_up.part(((self.seq.k + key) * s.heads + self.head) * width, width) }
        };
        for (i, tile) in keys.dv.iter().enumerate() {
            let (key, column) = place(i, w);
            for r in 0..SQUARE.min(self.seq.k_len.saturating_sub(key)) {
                round_row(tile, r, 1.0, &mut up(key + r)[s.nope..], column);
            }
        }
        for (i, tile) in keys.dk.iter().enumerate() {
            let (key, column) = place(i, d);
            for r in 0..SQUARE.min(self.seq.k_len.saturating_sub(key)) {
                round_row(tile, r, s.scale, &mut up(key + r)[..s.nope], column);
                let at = self.head * self.nk + self.seq.k + key + r;
                // SAFETY: as above.
                let pe = unsafe { self.pe.part(at * s.rope, s.rope) };
                let elements = column.max(s.nope)..(column + SQUARE).min(s.nope + s.rope);
                for e in elements {
                    pe[e - s.nope] = f32::from_bits(tile[r * TILE_COLUMNS + e - column]) * s.scale;
                }
            }
        }
    }
}

/// Of tile i of `[group][step][half][2]` the first key and the first element.
fn place(i: usize, steps: usize) -> (usize, usize) {
    let (g, c) = (i / (4 * steps), i / 4 % steps);
    (g * GROUP + i / 2 % 2 * SQUARE, (c * 2 + i % 2) * SQUARE)
}

/// Which queries a block has.
#[derive(Clone, Copy)]
struct Extent {
    seq: Sequence,
    sizes: Sizes,
    first: usize,
    count: usize,
    /// Scores times this are powers of two.
    factor: f32,
}

impl Extent {
    /// Groups of queries.
    fn groups(&self) -> usize {
        self.count.div_ceil(GROUP)
    }

    /// Groups of keys that group g of the queries sees.
    fn seen(&self, g: usize) -> usize {
        self.seq.groups(self.first + self.count.min((g + 1) * GROUP))
    }

    /// Groups of queries that see something of a group of keys.
    fn seeing(&self, group: usize) -> Range<usize> {
        let n = self.groups();
        (0..n).find(|&g| self.seen(g) > group).unwrap_or(n)..n
    }

    /// Weights and score gradients of some groups of keys.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weights<T: Tiles>(
        &self,
        keys: Range<usize>,
        of_keys: &Keys<'_>,
        of_queries: &Queries<'_>,
        block: &mut Block<'_>,
    ) {
        let mut before = None;
        let mut n = 0;
        for k in keys.clone() {
            for g in self.seeing(k) {
                // SAFETY: registers are configured.
                unsafe { self.scores::<T>((k, g), before, n, of_keys, of_queries, block) }
                let query = self.first + g * GROUP;
                let visible = self.seq.visible(query) - (k * GROUP) as i64;
                if visible < GROUP as i64 {
                    hide(&mut block.scores[n % 2][0], visible);
                }
                before = Some((k - keys.start, g));
                n += 1;
            }
        }
        if let Some(at) = before {
            (0..SQUARE).for_each(|i| block.gradients(at, (n + 1) % 2, self.factor, &of_queries.of[at.1], i));
        }
    }

    /// Scores and gradients of the weights of one group of keys by one of queries, and between their steps what the
    /// block before is turned into.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn scores<T: Tiles>(
        &self,
        (k, g): (usize, usize),
        before: Option<(usize, usize)>,
        n: usize,
        of_keys: &Keys<'_>,
        of_queries: &Queries<'_>,
        block: &mut Block<'_>,
    ) {
        let Sizes { d, w } = self.sizes;
        let mut done = 0;
        let operands = [
            (&of_keys.keys[k * 2 * d..][..2 * d], &of_queries.q[g * 2 * d..][..2 * d], d),
            (&of_keys.values[k * 2 * w..][..2 * w], &of_queries.dout[g * 2 * w..][..2 * w], w),
        ];
        let mut steps = 0;
        for (which, (a, b, len)) in operands.into_iter().enumerate() {
            // SAFETY: registers are configured.
            unsafe { zero::<T>() }
            for c in 0..len {
                // SAFETY: as above.
                unsafe { step::<T>([&a[c], &a[len + c]], [&b[c], &b[len + c]]) }
                steps += 1;
                if let Some(at) = before {
                    while done < SQUARE * steps / (d + w) {
                        block.gradients(at, (n + 1) % 2, self.factor, &of_queries.of[at.1], done);
                        done += 1;
                    }
                }
            }
            let (top, bottom) = square(&mut block.scores[n % 2][which], 0);
            // SAFETY: as above.
            unsafe { keep::<T>(top, bottom) }
        }
    }

    /// dV += P^T dO and dK += dS^T Q of some groups of keys, those before `begun` to what is there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn key_gradients<T: Tiles>(
        &self,
        keys: Range<usize>,
        begun: usize,
        of_keys: &mut Keys<'_>,
        of_queries: &Queries<'_>,
        block: &Block<'_>,
    ) {
        let Sizes { d, w } = self.sizes;
        for (i, k) in keys.enumerate() {
            let seeing = self.seeing(k);
            let rows = i * 2 * QUERIES..(i + 1) * 2 * QUERIES;
            let products = [
                (&mut of_keys.dv[k * 4 * w..][..4 * w], &block.p[rows.clone()], &*of_queries.dout_pairs),
                (&mut of_keys.dk[k * 4 * d..][..4 * d], &block.ds[rows], &*of_queries.q_pairs),
            ];
            for (sums, a, b) in products {
                let (top, bottom) = a.split_at(QUERIES);
                for (sums, b) in sums.chunks_exact_mut(4).zip(b.chunks_exact(2 * QUERIES)) {
                    let sums = square(sums, 0);
                    // SAFETY: registers are configured.
                    unsafe {
                        if k < begun {
                            resume::<T>(sums.0, sums.1);
                        } else {
                            zero::<T>();
                        }
                        for g in seeing.clone() {
                            step::<T>([&top[g], &bottom[g]], [&b[2 * g], &b[2 * g + 1]]);
                        }
                        keep::<T>(sums.0, sums.1);
                    }
                }
            }
        }
    }

    /// dQ^T += K^T dS^T over some groups of keys, from zero with the first.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn query_gradients<T: Tiles>(
        &self,
        keys: Range<usize>,
        of_keys: &Keys<'_>,
        of_queries: &mut Queries<'_>,
        block: &Block<'_>,
    ) {
        let d = self.sizes.d;
        for (g, sums) in of_queries.dq.chunks_exact_mut(4 * d).enumerate().take(self.groups()) {
            let seen = keys.start..keys.end.min(self.seen(g));
            if seen.is_empty() {
                continue;
            }
            for (c, sums) in sums.chunks_exact_mut(4).enumerate() {
                let sums = square(sums, 0);
                // SAFETY: registers are configured.
                unsafe {
                    if keys.start > 0 {
                        resume::<T>(sums.0, sums.1);
                    } else {
                        zero::<T>();
                    }
                    for (i, k) in seen.clone().enumerate() {
                        let a = two(of_keys.keys_turned, k * 2 * d + 2 * c);
                        let b = two(block.ds_pairs, (i * QUERIES + g) * 2);
                        step::<T>([&a[0], &a[1]], [&b[0], &b[1]]);
                    }
                    keep::<T>(sums.0, sums.1);
                }
            }
        }
    }
}

impl Block<'_> {
    /// P = exp(S - lse) and dS = P (dP - D) of the keys 2i and 2i + 1 of group `at.0` and the queries of group `at.1`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    fn gradients(&mut self, at: (usize, usize), from: usize, factor: f32, of: &[[f32; GROUP]; 2], i: usize) {
        let [scores, dp] = &self.scores[from];
        let factor = _mm512_set1_ps(factor);
        let (half, r) = (i / 8, i % 8 * 2);
        let (mut p, mut ds) = ([[_mm512_setzero_ps(); 2]; 2], [[_mm512_setzero_ps(); 2]; 2]);
        for j in 0..2 {
            // SAFETY: 16 elements of 32.
            let (lse, mean) = unsafe {
                (_mm512_loadu_ps(of[0][j * SQUARE..].as_ptr()), _mm512_loadu_ps(of[1][j * SQUARE..].as_ptr()))
            };
            for t in 0..2 {
                p[t][j] = exp2(_mm512_fmsub_ps(row(&scores[half * 2 + j], r + t), factor, lse));
                ds[t][j] = _mm512_mul_ps(p[t][j], _mm512_sub_ps(row(&dp[half * 2 + j], r + t), mean));
            }
        }
        let tile = (at.0 * 2 + half) * QUERIES + at.1;
        let ds = [round(ds[0][0], ds[0][1]), round(ds[1][0], ds[1][1])];
        for t in 0..2 {
            set_row(&mut self.p[tile], r + t, round(p[t][0], p[t][1]));
            set_row(&mut self.ds[tile], r + t, ds[t]);
        }
        let pairs = two_mut(self.ds_pairs, (at.0 * QUERIES + at.1) * 2);
        set_row(&mut pairs[0], i, _mm512_unpacklo_epi16(ds[0], ds[1]));
        set_row(&mut pairs[1], i, _mm512_unpackhi_epi16(ds[0], ds[1]));
    }
}
