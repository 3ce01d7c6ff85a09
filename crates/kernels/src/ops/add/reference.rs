//! The sum in f64. Its gradients are the output's own.

pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

pub fn blend(weight: f64, a: &[f64], out: &[f64]) -> Vec<f64> {
    a.iter().zip(out).map(|(a, o)| (1.0 - weight) * o + weight * a).collect()
}
