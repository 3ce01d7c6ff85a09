//! Rows moved and added one element at a time, in f64.

pub fn gather(x: &[f64], dim: usize, index: &[i32]) -> Vec<f64> {
    index.iter().flat_map(|&i| (0..dim).map(move |c| x[i as usize * dim + c])).collect()
}

/// x with d's rows added where `index` says.
pub fn scatter_add(d: &[f64], dim: usize, index: &[i32], x: &[f64]) -> Vec<f64> {
    let mut out = x.to_vec();
    for (n, &i) in index.iter().enumerate() {
        for c in 0..dim {
            out[i as usize * dim + c] += d[n * dim + c];
        }
    }
    out
}
