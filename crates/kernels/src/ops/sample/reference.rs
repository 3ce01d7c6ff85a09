//! The contract in f64: a full sort, the kept probabilities by id, and the draw.

use super::Params;
use hadal_numerics::{Purpose, Rng};

/// Log-probabilities at the row's temperature (1 if greedy), before truncation.
pub fn log_probabilities(logits: &[f64], p: &Params) -> Vec<f64> {
    let temperature = if p.temperature == 0.0 { 1.0 } else { f64::from(p.temperature) };
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let z: Vec<f64> = logits.iter().map(|l| (l - max) / temperature).collect();
    let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
    z.iter().map(|z| z - lse).collect()
}

/// Probabilities by id of what truncation leaves, adding up to 1.
pub fn kept(logits: &[f64], p: &Params) -> Vec<f64> {
    let logp = log_probabilities(logits, p);
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if p.temperature == 0.0 {
        ids.truncate(1);
    } else if p.top_k > 0 {
        ids.truncate(p.top_k);
    }
    let sum = |ids: &[usize]| ids.iter().map(|&j| logp[j].exp()).sum::<f64>();
    if p.top_p < 1.0 {
        let mass = f64::from(p.top_p) * sum(&ids);
        let enough = (1..=ids.len()).find(|&n| sum(&ids[..n]) >= mass);
        ids.truncate(enough.unwrap_or(ids.len()));
    }
    let mut out = vec![0.0; logits.len()];
    for &j in &ids {
        out[j] = logp[j].exp() / sum(&ids);
    }
    out
}

/// The token and its log-probability.
pub fn sample(logits: &[f64], p: &Params) -> (usize, f64) {
    let u = Rng::new(p.seed, Purpose::Sample, p.request).uniform(p.position);
    let mut sum = 0.0;
    let exceeds = |q: &f64| {
        sum += q;
        sum > u
    };
    let kept = kept(logits, p);
    let last = kept.iter().rposition(|&q| q > 0.0).expect("a probability above zero");
    let id = kept.iter().position(exceeds).unwrap_or(last);
    (id, log_probabilities(logits, p)[id])
}
