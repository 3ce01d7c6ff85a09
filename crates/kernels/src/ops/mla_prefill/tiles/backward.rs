//! Backward: a task is one head of one sequence. Its queries are walked through some at a time, and for them the keys, in
//! order: every sum has its order. What scores are scaled by is left to the end.

use super::super::backward::{dot, sum_heads};
use super::super::cpu::Disjoint;
use super::super::{Backward, Problem};
use super::forward::load_keys;
use super::gradients::{Block, Extent, KEYS, Keys, QUERIES, Queries};
use super::pack::{Stage, round_row, turn};
use super::*;
use crate::isa::{Isa, SQUARE, TileJob};
use crate::{Elem, bf16};

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

impl TileJob for Task<'_> {
    fn run<T: Tiles>(self) {
        let Sizes { d, w } = Sizes::new(&self.x.shape);
        let of_keys = self.seq.k_len.div_ceil(GROUP) * (8 * d + 6 * w);
        let of_queries = QUERIES * (8 * d + 4 * w) + 2 * d;
        with_tiles(of_keys + of_queries + 16 + (8 + 2 * KEYS) * QUERIES, |scratch| {
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
            p: cut(scratch, 4 * QUERIES),
            ds: cut(scratch, 4 * QUERIES),
            ds_pairs: cut(scratch, 2 * KEYS * QUERIES),
        };
        let turned = cut(scratch, 2 * d);
        let (mut of_d, mut of_w) = (Stage::new(d), Stage::new(w));
        // Groups of keys that have sums.
        let mut begun = 0;
        for first in (0..seq.q_len).step_by(QUERIES * GROUP) {
            let count = (seq.q_len - first).min(QUERIES * GROUP);
            self.load_queries(first, count, (&mut of_d, &mut of_w), &mut queries);
            let of = Extent { seq, sizes, first, count, factor: self.x.shape.scale * std::f32::consts::LOG2_E };
            let seen = seq.groups(first + count);
            for g in begun..seen {
                load_keys(self.x, seq, self.head, g, &mut of_d, &mut of_w);
                of_d.rows(&mut keys.keys[g * 2 * d..]);
                of_d.turned(&mut keys.keys_turned[g * 2 * d..]);
                of_w.rows(&mut keys.values[g * 2 * w..]);
            }
            let mut before = None;
            for k in 0..seen {
                // SAFETY: registers are configured.
                unsafe { of.group::<T>(k, &mut before, begun, &mut keys, &queries, &mut block) }
                if (k + 1).is_multiple_of(KEYS) || k + 1 == seen {
                    of.last(&mut before, &queries, &mut block);
                    let groups = k / KEYS * KEYS..k + 1;
                    // SAFETY: as above.
                    unsafe { of.query_gradients::<T>(groups, &keys, &mut queries, &block) }
                }
            }
            if seen > 0 {
                // SAFETY: as above.
                unsafe { of.take_last::<T>(seen - 1, begun, &mut keys, &queries, &block) }
            }
            begun = seen;
            self.store_queries(&of, &queries, turned);
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
    fn store_queries(&self, of: &Extent, queries: &Queries<'_>, turned: &mut [Tile]) {
        let (s, Extent { first, count, .. }) = (&self.x.shape, *of);
        let (d, width) = (Sizes::new(s).d, s.nope + s.rope);
        for (g, sums) in queries.dq.chunks_exact(4 * d).enumerate().take(count.div_ceil(GROUP)) {
            for half in 0..2 {
                for (t, turned) in turned.iter_mut().enumerate() {
                    if of.seen(g) > 0 { turn(&sums[2 * t + half], turned) } else { turned.fill(0) }
                }
                for r in 0..SQUARE {
                    let query = g * GROUP + r / 4 * 8 + half * 4 + r % 4;
                    if query < count {
                        let at = ((self.seq.q + first + query) * s.heads + self.head) * width;
                        // SAFETY: a query and head belong to one task.
                        let to = unsafe { self.dq.part(at, width) };
                        for (step, [low, high]) in turned.as_chunks::<2>().0.iter().enumerate() {
                            round_row([low, high], r, s.scale, to, step * GROUP);
                        }
                    }
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
        for key in 0..self.seq.k_len {
            let (g, half, r) = (key / GROUP, key % GROUP / SQUARE, key % SQUARE);
            let to = up(key);
            for step in 0..w {
                let [low, high] = super::two(keys.dv, (g * w + step) * 4 + 2 * half);
                round_row([low, high], r, 1.0, &mut to[s.nope..], step * GROUP);
            }
            let at = self.head * self.nk + self.seq.k + key;
            // SAFETY: as above.
            let pe = unsafe { self.pe.part(at * s.rope, s.rope) };
            for step in 0..d {
                let sums = super::two(keys.dk, (g * d + step) * 4 + 2 * half);
                round_row([&sums[0], &sums[1]], r, s.scale, &mut to[..s.nope], step * GROUP);
                for (i, sums) in sums.iter().enumerate() {
                    let first = step * GROUP + i * SQUARE;
                    let row: &[f32] = bytemuck::cast_slice(&sums[r * TILE_COLUMNS..(r + 1) * TILE_COLUMNS]);
                    let from = first.max(s.nope);
                    let until = (first + SQUARE).min(s.nope + s.rope);
                    if from < until {
                        let pe = &mut pe[from - s.nope..until - s.nope];
                        pe.iter_mut().zip(&row[from - first..]).for_each(|(pe, x)| *pe = x * s.scale);
                    }
                }
            }
        }
    }
}
