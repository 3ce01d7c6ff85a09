//! Selection for 16 tokens at once, one a lane, so that nothing branches on a score. Every expert in turn is put among the
//! largest so far.

use super::GroupScore;
use super::select::Rule;
use crate::isa::{Isa, Job, Lanes, SQUARE, transpose};

/// The most places, of experts and of groups.
const PLACES: usize = 8;
/// A token with a choice that is not above this is left alone: a NaN, or one that could make a group's score -inf, which
/// stands for what must not be chosen.
const LEAST: f32 = -1e37;
/// Indices are carried as floats that are larger by this number, whose low bits they are.
const ORIGIN: f32 = 8_388_608.0;

/// Whether the places are few enough and the tokens so many that empty lanes do not cost more than is won.
pub(super) fn fits(rule: &Rule, tokens: usize) -> bool {
    rule.top_k.max(rule.topk_group) <= PLACES && tokens > 2
}

/// Scratch for the scores of 16 tokens.
#[derive(Default)]
pub(super) struct Tile {
    /// `[16, experts]`, the experts rounded up to whole squares; of use where the scores do not have this shape.
    rows: Vec<f32>,
    /// Its transpose.
    columns: Vec<f32>,
}

impl Tile {
    /// Chooses for up to 16 tokens. Returns bits of those that it leaves alone, in whose `out` there may be anything.
    pub fn select(&mut self, isa: Isa, r: &Rule, scores: &[f32], bias: Option<&[f32]>, out: &mut [i32]) -> u32 {
        let Self { rows, columns } = self;
        let width = r.experts.next_multiple_of(SQUARE);
        let mut scores = scores;
        if scores.len() < SQUARE * width {
            rows.resize(SQUARE * width, 0.0);
            for (row, scores) in rows.chunks_exact_mut(width).zip(scores.chunks_exact(r.experts)) {
                row[..r.experts].copy_from_slice(scores);
            }
            scores = rows;
        }
        columns.resize(SQUARE * width, 0.0);
        for (i, square) in columns.chunks_exact_mut(SQUARE * SQUARE).enumerate() {
            let from = bytemuck::cast_slice(&scores[i * SQUARE..]);
            transpose(isa, from, width, bytemuck::cast_slice_mut(square), SQUARE, SQUARE);
        }
        let (mut chosen, mut left) = ([[0.0; SQUARE]; PLACES], 0);
        let columns = &columns.as_chunks().0[..r.experts];
        isa.run(Select { r, tokens: out.len() / r.top_k, columns, bias, chosen: &mut chosen, left: &mut left });
        for (t, out) in out.chunks_exact_mut(r.top_k).enumerate() {
            out.iter_mut().zip(&chosen).for_each(|(o, index)| *o = (index[t].to_bits() ^ ORIGIN.to_bits()) as i32);
        }
        left
    }
}

struct Select<'a> {
    r: &'a Rule,
    tokens: usize,
    columns: &'a [[f32; SQUARE]],
    bias: Option<&'a [f32]>,
    chosen: &'a mut [[f32; SQUARE]; PLACES],
    left: &'a mut u32,
}

impl Job for Select<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        for first in (0..self.tokens).step_by(V::N) {
            // SAFETY: compiled for the level, and vectors from `first` on end with the 16 at the latest.
            unsafe {
                match self.r.top_k {
                    ..=4 => self.choose::<V, 4>(first),
                    5..=6 => self.choose::<V, 6>(first),
                    _ => self.choose::<V, PLACES>(first),
                }
            }
        }
    }
}

impl Select<'_> {
    /// For the tokens of one vector.
    ///
    /// # Safety
    /// The caller is compiled for the level. A vector from `first` on lies within 16 lanes.
    #[inline(always)]
    unsafe fn choose<V: Lanes, const K: usize>(&mut self, first: usize) {
        let (width, limited) = (self.r.experts / self.r.n_group, self.r.topk_group < self.r.n_group);
        // SAFETY: the caller's promise.
        unsafe {
            let (zero, one) = (V::splat(0.0), V::splat(1.0));
            let mut groups = Best::<V, PLACES>::none();
            if limited {
                (0..self.r.n_group).for_each(|g| groups.insert(self.judge(first, g * width..(g + 1) * width), g));
            }
            let (mut best, mut fit) = (Best::<V, K>::none(), one);
            for g in 0..self.r.n_group {
                let limit = if limited { groups.limit(self.r.topk_group, g) } else { zero };
                for e in g * width..(g + 1) * width {
                    let x: V = self.choice(first, e);
                    fit = x.greater(V::splat(LEAST), fit, zero);
                    best.insert(x.add(limit), e);
                }
            }
            for (chosen, indices) in self.chosen.iter_mut().zip(best.indices) {
                indices.store(chosen[first..].as_mut_ptr());
            }
            let mut lanes = [0.0; SQUARE];
            fit.store(lanes.as_mut_ptr());
            for (l, &fit) in lanes[..V::N].iter().enumerate() {
                *self.left |= u32::from(fit == 0.0) << (first + l);
            }
        }
    }

    /// # Safety
    /// As above, here and below.
    #[inline(always)]
    unsafe fn choice<V: Lanes>(&self, first: usize, e: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let score = V::load(self.columns[e][first..].as_ptr());
            self.bias.map_or(score, |bias| score.add(V::splat(bias[e])))
        }
    }

    #[inline(always)]
    unsafe fn judge<V: Lanes>(&self, first: usize, group: std::ops::Range<usize>) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            let (mut best, mut second) = (V::splat(f32::NEG_INFINITY), V::splat(f32::NEG_INFINITY));
            for e in group {
                let x: V = self.choice(first, e);
                second = second.max(x.greater(best, best, x));
                best = best.max(x);
            }
            if self.r.group_score == GroupScore::TopTwo { best.add(second) } else { best }
        }
    }
}

/// The largest values so far of every lane, in descending order, and whose they are.
struct Best<V, const K: usize> {
    values: [V; K],
    indices: [V; K],
}

impl<V: Lanes, const K: usize> Best<V, K> {
    #[inline(always)]
    unsafe fn none() -> Self {
        // SAFETY: the caller is compiled for the level, here and below.
        unsafe { Self { values: [V::splat(f32::NEG_INFINITY); K], indices: [V::splat(ORIGIN); K] } }
    }

    /// Takes in the values of an index above those before: among equals it goes last. -inf and NaN find no place.
    #[inline(always)]
    unsafe fn insert(&mut self, x: V, index: usize) {
        let Self { values, indices } = self;
        // SAFETY: as above.
        unsafe {
            let index = V::splat(ORIGIN + index as f32);
            for j in (1..K).rev() {
                // What goes before the place above moves that one's down to this.
                let value = x.greater(values[j - 1], values[j - 1], x);
                let of = x.greater(values[j - 1], indices[j - 1], index);
                indices[j] = x.greater(values[j], of, indices[j]);
                values[j] = x.greater(values[j], value, values[j]);
            }
            indices[0] = x.greater(values[0], index, indices[0]);
            values[0] = x.greater(values[0], x, values[0]);
        }
    }

    /// What is added to the values of a group: zero where it is among the first `k`, elsewhere -inf.
    #[inline(always)]
    unsafe fn limit(&self, k: usize, group: usize) -> V {
        // SAFETY: as above.
        unsafe {
            let (group, mut limit) = (V::splat(ORIGIN + group as f32), V::splat(f32::NEG_INFINITY));
            for index in &self.indices[..k] {
                let apart = index.sub(group);
                limit = V::splat(0.5).greater(apart.mul(apart), V::splat(0.0), limit);
            }
            limit
        }
    }
}
