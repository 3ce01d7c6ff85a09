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

/// Indices in descending order of value; a stable sort keeps the lowest index first among equals.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap());
    order
}

pub fn select(c: &Config, scores: &[f64], bias: &[f64]) -> Vec<usize> {
    let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let width = c.experts / c.n_group;
    let judged: Vec<f64> = choice
        .chunks(width)
        .map(|group| {
            let order = descending(group);
            match c.group_score {
                GroupScore::Max => group[order[0]],
                GroupScore::TopTwo if width > 1 => group[order[0]] + group[order[1]],
                // Only with one group, where the judgement does not matter.
                GroupScore::TopTwo => group[order[0]],
            }
        })
        .collect();
    for &g in &descending(&judged)[c.topk_group..] {
        choice[g * width..(g + 1) * width].fill(f64::NEG_INFINITY);
    }
    descending(&choice)[..c.top_k].to_vec()
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
