//! The products in f64, one sum after another.

/// `C[m, n]` = op(A) op(B), dense; A is `[m, k]` or, if `ta`, `[k, m]`; B is `[k, n]` or, if `tb`, `[n, k]`.
pub fn product(m: usize, n: usize, k: usize, a: &[f64], ta: bool, b: &[f64], tb: bool) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                let x = if ta { a[l * m + i] } else { a[i * k + l] };
                let y = if tb { b[j * k + l] } else { b[l * n + j] };
                c[i * n + j] += x * y;
            }
        }
    }
    c
}

/// `y[N, out]` = `x[N, in]` W^T.
pub fn linear(x: &[f64], w: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let n = x.len() / cols;
    let mut y = vec![0.0; n * rows];
    for t in 0..n {
        for o in 0..rows {
            for i in 0..cols {
                y[t * rows + o] += x[t * cols + i] * w[o * cols + i];
            }
        }
    }
    y
}

/// (dx, dW) of [`linear`].
pub fn linear_backward(x: &[f64], w: &[f64], dy: &[f64], rows: usize, cols: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    for t in 0..x.len() / cols {
        for o in 0..rows {
            for i in 0..cols {
                dx[t * cols + i] += dy[t * rows + o] * w[o * cols + i];
                dw[o * cols + i] += dy[t * rows + o] * x[t * cols + i];
            }
        }
    }
    (dx, dw)
}
