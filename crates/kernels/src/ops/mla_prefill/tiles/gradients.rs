//! Gradients of some groups of keys by some groups of queries, block by block: first a block's weights and the gradients of
//! its scores, then three products over many blocks, so that sums are seldom read and written:
//!   dV += P^T dO, dK += dS^T Q with keys as rows, dQ^T += K^T dS^T with the elements of a head as rows.

use super::weights::{Pace, exp2, hide, round, row, set_row};
use super::*;
use crate::isa::SQUARE;
use std::arch::x86_64::*;
use std::ops::Range;

/// Groups of queries that keys pass by together.
pub const QUERIES: usize = 8;
/// Groups of keys that dQ takes in together.
pub const KEYS: usize = 8;

/// Keys and values of the sequence, and the sums of their gradients.
pub struct Keys<'a> {
    /// `[group][step][half]`, keys as rows.
    pub keys: &'a mut [Tile],
    /// `[group][step][2]`, elements as rows, pairs of keys.
    pub keys_turned: &'a mut [Tile],
    /// `[group][step][half]`, keys as rows.
    pub values: &'a mut [Tile],
    /// `[group][step][half][2]`.
    pub dk: &'a mut [Tile],
    pub dv: &'a mut [Tile],
}

/// A block's queries and output gradients, and the sums of the queries' gradients.
pub struct Queries<'a> {
    /// `[group][step][half]`, queries as columns.
    pub q: &'a mut [Tile],
    pub dout: &'a mut [Tile],
    /// `[step][group][2]`, pairs of queries as rows, elements as columns.
    pub q_pairs: &'a mut [Tile],
    pub dout_pairs: &'a mut [Tile],
    /// `[group][step][2][half]`, elements as rows.
    pub dq: &'a mut [Tile],
    /// Of each group and query the log-sum-exp as a power of two, and rowsum(dout * out).
    pub of: Vec<[[f32; GROUP]; 2]>,
}

/// What is computed of a block.
pub struct Block<'a> {
    /// Scores and gradients of the weights, of two blocks of a group by a group.
    pub scores: &'a mut [[[Tile; 4]; 2]; 2],
    /// `[odd group of keys][half][group of queries]`, keys as rows, pairs of queries.
    pub p: &'a mut [Tile],
    pub ds: &'a mut [Tile],
    /// `[group of keys][group of queries][2]`, pairs of keys as rows; of each eight queries the first half of a tile has
    /// four and the second the others.
    pub ds_pairs: &'a mut [Tile],
}

/// Which queries a block has.
#[derive(Clone, Copy)]
pub struct Extent {
    pub seq: Sequence,
    pub sizes: Sizes,
    pub first: usize,
    pub count: usize,
    /// Scores times this are powers of two.
    pub factor: f32,
}

impl Extent {
    /// Groups of queries.
    fn groups(&self) -> usize {
        self.count.div_ceil(GROUP)
    }

    /// Groups of keys that group g of the queries sees.
    pub fn seen(&self, g: usize) -> usize {
        self.seq.groups(self.first + self.count.min((g + 1) * GROUP))
    }

    /// Groups of queries that see something of a group of keys.
    fn seeing(&self, group: usize) -> Range<usize> {
        let n = self.groups();
        (0..n).find(|&g| self.seen(g) > group).unwrap_or(n)..n
    }

    /// Weights and score gradients of a group of keys, k, by all groups of queries that see any of it: blocks (k, 0), (k, 1) and
    /// so on. While tiles are multiplied, vectors turn the block before into its P and dS; and after each block but the first
    /// dV and dK take in a share of the group of keys before:
    ///
    /// ```text
    /// tiles     S, dP (k, 0)         | S, dP (k, 1)   share of dV, dK (k - 1) | S, dP (k, 2)   share of dV, dK (k - 1) | ..
    /// vectors   P, dS (k - 1, last)  | P, dS (k, 0)                           | P, dS (k, 1)                           | ..
    /// ```
    ///
    /// If there is no block but the first, all of dV, dK (k - 1) comes after it, once (k - 1, last) is turned: they need it.
    /// Before dQ takes in some groups of keys, [`Self::last`] turns the last block of them, so that nothing is left to do beside
    /// the next; after the last group of all, [`Self::take_last`] has dV and dK take it in.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn group<T: Tiles>(
        &self,
        k: usize,
        before: &mut Option<Before>,
        begun: usize,
        of_keys: &mut Keys<'_>,
        of_queries: &Queries<'_>,
        block: &mut Block<'_>,
    ) {
        let Sizes { d, w } = self.sizes;
        let all = if k == 0 { 0 } else { d + w };
        let seeing = self.seeing(k);
        let last = seeing.len() - 1;
        let [now, was] = Place::of(k, block.p, block.ds);
        let mut part = 0;
        for (n, g) in seeing.enumerate() {
            let until = (all * n).checked_div(last).unwrap_or(all);
            let at = before.map_or(0, |b| 1 - b.scores);
            let [even, odd] = &mut *block.scores;
            let (to, from) = if at == 0 { (even, &*odd) } else { (odd, &*even) };
            // SAFETY: registers are configured.
            unsafe {
                if n == 0 {
                    // The block before belongs to the group of keys before.
                    let turned = [&mut *was.p, &mut *was.ds, &mut *block.ds_pairs];
                    let mut beside = Turning::new(*before, from, turned, of_queries, self.factor, 4 * (d + w));
                    self.scores::<T>((k, g), to, of_keys, of_queries, &mut beside);
                    rest(beside);
                    let a = [&*was.p, &*was.ds];
                    self.parts::<T>(part..until, k.max(1) - 1, begun, of_keys, of_queries, a, &mut None);
                } else {
                    let products = 4 * (d + w + (until - part) * self.seeing(k.max(1) - 1).len());
                    let turned = [&mut *now.p, &mut *now.ds, &mut *block.ds_pairs];
                    let mut beside = Turning::new(*before, from, turned, of_queries, self.factor, products);
                    self.scores::<T>((k, g), to, of_keys, of_queries, &mut beside);
                    let a = [&*was.p, &*was.ds];
                    self.parts::<T>(part..until, k.max(1) - 1, begun, of_keys, of_queries, a, &mut beside);
                    rest(beside);
                }
            }
            let visible = self.seq.visible(self.first + g * GROUP) - (k * GROUP) as i64;
            if visible < GROUP as i64 {
                hide(&mut block.scores[at][0], visible);
            }
            *before = Some(Before { k, g, scores: at });
            part = until;
        }
    }

    /// Does what is left to do of the last block.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn last(&self, before: &mut Option<Before>, of_queries: &Queries<'_>, block: &mut Block<'_>) {
        let Some(b) = before.take() else { return };
        let place = b.k % 2 * 2 * QUERIES;
        let turned = [&mut block.p[place..], &mut block.ds[place..], &mut *block.ds_pairs];
        rest(Turning::new(Some(b), &block.scores[b.scores], turned, of_queries, self.factor, 1));
    }

    /// dV and dK take in the last group of keys, all of whose blocks are done.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn take_last<T: Tiles>(
        &self,
        k: usize,
        begun: usize,
        of_keys: &mut Keys<'_>,
        of_queries: &Queries<'_>,
        block: &Block<'_>,
    ) {
        let Sizes { d, w } = self.sizes;
        let place = k % 2 * 2 * QUERIES;
        let a = [&block.p[place..], &block.ds[place..]];
        // SAFETY: registers are configured.
        unsafe { self.parts::<T>(0..d + w, k, begun, of_keys, of_queries, a, &mut None) }
    }

    /// Scores and gradients of the weights of one group of keys by one of queries.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn scores<T: Tiles>(
        &self,
        (k, g): (usize, usize),
        to: &mut [[Tile; 4]; 2],
        of_keys: &Keys<'_>,
        of_queries: &Queries<'_>,
        beside: &mut Option<Turning<'_>>,
    ) {
        let Sizes { d, w } = self.sizes;
        let operands = [
            (&of_keys.keys[k * 2 * d..][..2 * d], &of_queries.q[g * 2 * d..][..2 * d], d),
            (&of_keys.values[k * 2 * w..][..2 * w], &of_queries.dout[g * 2 * w..][..2 * w], w),
        ];
        for ((a, b, len), to) in operands.into_iter().zip(to) {
            // SAFETY: registers are configured.
            unsafe {
                zero::<T>();
                for c in 0..len {
                    let (a, b) = (two(a, 2 * c), two(b, 2 * c));
                    step!(T, load [&a[0], &a[1]], load_once [&b[0], &b[1]], turn(beside));
                }
                let (top, bottom) = square(to, 0);
                keep::<T>(top, bottom);
            }
        }
    }

    /// Some of the parts, of 32 elements each, of dV += P^T dO and then of dK += dS^T Q of a group of keys, which has
    /// sums if it is before `begun`.
    #[expect(clippy::too_many_arguments, reason = "what is multiplied, added to and done beside")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn parts<T: Tiles>(
        &self,
        parts: Range<usize>,
        k: usize,
        begun: usize,
        of_keys: &mut Keys<'_>,
        of_queries: &Queries<'_>,
        [p, ds]: [&[Tile]; 2],
        beside: &mut Option<Turning<'_>>,
    ) {
        let Sizes { d, w } = self.sizes;
        for part in parts {
            let (sums, a, b) = if part < w {
                let b = &of_queries.dout_pairs[part * 2 * QUERIES..];
                (&mut of_keys.dv[(k * w + part) * 4..], p, b)
            } else {
                let b = &of_queries.q_pairs[(part - w) * 2 * QUERIES..];
                (&mut of_keys.dk[(k * d + part - w) * 4..], ds, b)
            };
            let sums = square(sums, 0);
            // SAFETY: registers are configured.
            unsafe {
                if k < begun {
                    resume::<T>(sums.0, sums.1);
                } else {
                    zero::<T>();
                }
                for g in self.seeing(k) {
                    step!(T, load [&a[g], &a[QUERIES + g]], load_once [&b[2 * g], &b[2 * g + 1]], turn(beside));
                }
                keep::<T>(sums.0, sums.1);
            }
        }
    }

    /// dQ^T += K^T dS^T over some groups of keys, from zero with the first.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn query_gradients<T: Tiles>(
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
                        let a = two(of_keys.keys_turned, (k * d + c) * 2);
                        let b = two(block.ds_pairs, (i * QUERIES + g) * 2);
                        step!(T, load_once [&a[0], &a[1]], load [&b[0], &b[1]], {});
                    }
                    keep::<T>(sums.0, sums.1);
                }
            }
        }
    }
}

/// What a group of keys and all groups of queries have: P and dS, `[half][group of queries]`.
struct Place<'a> {
    p: &'a mut [Tile],
    ds: &'a mut [Tile],
}

impl<'a> Place<'a> {
    /// Those of group k and of the group before: there is a place for each parity.
    #[inline(always)]
    fn of(k: usize, p: &'a mut [Tile], ds: &'a mut [Tile]) -> [Self; 2] {
        let [p, ds] = [p, ds].map(|all| all.split_at_mut(2 * QUERIES));
        let (even, odd) = (Self { p: p.0, ds: ds.0 }, Self { p: p.1, ds: ds.1 });
        if k.is_multiple_of(2) { [even, odd] } else { [odd, even] }
    }
}

/// A block whose scores are there: its groups and where the scores are.
#[derive(Clone, Copy)]
pub struct Before {
    k: usize,
    g: usize,
    scores: usize,
}

/// What is done beside products: P = exp(S - lse) and dS = P (dP - D) of a block, two keys at a time.
struct Turning<'a> {
    scores: &'a [[Tile; 4]; 2],
    /// Of both halves of the keys.
    p: [&'a mut Tile; 2],
    ds: [&'a mut Tile; 2],
    pairs: &'a mut [Tile; 2],
    /// What the queries have, and by what scores become powers of two.
    of: &'a [[f32; GROUP]; 2],
    factor: __m512,
    pace: Pace,
}

impl<'a> Turning<'a> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(
        before: Option<Before>,
        scores: &'a [[Tile; 4]; 2],
        [p, ds, pairs]: [&'a mut [Tile]; 3],
        of_queries: &'a Queries<'_>,
        factor: f32,
        products: usize,
    ) -> Option<Self> {
        let Before { k, g, .. } = before?;
        let halves =
            |tiles: &'a mut [Tile]| tiles.get_disjoint_mut([g, g + QUERIES]).expect("each group has two tiles");
        Some(Self {
            scores,
            p: halves(p),
            ds: halves(ds),
            pairs: two_mut(pairs, (k % KEYS * QUERIES + g) * 2),
            of: &of_queries.of[g],
            factor: _mm512_set1_ps(factor),
            pace: Pace::new(products),
        })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn part(&mut self, part: usize) {
        let ([scores, dp], [lse, mean]) = (self.scores, self.of);
        let (half, at) = (part / 8 % 2, part % 8);
        let mut both = [_mm512_setzero_si512(); 2];
        for (i, both) in both.iter_mut().enumerate() {
            let r = 2 * at + i;
            let (mut p, mut ds) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
            for j in 0..2 {
                // SAFETY: 16 elements of 32.
                let of = |x: &[f32; GROUP]| unsafe { _mm512_loadu_ps(x[j * SQUARE..].as_ptr()) };
                p[j] = exp2(_mm512_fmsub_ps(row(&scores[half * 2 + j], r), self.factor, of(lse)));
                ds[j] = _mm512_mul_ps(p[j], _mm512_sub_ps(row(&dp[half * 2 + j], r), of(mean)));
            }
            *both = round(ds[0], ds[1]);
            set_row(self.p[half], r, round(p[0], p[1]));
            set_row(self.ds[half], r, *both);
        }
        set_row(&mut self.pairs[0], 8 * half + at, _mm512_unpacklo_epi16(both[0], both[1]));
        set_row(&mut self.pairs[1], 8 * half + at, _mm512_unpackhi_epi16(both[0], both[1]));
    }
}

/// What is due after a product.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn turn(beside: &mut Option<Turning<'_>>) {
    if let Some(turning) = beside {
        for part in turning.pace.due() {
            turning.part(part);
        }
    }
}

/// Does what is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn rest(turning: Option<Turning<'_>>) {
    if let Some(mut turning) = turning {
        for part in turning.pace.rest() {
            turning.part(part);
        }
    }
}
