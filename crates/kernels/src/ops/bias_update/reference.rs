//! The update by rational comparison: a load against the mean as a quotient and its remainder.

use std::cmp::Ordering;

/// The new biases.
pub fn step(load: &[i64], gamma: f32, bias: &[f32]) -> Vec<f32> {
    let (total, n) = (load.iter().sum::<i64>(), load.len() as i64);
    let (mean, rest) = (total / n, total % n);
    let change = |l: i64| match l.cmp(&mean) {
        Ordering::Greater => -gamma,
        Ordering::Equal if rest == 0 => 0.0,
        _ => gamma,
    };
    load.iter().zip(bias).map(|(&l, b)| b + change(l)).collect()
}
