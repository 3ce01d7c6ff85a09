//! The gate of one token in f64. Selection is by sorting all experts, so that its tie rule is plain to see.

use super::{Config, GroupScore, Scoring};

/// One token's scores, choice and weights.
pub struct Token {
    pub scores: Vec<f64>,
    pub indices: Vec<usize>,
    pub weights: Vec<f64>,
}

pub fn forward(c: &Config, logits: &[f64], bias: &[f64], given: Option<&[usize]>) -> Token {
    let scores = score(c.scoring, logits);
    let indices = given.map_or_else(|| select(c, &scores, bias), <[usize]>::to_vec);
    let mut z = 1.0;
    if c.norm_topk_prob {
        z = indices.iter().map(|&e| scores[e]).sum::<f64>() + 1e-20;
    }
    let weights = indices.iter().map(|&e| scores[e] / z * f64::from(c.scale)).collect();
    Token { scores, indices, weights }
}

fn score(by: Scoring, logits: &[f64]) -> Vec<f64> {
    match by {
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let largest = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(x));
            let e: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|x| x / sum).collect()
        }
    }
}

/// Indices in descending order of value, NaN last; a stable sort keeps the lowest index first among equals.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let nan = |i: usize| values[i].is_nan();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap_or_else(|| nan(a).cmp(&nan(b))));
    order
}

pub fn select(c: &Config, scores: &[f64], bias: &[f64]) -> Vec<usize> {
    let choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let width = c.experts / c.n_group;
    let judged: Vec<f64> = choice
        .chunks(width)
        .map(|group| {
            // A NaN has no part in it.
            let at = |place: usize| group[descending(group)[place]].max(f64::NEG_INFINITY);
            match c.group_score {
                GroupScore::Max => at(0),
                GroupScore::TopTwo if width > 1 => at(0) + at(1),
                // Only with one group, where the judgement does not matter.
                GroupScore::TopTwo => at(0),
            }
        })
        .collect();
    let kept = &descending(&judged)[..c.topk_group];
    descending(&choice).into_iter().filter(|e| kept.contains(&(e / width))).take(c.top_k).collect()
}

/// d_logits of one token.
pub fn backward(c: &Config, scores: &[f64], indices: &[usize], d_weights: &[f64], d_scores: &[f64]) -> Vec<f64> {
    let mut ds = d_scores.to_vec();
    let scale = f64::from(c.scale);
    if c.norm_topk_prob {
        let z = indices.iter().map(|&e| scores[e]).sum::<f64>() + 1e-20;
        // dw_j / ds_k = scale ([j = k] / Z - s_j / Z^2).
        for &e in indices {
            for (j, &other) in indices.iter().enumerate() {
                let same = if other == e { 1.0 } else { 0.0 };
                ds[e] += d_weights[j] * scale * (same / z - scores[other] / (z * z));
            }
        }
    } else {
        for (j, &e) in indices.iter().enumerate() {
            ds[e] += d_weights[j] * scale;
        }
    }
    let mean: f64 = ds.iter().zip(scores).map(|(d, s)| d * s).sum();
    ds.iter()
        .zip(scores)
        .map(|(d, s)| match c.scoring {
            Scoring::Sigmoid => d * s * (1.0 - s),
            Scoring::Softmax => s * (d - mean),
        })
        .collect()
}
