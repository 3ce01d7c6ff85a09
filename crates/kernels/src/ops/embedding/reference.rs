//! The look-up and its gradient in f64.

pub fn forward(ids: &[i32], table: &[f64], d: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| table[id as usize * d..][..d].to_vec()).collect()
}

pub fn backward(ids: &[i32], dy: &[f64], d: usize, vocabulary: usize) -> Vec<f64> {
    let mut dtable = vec![0.0; vocabulary * d];
    for (n, &id) in ids.iter().enumerate() {
        for c in 0..d {
            dtable[id as usize * d + c] += dy[n * d + c];
        }
    }
    dtable
}
