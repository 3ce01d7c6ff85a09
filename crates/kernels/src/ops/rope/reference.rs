//! The rotation as its formula says, in f64.

/// Rotates the R elements of one head at `position`.
pub fn rotate(x: &[f64], position: i32, inv_freq: &[f64], factor: f64, interleaved: bool, inverse: bool) -> Vec<f64> {
    let half = x.len() / 2;
    let mut y = vec![0.0; x.len()];
    for i in 0..half {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let angle = f64::from(position) * inv_freq[i] * if inverse { -1.0 } else { 1.0 };
        y[a] = factor * (x[a] * angle.cos() - x[b] * angle.sin());
        y[b] = factor * (x[a] * angle.sin() + x[b] * angle.cos());
    }
    y
}
