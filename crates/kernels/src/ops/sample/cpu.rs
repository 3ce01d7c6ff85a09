//! One row a task. Truncation only finds the rank at which the kept ids end; the draw then walks all ids in ascending
//! order and passes over what ranks below. Nothing is sorted beyond what is kept.

use super::Params;
use crate::Cpu;
use crate::math::exp;
use hadal_numerics::{Purpose, Rng};
use std::cmp::Ordering;

/// See the module's contract; sizes and parameters have been checked.
pub(super) fn sample(cpu: &Cpu, logits: &[f32], params: &[Params], tokens: &mut [i32], logp: &mut [f32]) {
    let v = logits.len() / params.len();
    cpu.chunks2_mut((tokens, 1), (logp, 1), |r, token, logp| {
        let (id, lp) = row(r, &logits[r * v..(r + 1) * v], &params[r]);
        (token[0], logp[0]) = (id as i32, lp);
    });
}

/// The token of row `r` and its log-probability.
fn row(r: usize, logits: &[f32], p: &Params) -> (usize, f32) {
    let best = most_likely(r, logits);
    let max = logits[best];
    let greedy = p.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { p.temperature };
    let scaled: Vec<f32> = logits.iter().map(|l| (l - max) / temperature).collect();
    let weights: Vec<f32> = scaled.iter().map(|&t| exp(t)).collect();
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let id = if greedy { best } else { Ranked { scaled: &scaled, weights: &weights }.draw(p, total) };
    (id, (f64::from(scaled[id]) - total.ln()) as f32)
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

/// One row: logits relative to the largest, over the temperature, and their exponentials.
struct Ranked<'a> {
    scaled: &'a [f32],
    weights: &'a [f32],
}

impl Ranked<'_> {
    /// A random id among those that the truncation keeps; `total` is the sum of all weights.
    fn draw(&self, p: &Params, total: f64) -> usize {
        let v = self.scaled.len();
        let mut last = None;
        let mut kept = total;
        let mut ids = Vec::new();
        if (p.top_k > 0 && p.top_k < v) || p.top_p < 1.0 {
            ids = (0..v as u32).collect();
        }
        if p.top_k > 0 && p.top_k < v {
            ids.select_nth_unstable_by(p.top_k - 1, |&a, &b| self.rank(a, b));
            ids.truncate(p.top_k);
            last = ids.iter().copied().max_by(|&a, &b| self.rank(a, b));
            kept = self.kept(last).map(|(_, w)| w).sum();
        }
        if p.top_p < 1.0 {
            last = Some(self.nucleus(&mut ids, f64::from(p.top_p) * kept));
            kept = self.kept(last).map(|(_, w)| w).sum();
        }
        let u = Rng::new(p.seed, Purpose::Sample, p.request).uniform(p.position) * kept;
        let (mut sum, mut id) = (0.0, 0);
        for (j, w) in self.kept(last).filter(|&(_, w)| w > 0.0) {
            (sum, id) = (sum + w, j);
            if sum > u {
                break;
            }
        }
        id
    }

    /// The more likely first, then the lower id: a total order, for no value is a NaN.
    fn rank(&self, a: u32, b: u32) -> Ordering {
        let of = |id: u32| self.scaled[id as usize];
        of(b).partial_cmp(&of(a)).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    }

    /// Ids and weights, ids ascending, of all that rank no lower than `last` (None: all).
    fn kept(&self, last: Option<u32>) -> impl Iterator<Item = (usize, f64)> {
        let all = self.weights.iter().enumerate();
        let within = move |j: usize| last.is_none_or(|last| self.rank(j as u32, last) != Ordering::Greater);
        all.filter(move |&(j, _)| within(j)).map(|(j, &w)| (j, f64::from(w)))
    }

    /// The last id, by rank, of the shortest run of the most likely `ids` whose weights add up to `mass`. Sorts ever longer
    /// beginnings of the ranking, for the run is nearly always a small part of the vocabulary.
    fn nucleus(&self, ids: &mut [u32], mass: f64) -> u32 {
        let mut n = 64;
        loop {
            n = n.min(ids.len());
            if n < ids.len() {
                ids.select_nth_unstable_by(n - 1, |&a, &b| self.rank(a, b));
            }
            ids[..n].sort_unstable_by(|&a, &b| self.rank(a, b));
            let mut sum = 0.0;
            for &id in &ids[..n] {
                sum += f64::from(self.weights[id as usize]);
                if sum >= mass {
                    return id;
                }
            }
            if n == ids.len() {
                return ids[n - 1];
            }
            n *= 8;
        }
    }
}
