//! What is done to scores between products, for a group of queries: `[keys][queries]`, queries along the vectors, two keys
//! at a time because a cell may hold both. In decode, whose heads share their keys, queries are a token's heads.

use super::queries::{QUERIES, Seen};
use crate::isa::{Job, Lanes, Level};
use crate::math::exp_of;
use crate::panel::WIDEST_GROUP;

/// The state of the online softmax of a tile's queries.
pub struct Softmax {
    /// Largest scaled score so far.
    pub max: [f32; QUERIES],
    /// Sum of exp(score - max) so far.
    pub sum: [f32; QUERIES],
    /// What sums of earlier keys are to be multiplied by, since the maximum grew.
    pub alpha: [f32; QUERIES],
}

impl Softmax {
    /// No keys seen.
    pub fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; QUERIES], sum: [0.0; QUERIES], alpha: [1.0; QUERIES] }
    }

    /// What query q's sum of weighted values is to be multiplied by, and its log-sum-exp: 0 and -inf without keys.
    pub fn finish(&self, q: usize) -> (f32, f32) {
        if self.sum[q] == 0.0 {
            return (0.0, f32::NEG_INFINITY);
        }
        (1.0 / self.sum[q], self.max[q] + self.sum[q].ln())
    }
}

/// From raw scores to exp(score * scale - max), with the state of the group's queries.
pub struct Weigh<'a> {
    pub softmax: &'a mut Softmax,
    /// The group's first query.
    pub at: usize,
    /// `[keys][lane]`.
    pub scores: &'a [f32],
    pub scale: f32,
    pub seen: Seen,
    /// Whether cells hold two keys.
    pub pairs: bool,
    /// Queries from one key to the next in what is written.
    pub apart: usize,
    /// `[cell of keys]`, `apart` words each, from the group's first query on.
    pub weights: &'a mut [u32],
}

impl Job for Weigh<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let group = group_of::<V>();
        let (at, keys) = (self.at, self.seen.keys);
        assert!(at + group <= QUERIES && self.scores.len() >= keys * group && self.seen.by_all <= keys);
        let cells = if self.pairs { keys.div_ceil(2) } else { keys };
        assert!(cells == 0 || self.weights.len() >= (cells - 1) * self.apart + group);
        assert!(V::PAIRS || !self.pairs);
        for q in (0..group).step_by(2 * V::N) {
            // SAFETY: V is used inside a function compiled for it; two vectors from q on are within the group, which the
            // asserts bound for scores, weights and the softmax's state.
            unsafe { self.columns::<V>(q, group) }
        }
    }
}

/// Queries of a group.
#[inline(always)]
pub fn group_of<V: Lanes>() -> usize {
    if V::LEVEL >= Level::Avx512 { WIDEST_GROUP } else { WIDEST_GROUP / 2 }
}

/// Two vectors from `p` on.
#[inline(always)]
unsafe fn two<V: Lanes>(p: *const f32) -> [V; 2] {
    // SAFETY: the caller's promise.
    unsafe { [V::load(p), V::load(p.add(V::N))] }
}

/// Writes both.
#[inline(always)]
unsafe fn put<V: Lanes>(x: [V; 2], p: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        x[0].store(p);
        x[1].store(p.add(V::N));
    }
}

/// The places of the lanes of two vectors from q on.
#[inline(always)]
unsafe fn places<V: Lanes>(q: usize) -> [V; 2] {
    const PLACES: [f32; WIDEST_GROUP] = {
        let mut all = [0.0; WIDEST_GROUP];
        let mut i = 0;
        while i < WIDEST_GROUP {
            all[i] = i as f32;
            i += 1;
        }
        all
    };
    // SAFETY: q and two vectors are within a group.
    unsafe { two(PLACES[q..].as_ptr()) }
}

impl Weigh<'_> {
    /// Two vectors of queries from q on.
    #[inline(always)]
    unsafe fn columns<V: Lanes>(&mut self, q: usize, group: usize) {
        let (at, keys, by_all) = (self.at + q, self.seen.keys, self.seen.by_all);
        // SAFETY: the caller's promise: all within the group and its keys.
        unsafe {
            let none = V::splat(f32::NEG_INFINITY);
            let (places, scores) = (places::<V>(q), self.scores.as_ptr().add(q));
            let mut max = [none; 2];
            for j in 0..by_all {
                let row = two::<V>(scores.add(j * group));
                for v in 0..2 {
                    max[v] = row[v].max(max[v]);
                }
            }
            for j in by_all..keys {
                let (row, unseen) = (two::<V>(scores.add(j * group)), V::splat(self.seen.unseen(j)));
                for v in 0..2 {
                    max[v] = unseen.greater(places[v], none, row[v]).max(max[v]);
                }
            }
            let (old, zero, scale) = (two::<V>(self.softmax.max[at..].as_ptr()), V::splat(0.0), V::splat(self.scale));
            let (mut base, mut alpha) = ([zero; 2], [zero; 2]);
            for v in 0..2 {
                // The scale is above 0, so that the largest raw score makes the largest scaled one.
                max[v] = max[v].mul(scale).max(old[v]);
                // A query that has seen no key keeps its maximum of -inf; measuring from 0 there gives weights of 0, not NaN.
                base[v] = max[v].greater(none, max[v], zero);
                alpha[v] = exp_of(old[v].sub(base[v]));
            }
            let mut sum = [zero; 2];
            let mut j = 0;
            while j < keys {
                let low = self.weights_of(scores, j, group, (places, base), &mut sum);
                let both = j + 1 < keys;
                let high =
                    if both { self.weights_of(scores, j + 1, group, (places, base), &mut sum) } else { [zero; 2] };
                if self.pairs {
                    let to = self.weights.as_mut_ptr().add(j / 2 * self.apart + q);
                    put([low[0].paired(high[0]), low[1].paired(high[1])], to.cast());
                } else {
                    let to = self.weights.as_mut_ptr().add(j * self.apart + q).cast::<f32>();
                    put(low, to);
                    if both {
                        put(high, to.add(self.apart));
                    }
                }
                j += 2;
            }
            let total = two::<V>(self.softmax.sum[at..].as_ptr());
            let total = [total[0].mul_add(alpha[0], sum[0]), total[1].mul_add(alpha[1], sum[1])];
            put(total, self.softmax.sum[at..].as_mut_ptr());
            put(max, self.softmax.max[at..].as_mut_ptr());
            put(alpha, self.softmax.alpha[at..].as_mut_ptr());
        }
    }

    /// The weights of key j, which are added to the sums.
    #[inline(always)]
    unsafe fn weights_of<V: Lanes>(
        &self,
        scores: *const f32,
        j: usize,
        group: usize,
        (places, base): ([V; 2], [V; 2]),
        sum: &mut [V; 2],
    ) -> [V; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut row = two::<V>(scores.add(j * group));
            for v in 0..2 {
                let x = row[v].mul(V::splat(self.scale)).sub(base[v]);
                row[v] = exp_of(x);
                if j >= self.seen.by_all {
                    row[v] = V::splat(self.seen.unseen(j)).greater(places[v], V::splat(0.0), row[v]);
                }
                sum[v] = sum[v].add(row[v]);
            }
            row
        }
    }
}

/// From raw scores and gradients of the probabilities to the probabilities and the gradients of the scores, both exactly 0
/// where a query does not see a key.
pub struct Gradients<'a> {
    /// `[keys][lane]`.
    pub scores: &'a [f32],
    pub dp: &'a [f32],
    /// Log-sum-exp, and rowsum(dout * out), of each of the group's queries.
    pub lse: &'a [f32],
    pub d: &'a [f32],
    pub scale: f32,
    pub seen: Seen,
    /// Whether cells hold two elements.
    pub pairs: bool,
    /// Queries from one key to the next in what is written.
    pub apart: usize,
    /// `[keys]`, `apart` elements each in cells along the queries, from the group's first on.
    pub p: &'a mut [u32],
    /// As p, where cells hold two elements.
    pub ds: &'a mut [u32],
    /// `[cell of keys]`, `apart` words each, from the group's first query on.
    pub ds_cells: &'a mut [u32],
}

impl Job for Gradients<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (group, keys) = (group_of::<V>(), self.seen.keys);
        let enough =
            |len: usize, rows: usize, apart: usize, width: usize| rows == 0 || len >= (rows - 1) * apart + width;
        assert!(self.scores.len() >= keys * group && self.dp.len() >= keys * group);
        assert!(self.lse.len() >= group && self.d.len() >= group);
        let (parts, cells) = if self.pairs { (2, keys.div_ceil(2)) } else { (1, keys) };
        assert!(enough(self.p.len(), keys, self.apart / parts, group / parts));
        assert!(!self.pairs || enough(self.ds.len(), keys, self.apart / parts, group / parts));
        assert!(enough(self.ds_cells.len(), cells, self.apart, group));
        assert!(V::PAIRS || !self.pairs);
        for q in (0..group).step_by(2 * V::N) {
            // SAFETY: V is used inside a function compiled for it; two vectors from q on are within the group, which the
            // asserts bound for all that is read and written.
            unsafe { self.columns::<V>(q, group) }
        }
    }
}

impl Gradients<'_> {
    /// Two vectors of queries from q on.
    #[inline(always)]
    unsafe fn columns<V: Lanes>(&mut self, q: usize, group: usize) {
        // SAFETY: the caller's promise: all within the group and its keys.
        unsafe {
            let of = (places::<V>(q), two::<V>(self.lse[q..].as_ptr()), two::<V>(self.d[q..].as_ptr()));
            let (mut j, keys) = (0, self.seen.keys);
            while j < keys {
                let low = self.key(j, q, group, &of);
                let high = if j + 1 < keys { self.key(j + 1, q, group, &of) } else { [V::splat(0.0); 2] };
                if self.pairs {
                    let to = self.ds_cells.as_mut_ptr().add(j / 2 * self.apart + q);
                    put([low[0].paired(high[0]), low[1].paired(high[1])], to.cast());
                }
                j += 2;
            }
        }
    }

    /// Writes the probabilities of key j and the gradients of its scores, which are returned.
    #[inline(always)]
    unsafe fn key<V: Lanes>(
        &mut self,
        j: usize,
        q: usize,
        group: usize,
        (places, lse, d): &([V; 2], [V; 2], [V; 2]),
    ) -> [V; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let at = j * group + q;
            let (mut p, mut ds) = (two::<V>(self.scores.as_ptr().add(at)), two::<V>(self.dp.as_ptr().add(at)));
            let (zero, scale) = (V::splat(0.0), V::splat(self.scale));
            for v in 0..2 {
                p[v] = exp_of(p[v].mul_add(scale, zero.sub(lse[v])));
                ds[v] = p[v].mul(ds[v].sub(d[v])).mul(scale);
            }
            if j >= self.seen.by_all || self.seen.queries < group {
                let (unseen, there) = (V::splat(self.seen.unseen(j)), V::splat(self.seen.queries as f32));
                for v in 0..2 {
                    for x in [&mut p[v], &mut ds[v]] {
                        *x = unseen.greater(places[v], zero, there.greater(places[v], *x, zero));
                    }
                }
            }
            if self.pairs {
                let at = (j * self.apart + q) / 2;
                p[0].joined(p[1]).store(self.p.as_mut_ptr().add(at).cast());
                ds[0].joined(ds[1]).store(self.ds.as_mut_ptr().add(at).cast());
            } else {
                put(p, self.p.as_mut_ptr().add(j * self.apart + q).cast());
                put(ds, self.ds_cells.as_mut_ptr().add(j * self.apart + q).cast());
            }
            ds
        }
    }
}
