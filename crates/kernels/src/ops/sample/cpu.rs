//! One row a task. Truncation only finds the id at which the ranking of the kept ends; the draw then walks all ids in
//! ascending order and passes over what ranks below. The vocabulary is never sorted.

use super::Params;
use crate::Cpu;
use crate::isa::{Isa, vectorised};
use crate::math::exp;
use hadal_numerics::{Purpose, Rng};
use std::cmp::Ordering;

/// See the module's contract; sizes and parameters have been checked.
pub(super) fn sample(cpu: &Cpu, logits: &[f32], params: &[Params], tokens: &mut [i32], logp: &mut [f32]) {
    let v = logits.len() / params.len();
    cpu.chunks2_mut((tokens, 1), (logp, 1), |r, token, logp| {
        let (id, lp) = row(cpu.isa(), r, &logits[r * v..(r + 1) * v], &params[r]);
        (token[0], logp[0]) = (id as i32, lp);
    });
}

/// See the module's contract; sizes have been checked.
pub(super) fn finite(cpu: &Cpu, x: &[f32], out: &mut [i32]) {
    let v = x.len() / out.len();
    cpu.chunks_mut(out, 1, |r, out| out[0] = x[r * v..(r + 1) * v].iter().all(|x| x.is_finite()).into());
}

/// The token of row `r` and its log-probability.
fn row(isa: Isa, r: usize, logits: &[f32], p: &Params) -> (usize, f32) {
    let best = most_likely(r, logits);
    let greedy = p.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { p.temperature };
    let (mut scaled, mut weights) = (vec![0.0; logits.len()], vec![0.0; logits.len()]);
    exponentials(isa, logits, logits[best], temperature, &mut scaled, &mut weights);
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let id = if greedy { best } else { Row { scaled: &scaled, weights: &weights }.draw(p) };
    (id, (f64::from(scaled[id]) - total.ln()) as f32)
}

vectorised! {
    /// scaled = (logits - max) / temperature, weights = e^scaled.
    fn exponentials(isa: Isa, logits: &[f32], max: f32, temperature: f32, scaled: &mut [f32], weights: &mut [f32]) {
        for ((&l, t), w) in logits.iter().zip(scaled).zip(weights) {
            *t = (l - max) / temperature;
            *w = exp(*t);
        }
    }
}

/// The first of the largest logits; panics on a row that has none to draw from.
#[track_caller]
fn most_likely(r: usize, logits: &[f32]) -> usize {
    let mut best = 0;
    for (j, &l) in logits.iter().enumerate() {
        assert!(l < f32::INFINITY, "sample: logit [{r}, {j}] is {l}: the model's output is not finite");
        if l > logits[best] {
            best = j;
        }
    }
    assert!(logits[best] > f32::NEG_INFINITY, "sample: all {} logits of row {r} are -inf", logits.len());
    best
}

/// One row: logits relative to the largest, over the temperature (never above 0), and their exponentials.
struct Row<'a> {
    scaled: &'a [f32],
    weights: &'a [f32],
}

impl Row<'_> {
    /// A random id among those that the truncation keeps.
    fn draw(&self, p: &Params) -> usize {
        let mut last = None;
        if p.top_k > 0 && p.top_k < self.scaled.len() {
            last = Some(self.ranked(p.top_k - 1));
        }
        if p.top_p < 1.0 {
            last = Some(self.nucleus(last, f64::from(p.top_p) * self.mass(last)));
        }
        let u = Rng::new(p.seed, Purpose::Sample, p.request).uniform(p.position) * self.mass(last);
        let (mut sum, mut id) = (0.0, 0);
        // Should rounding keep the sum from exceeding u, the last id that can be drawn is.
        for (j, w) in self.kept(last).filter(|&(_, w)| w > 0.0) {
            (sum, id) = (sum + w, j);
            if sum > u {
                break;
            }
        }
        id
    }

    /// The more likely first, then the lower id: a total order, for no value is a NaN.
    fn rank(&self, a: usize, b: usize) -> Ordering {
        self.scaled[b].partial_cmp(&self.scaled[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    }

    /// The id that `n` others rank before.
    fn ranked(&self, n: usize) -> usize {
        let mut ids: Vec<usize> = (0..self.scaled.len()).collect();
        *ids.select_nth_unstable_by(n, |&a, &b| self.rank(a, b)).1
    }

    /// Ids and weights, ids ascending, of all that rank no lower than `last` (None: all).
    fn kept(&self, last: Option<usize>) -> impl Iterator<Item = (usize, f64)> {
        let within = move |j: usize| last.is_none_or(|last| self.rank(j, last).is_le());
        let all = self.weights.iter().enumerate();
        all.filter(move |&(j, _)| within(j)).map(|(j, &w)| (j, f64::from(w)))
    }

    fn mass(&self, last: Option<usize>) -> f64 {
        self.kept(last).map(|(_, w)| w).sum()
    }

    /// The lowest ranked of the smallest set of the most likely, among those kept up to `last`, whose weights add up to
    /// `mass`. Only the bucket in which the sum gets there is sorted.
    fn nucleus(&self, last: Option<usize>, mass: f64) -> usize {
        let mut buckets = vec![0.0; bucket(f32::NEG_INFINITY) + 1];
        let mut filled = 0;
        for (j, w) in self.kept(last) {
            let b = bucket(self.scaled[j]);
            buckets[b] += w;
            filled = b.max(filled);
        }
        let mut sum = 0.0;
        let reached = (0..filled).find(|&b| {
            let there = sum + buckets[b] >= mass;
            sum += if there { 0.0 } else { buckets[b] };
            there
        });
        let edge = reached.unwrap_or(filled);
        let mut ids: Vec<usize> = self.kept(last).map(|(j, _)| j).filter(|&j| bucket(self.scaled[j]) == edge).collect();
        ids.sort_unstable_by(|&a, &b| self.rank(a, b));
        let enough = ids.iter().position(|&j| {
            sum += f64::from(self.weights[j]);
            sum >= mass
        });
        ids[enough.unwrap_or(ids.len() - 1)]
    }
}

/// Buckets of values at most 0 in descending order: exponent and the first six bits of the mantissa.
fn bucket(t: f32) -> usize {
    (t.abs().to_bits() >> 17) as usize
}
