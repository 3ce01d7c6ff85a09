//! The experts' linears in f64, row by row.

/// The rows of tokens `[N, dim]` in the order of a plan.
pub fn sorted(tokens: &[f64], slot_of_row: &[i32], top_k: usize, dim: usize) -> Vec<f64> {
    slot_of_row.iter().flat_map(|&slot| tokens[slot as usize / top_k * dim..][..dim].iter().copied()).collect()
}

/// `y[row, out]` = `x[row, in]` W_e^T.
pub fn forward(x: &[f64], offsets: &[i32], w: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut y = vec![0.0; *offsets.last().unwrap() as usize * rows];
    for e in 0..offsets.len() - 1 {
        for t in offsets[e] as usize..offsets[e + 1] as usize {
            for o in 0..rows {
                for i in 0..cols {
                    y[t * rows + o] += x[t * cols + i] * w[(e * rows + o) * cols + i];
                }
            }
        }
    }
    y
}

/// (dx, dW).
pub fn backward(x: &[f64], dy: &[f64], offsets: &[i32], w: &[f64], rows: usize, cols: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw) = (vec![0.0; *offsets.last().unwrap() as usize * cols], vec![0.0; w.len()]);
    for e in 0..offsets.len() - 1 {
        for t in offsets[e] as usize..offsets[e + 1] as usize {
            for o in 0..rows {
                for i in 0..cols {
                    dx[t * cols + i] += dy[t * rows + o] * w[(e * rows + o) * cols + i];
                    dw[(e * rows + o) * cols + i] += dy[t * rows + o] * x[t * cols + i];
                }
            }
        }
    }
    (dx, dw)
}
