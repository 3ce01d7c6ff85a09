//! A few hundred experts: less than handing them out would cost.

/// `bias[e]` -= gamma * sign(`load[e]` * E - sum of load).
pub fn step(load: &[i32], gamma: f32, bias: &mut [f32]) {
    let total: i64 = load.iter().map(|&l| i64::from(l)).sum();
    let n = load.len() as i64;
    for (b, &l) in bias.iter_mut().zip(load) {
        *b -= gamma * (i64::from(l) * n - total).signum() as f32;
    }
}
