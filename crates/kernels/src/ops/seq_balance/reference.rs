//! The balance loss of one sequence in f64.

/// f_i of one sequence, scores `[T, E]`.
pub fn load(scores: &[f64], experts: usize, top_k: usize) -> Vec<f64> {
    let tokens = scores.len() / experts;
    let mut f = vec![0.0; experts];
    for s in scores.chunks(experts) {
        let mut order: Vec<usize> = (0..experts).collect();
        // Stable: among equals the lowest index comes first.
        order.sort_by(|&a, &b| s[b].partial_cmp(&s[a]).unwrap());
        for &e in &order[..top_k] {
            f[e] += experts as f64 / (top_k * tokens) as f64;
        }
    }
    f
}

/// L_s for a given load.
pub fn loss(scores: &[f64], f: &[f64]) -> f64 {
    let tokens = (scores.len() / f.len()) as f64;
    let mut loss = 0.0;
    for s in scores.chunks(f.len()) {
        let z: f64 = s.iter().sum();
        for (s, f) in s.iter().zip(f) {
            loss += f * s / z / tokens;
        }
    }
    loss
}

/// dL_s / dscores for a given load.
pub fn gradient(scores: &[f64], f: &[f64]) -> Vec<f64> {
    let tokens = (scores.len() / f.len()) as f64;
    let mut d = Vec::new();
    for s in scores.chunks(f.len()) {
        let z: f64 = s.iter().sum();
        let dot: f64 = s.iter().zip(f).map(|(s, f)| s * f).sum();
        d.extend(f.iter().map(|f| (f / z - dot / (z * z)) / tokens));
    }
    d
}
