//! The norm and its gradients in f64, over dense rows.

/// (y, rstd).
pub fn forward(x: &[f64], w: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut rstds) = (Vec::new(), Vec::new());
    for x in x.chunks_exact(w.len()) {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / w.len() as f64;
        let rstd = (mean + eps).powf(-0.5);
        y.extend(x.iter().zip(w).map(|(x, w)| x * rstd * w));
        rstds.push(rstd);
    }
    (y, rstds)
}

/// (dx, dw).
pub fn backward(dy: &[f64], x: &[f64], w: &[f64], rstd: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let d = w.len();
    let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; d]);
    for n in 0..rstd.len() {
        let mut dot = 0.0;
        for j in 0..d {
            dot += dy[n * d + j] * w[j] * x[n * d + j];
        }
        for j in 0..d {
            let i = n * d + j;
            dx[i] = rstd[n] * dy[i] * w[j] - x[i] * rstd[n].powi(3) * dot / d as f64;
            dw[j] += dy[i] * x[i] * rstd[n];
        }
    }
    (dx, dw)
}
