//! Scalar SwiGLU in f64.

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// y `[N, F]`.
pub fn forward(gate_up: &[f64], width: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for row in gate_up.chunks(2 * width) {
        for i in 0..width {
            let (g, u) = (row[i], row[width + i]);
            y.push(g * sigmoid(g) * u);
        }
    }
    y
}

/// (weights * y `[N, F]`, d_gate_up `[N, 2F]`, d_weights `[N]`).
pub fn backward(dy: &[f64], gate_up: &[f64], weights: &[f64], width: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut y = forward(gate_up, width);
    let (mut d, mut d_weights) = (vec![0.0; gate_up.len()], vec![0.0; weights.len()]);
    for (n, weight) in weights.iter().enumerate() {
        for i in 0..width {
            let (at_g, at_u) = (n * 2 * width + i, n * 2 * width + width + i);
            let (g, u, dy) = (gate_up[at_g], gate_up[at_u], dy[n * width + i]);
            let s = sigmoid(g);
            d[at_g] = weight * dy * u * (s + g * s * (1.0 - s));
            d[at_u] = weight * dy * g * s;
            d_weights[n] += dy * y[n * width + i];
            y[n * width + i] *= weight;
        }
    }
    (y, d, d_weights)
}
