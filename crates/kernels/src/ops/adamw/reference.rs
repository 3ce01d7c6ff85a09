//! AdamW in f64, one element at a time, as written in the papers (Kingma and Ba 2015; Loshchilov and Hutter 2019).

/// Hyperparameters of one step.
pub struct Step {
    pub norm: f64,
    pub clip: f64,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub t: i32,
}

/// Updates one weight and its moments.
pub fn update(s: &Step, decay: bool, w: &mut f64, g: f64, m: &mut f64, v: &mut f64) {
    let g = if s.clip.is_finite() { g * (s.clip / (s.norm + 1e-6)).min(1.0) } else { g };
    *m = s.beta1 * *m + (1.0 - s.beta1) * g;
    *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
    let m_hat = *m / (1.0 - s.beta1.powi(s.t));
    let v_hat = *v / (1.0 - s.beta2.powi(s.t));
    if decay {
        *w -= s.lr * s.weight_decay * *w;
    }
    *w -= s.lr * m_hat / (v_hat.sqrt() + s.eps);
}
