//! Backward: a task is one head of one sequence. Its queries are walked through some at a time, and for them the keys, in
//! order: every sum has its order. What scores are scaled by is left to the end.

use super::super::backward::sum_heads;
use super::super::{Backward, Problem};
use super::forward::load_keys;
use super::gradients::{Block, Extent, KEYS, Keys, QUERIES, Queries};
use super::pack::{Rows, columns, dots, pairs, round_turned, store_row, store_sums, turned};
use super::*;
use crate::buffer::Disjoint;
use crate::isa::{SQUARE, TileJob};
use crate::{Elem, View, bf16};
use std::arch::x86_64::*;

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
    let given = Given { out: b.out, lse: b.lse.f32(), dout: b.dout };
    cpu.for_each(sequences.len() * heads, |i| {
        let (seq, head) = (sequences[i / heads], i % heads);
        cpu.isa().run_tiles(Task { x, seq, head, given, dq: &dq, dkv_up: &dkv_up, pe: &pe, nk });
    });
    sum_heads(cpu, x, &planes, bf16::of_mut(b.dk_pe), b.dk_pe_stride);
}

/// What the forward left, and the gradient of its output.
#[derive(Clone, Copy)]
struct Given<'a> {
    out: View<'a>,
    lse: &'a [f32],
    dout: View<'a>,
}

/// One head of a sequence.
struct Task<'a> {
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
        let of_queries = QUERIES * (8 * d + 4 * w) + 2 * d.max(w);
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
        let rows = cut(scratch, 2 * d.max(w));
        // Groups of keys that have sums.
        let mut begun = 0;
        for first in (0..seq.q_len).step_by(QUERIES * GROUP) {
            let count = (seq.q_len - first).min(QUERIES * GROUP);
            self.load_queries(first, count, rows, &mut queries);
            let of = Extent { seq, sizes, first, count, factor: self.x.shape.scale * std::f32::consts::LOG2_E };
            let seen = seq.groups(first + count);
            for g in begun..seen {
                let of_keys = &mut keys.keys[g * 2 * d..][..2 * d];
                load_keys(self.x, seq, self.head, g, of_keys, &mut keys.values[g * 2 * w..]);
                turned(of_keys, &mut keys.keys_turned[g * 2 * d..]);
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
            self.store_queries(&of, &queries, rows);
        }
        keys.dk[begun * 4 * d..].as_flattened_mut().fill(0);
        keys.dv[begun * 4 * w..].as_flattened_mut().fill(0);
        self.store_keys(&keys);
    }

    /// Lays out queries and output gradients both ways, and what the softmax's gradient needs of them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_queries(&self, first: usize, count: usize, rows: &mut [Tile], to: &mut Queries<'_>) {
        let (s, Sizes { d, w }) = (&self.x.shape, Sizes::new(&self.x.shape));
        let Given { out, lse, dout } = self.given;
        for g in 0..count.div_ceil(GROUP) {
            let count = (count - g * GROUP).min(GROUP);
            let at = (self.seq.q + first + g * GROUP) * s.heads + self.head;
            let of = |x, width| Rows { of: &bf16::of(x)[at * width..], stride: s.heads * width, width };
            let (q, out, dout) = (of(self.x.q, s.nope + s.rope), of(out, s.v), of(dout, s.v));
            q.gather(count, 0, &mut rows[..2 * d]);
            columns(&rows[..2 * d], &mut to.q[g * 2 * d..]);
            (0..d).for_each(|c| pairs(two(rows, 2 * c), two_mut(to.q_pairs, (c * QUERIES + g) * 2)));
            dout.gather(count, 0, &mut rows[..2 * w]);
            columns(&rows[..2 * w], &mut to.dout[g * 2 * w..]);
            (0..w).for_each(|c| pairs(two(rows, 2 * c), two_mut(to.dout_pairs, (c * QUERIES + g) * 2)));
            let [of_lse, means] = &mut to.of[g];
            for (half, means) in means.as_chunks_mut::<SQUARE>().0.iter_mut().enumerate() {
                let first = half * SQUARE;
                *means = dots(out.after(first), dout.after(first), count.saturating_sub(first).min(SQUARE));
            }
            // No weight is left of a query that is not there or sees no key.
            of_lse.fill(f32::INFINITY);
            for (of_lse, lse) in of_lse.iter_mut().zip(lse[at..].iter().step_by(s.heads)).take(count) {
                if *lse != f32::NEG_INFINITY {
                    *of_lse = lse * std::f32::consts::LOG2_E;
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn store_queries(&self, of: &Extent, queries: &Queries<'_>, rows: &mut [Tile]) {
        let (s, Extent { first, count, .. }) = (&self.x.shape, *of);
        let (d, width) = (Sizes::new(s).d, s.nope + s.rope);
        let factors = [_mm512_set1_ps(s.scale); 2];
        for (g, sums) in queries.dq.chunks_exact(4 * d).enumerate().take(count.div_ceil(GROUP)) {
            for (sums, rows) in sums.as_chunks::<4>().0.iter().zip(rows.as_chunks_mut::<2>().0) {
                if of.seen(g) > 0 { round_turned(sums, factors, rows) } else { rows.as_flattened_mut().fill(0) }
            }
            for r in 0..GROUP {
                let (half, r16) = (r / SQUARE, r % SQUARE);
                let query = g * GROUP + r16 / 4 * 8 + half * 4 + r16 % 4;
                if query < count {
                    let at = ((self.seq.q + first + query) * s.heads + self.head) * width;
                    // SAFETY: a query and head belong to one task.
                    store_row(&rows[..2 * d], r, unsafe { self.dq.part(at, width) });
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn store_keys(&self, keys: &Keys<'_>) {
        let s = &self.x.shape;
        let (Sizes { d, w }, width) = (Sizes::new(s), s.nope + s.v);
        for key in 0..self.seq.k_len {
            let (g, row, at) = (key / GROUP, key % GROUP, self.seq.k + key);
            // SAFETY: a key and head belong to one task.
            let (up, pe) = unsafe {
                let up = self.dkv_up.part((at * s.heads + self.head) * width, width);
                (up, self.pe.part((self.head * self.nk + at) * s.rope, s.rope))
            };
            let (of_key, of_value) = up.split_at_mut(s.nope);
            store_sums(&keys.dk[g * 4 * d..][..4 * d], row, s.scale, of_key, pe);
            store_sums(&keys.dv[g * 4 * w..][..4 * w], row, 1.0, of_value, &mut []);
        }
    }
}
