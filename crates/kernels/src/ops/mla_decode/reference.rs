//! Absorbed attention as its formula says, one query at a time, in f64.

use super::BLOCK;

/// What the formula needs, in f64.
#[derive(Clone)]
pub struct Inputs {
    pub heads: usize,
    pub latent: usize,
    pub rope: usize,
    pub scale: f64,
    pub q: Vec<f64>,
    pub cache: Vec<f64>,
    pub block_table: Vec<i32>,
    pub cu_q: Vec<i32>,
    pub lengths: Vec<i32>,
}

/// out and lse.
pub fn forward(x: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let width = x.latent + x.rope;
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for s in 0..x.lengths.len() {
        let max_blocks = x.block_table.len() / x.lengths.len();
        let row = |k: usize| {
            let block = x.block_table[s * max_blocks + k / BLOCK] as usize;
            &x.cache[(block * BLOCK + k % BLOCK) * width..][..width]
        };
        for n in x.cu_q[s]..x.cu_q[s + 1] {
            let keys = (x.lengths[s] - (x.cu_q[s + 1] - 1 - n)).max(0) as usize;
            for h in 0..x.heads {
                let q = &x.q[(n as usize * x.heads + h) * width..][..width];
                let score = |k| q.iter().zip(row(k)).map(|(a, b)| a * b).sum::<f64>() * x.scale;
                let scores: Vec<f64> = (0..keys).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
                lses.push(if keys == 0 { f64::NEG_INFINITY } else { max + sum.ln() });
                let weighted = |c: usize| (0..keys).map(|k| (scores[k] - max).exp() / sum * row(k)[c]).sum::<f64>();
                out.extend((0..x.latent).map(weighted));
            }
        }
    }
    (out, lses)
}
