//! Attention as its formulas say, one query at a time, in f64.

use super::Shape;

/// Inputs in f64, dense as in [`super::Inputs`] (k_pe rows `k_pe_stride` apart).
#[derive(Clone)]
pub struct Inputs {
    pub q: Vec<f64>,
    pub kv_up: Vec<f64>,
    pub k_pe: Vec<f64>,
    pub cu_q: Vec<i32>,
    pub cu_k: Vec<i32>,
}

/// dq, dkv_up, dk_pe (dense rows of R).
pub struct Gradients {
    pub dq: Vec<f64>,
    pub dkv_up: Vec<f64>,
    pub dk_pe: Vec<f64>,
}

impl Inputs {
    /// The key vector of a token and head.
    fn key(&self, s: &Shape, k: usize, h: usize) -> Vec<f64> {
        let nope = &self.kv_up[(k * s.heads + h) * (s.nope + s.v)..][..s.nope];
        let rope = &self.k_pe[k * s.k_pe_stride..][..s.rope];
        nope.iter().chain(rope).copied().collect()
    }

    fn value(&self, s: &Shape, k: usize, h: usize) -> &[f64] {
        &self.kv_up[(k * s.heads + h) * (s.nope + s.v) + s.nope..][..s.v]
    }

    fn query(&self, s: &Shape, q: usize, h: usize) -> &[f64] {
        let d = s.nope + s.rope;
        &self.q[(q * s.heads + h) * d..][..d]
    }

    /// Every query with the keys it sees.
    fn queries(&self) -> Vec<(usize, std::ops::Range<usize>)> {
        let mut all = Vec::new();
        for i in 0..self.cu_q.len() - 1 {
            let (q0, q1) = (self.cu_q[i] as usize, self.cu_q[i + 1] as usize);
            let (k0, k1) = (self.cu_k[i] as usize, self.cu_k[i + 1] as usize);
            for q in q0..q1 {
                let unseen = q1 - 1 - q;
                all.push((q, k0..k0.max(k1.saturating_sub(unseen))));
            }
        }
        all
    }

    /// Probabilities of one query and head, and the log-sum-exp.
    fn probabilities(&self, s: &Shape, q: usize, h: usize, keys: std::ops::Range<usize>) -> (Vec<f64>, f64) {
        let score = |k| dot(self.query(s, q, h), &self.key(s, k, h)) * f64::from(s.scale);
        let scores: Vec<f64> = keys.map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
        let lse = if scores.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() };
        (scores.iter().map(|x| (x - lse).exp()).collect(), lse)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// out and lse.
pub fn forward(s: &Shape, x: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for (q, keys) in x.queries() {
        for h in 0..s.heads {
            let (p, lse) = x.probabilities(s, q, h, keys.clone());
            lses.push(lse);
            out.extend((0..s.v).map(|c| p.iter().zip(keys.clone()).map(|(p, k)| p * x.value(s, k, h)[c]).sum::<f64>()));
        }
    }
    (out, lses)
}

/// The chain rule through softmax and scores. `out` is the forward's as the caller kept it: the mean of a row's
/// probability gradients is dout . out, so that what rounding did to out is an input and not an error.
pub fn backward(s: &Shape, x: &Inputs, out: &[f64], dout: &[f64]) -> Gradients {
    sums(s, x, out, dout, |term| term)
}

/// Of every gradient the sum of its terms' squares: where each term is off by a rounding of its own, the root of it times
/// that rounding's deviation is the deviation of the gradient.
pub fn squares(s: &Shape, x: &Inputs, out: &[f64], dout: &[f64]) -> Gradients {
    sums(s, x, out, dout, |term| term * term)
}

fn sums(s: &Shape, x: &Inputs, out: &[f64], dout: &[f64], of: impl Fn(f64) -> f64) -> Gradients {
    let nk = x.cu_k[x.cu_k.len() - 1] as usize;
    let mut g = Gradients { dq: vec![0.0; x.q.len()], dkv_up: vec![0.0; x.kv_up.len()], dk_pe: vec![0.0; nk * s.rope] };
    let (d, row) = (s.nope + s.rope, s.nope + s.v);
    for (q, keys) in x.queries() {
        for h in 0..s.heads {
            let (p, _) = x.probabilities(s, q, h, keys.clone());
            let row_of = |x: &'_ [f64]| x[(q * s.heads + h) * s.v..][..s.v].to_vec();
            let (out, dout) = (row_of(out), row_of(dout));
            let dp: Vec<f64> = keys.clone().map(|k| dot(&dout, x.value(s, k, h))).collect();
            let mean = dot(&out, &dout);
            for (i, k) in keys.clone().enumerate() {
                let ds = p[i] * (dp[i] - mean) * f64::from(s.scale);
                let (query, key) = (x.query(s, q, h), x.key(s, k, h));
                for c in 0..d {
                    g.dq[(q * s.heads + h) * d + c] += of(ds * key[c]);
                    if c < s.nope {
                        g.dkv_up[(k * s.heads + h) * row + c] += of(ds * query[c]);
                    } else {
                        g.dk_pe[k * s.rope + c - s.nope] += of(ds * query[c]);
                    }
                }
                for c in 0..s.v {
                    g.dkv_up[(k * s.heads + h) * row + s.nope + c] += of(p[i] * dout[c]);
                }
            }
        }
    }
    g
}
