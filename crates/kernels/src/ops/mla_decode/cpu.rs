//! Absorbed attention on the CPU: one task per query token and group of heads. The heads of a group share every key,
//! so the scores of a block are `[keys][heads]` = cache x q^T, and the cache's rows are widened but never transposed;
//! the weighted sum takes the same rows as values. A token is computed alone even in a chunk of many: its bits cannot
//! depend on the chunk.

use super::product::{Product, padded, round_scaled, widen};
use super::{BLOCK, Decode};
use crate::isa::{Job, Lanes};
use crate::ops::mla_prefill::Seen;
use crate::ops::mla_prefill::scratch::{cut, with_scratch};
use crate::ops::mla_prefill::weigh::{Softmax, Weigh, group_of};
use crate::{Cpu, Elem};

/// See [`super::forward`].
pub fn forward<T: Elem>(cpu: &Cpu, a: Decode<'_>) {
    let (cu_q, lengths) = (a.cu_q.i32(), a.lengths.i32());
    let (q, cache, table) = (T::of(a.q), T::of(a.cache), a.block_table.i32());
    let width = a.latent + a.rope;
    let group = heads_of(a.heads);
    let tokens: Vec<(usize, usize)> = (0..lengths.len())
        .flat_map(|s| (cu_q[s]..cu_q[s + 1]).map(move |n| (s, (lengths[s] - (cu_q[s + 1] - 1 - n)).max(0) as usize)))
        .collect();
    if tokens.is_empty() {
        return;
    }
    let max_blocks = table.len() / lengths.len();
    let out = T::of_mut(a.out);
    cpu.chunks2_mut((out, group * a.latent), (a.lse.f32(), group), |i, out, lse| {
        let (seq, keys) = tokens[i * group / a.heads];
        cpu.isa().run(Group {
            q: &q[i * group * width..(i + 1) * group * width],
            cache,
            blocks: &table[seq * max_blocks..(seq + 1) * max_blocks],
            keys,
            latent: a.latent,
            rope: a.rope,
            scale: a.scale,
            out,
            lse,
        });
    });
}

/// Heads per task: the largest divisor up to 16, which fills a vector and leaves tasks for other cores.
fn heads_of(heads: usize) -> usize {
    (1..=heads.min(16)).rev().find(|g| heads.is_multiple_of(*g)).unwrap_or(1)
}

/// One task: some heads of one query token.
struct Group<'a, T> {
    /// `[heads of the group, C + R]`.
    q: &'a [T],
    cache: &'a [T],
    /// The sequence's row of the block table.
    blocks: &'a [i32],
    /// Keys that the token sees.
    keys: usize,
    latent: usize,
    rope: usize,
    scale: f32,
    out: &'a mut [T],
    lse: &'a mut [f32],
}

impl<T: Elem> Job for Group<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let heads = self.lse.len();
        let (width, columns, ld) = (self.latent + self.rope, padded(heads), padded(self.latent + self.rope));
        let len = width * columns + BLOCK * ld + heads * padded(self.latent) + 2 * BLOCK * group_of::<V>();
        with_scratch(
            len,
            #[inline(always)]
            |scratch| self.walk::<V>(scratch),
        );
    }
}

impl<T: Elem> Group<'_, T> {
    #[inline(always)]
    fn walk<V: Lanes>(self, mut scratch: &mut [f32]) {
        let heads = self.lse.len();
        let width = self.latent + self.rope;
        let (columns, ld, sum_ld) = (padded(heads), padded(width), padded(self.latent));
        let lanes = group_of::<V>();
        let query = cut(&mut scratch, width * columns);
        let rows = cut(&mut scratch, BLOCK * ld);
        let sum = cut(&mut scratch, heads * sum_ld);
        let (scores, weights) = (cut(&mut scratch, BLOCK * lanes), cut(&mut scratch, BLOCK * lanes));
        for (c, out) in query.chunks_exact_mut(columns).enumerate() {
            for h in 0..heads {
                out[h] = self.q[h * width + c].f32();
            }
            out[heads..].fill(0.0);
        }
        let mut softmax = Softmax::new();
        sum.fill(0.0);
        // Lanes behind the columns are weighed along with them.
        scores.fill(0.0);
        for base in (0..self.keys).step_by(BLOCK) {
            let nk = (self.keys - base).min(BLOCK);
            self.load(self.blocks[base / BLOCK] as usize, nk, ld, rows);
            Product {
                m: nk,
                n: columns,
                k: width,
                a: rows,
                a_row: ld,
                a_col: 1,
                b: query,
                b_row: columns,
                c_row: lanes,
                add: false,
            }
            .write::<V>(scores);
            Weigh {
                softmax: &mut softmax,
                at: 0,
                scores,
                scale: self.scale,
                seen: Seen::everything(nk, heads),
                pairs: false,
                apart: lanes,
                weights: bytemuck::cast_slice_mut(weights),
            }
            .run::<V>();
            for (h, row) in sum.chunks_exact_mut(sum_ld).enumerate() {
                row.iter_mut().for_each(|o| *o *= softmax.alpha[h]);
            }
            Product {
                m: heads,
                n: sum_ld,
                k: nk,
                a: weights,
                a_row: 1,
                a_col: lanes,
                b: rows,
                b_row: ld,
                c_row: sum_ld,
                add: true,
            }
            .write::<V>(sum);
        }
        for (h, out) in self.out.chunks_exact_mut(self.latent).enumerate() {
            let (factor, lse) = softmax.finish(h);
            round_scaled(&sum[h * sum_ld..h * sum_ld + self.latent], factor, out);
            self.lse[h] = lse;
        }
    }

    /// Widens the first nk rows of a block: what lies beyond belongs to no one and may be anything.
    #[inline(always)]
    fn load(&self, block: usize, nk: usize, ld: usize, rows: &mut [f32]) {
        let width = self.latent + self.rope;
        let from = &self.cache[block * BLOCK * width..][..nk * width];
        for (row, from) in rows.chunks_exact_mut(ld).zip(from.chunks_exact(width)) {
            widen(from, &mut row[..width]);
            row[width..].fill(0.0);
        }
    }
}
