//! The gradient of a row of logits, on the host's cores.

use super::{Gradients, Inputs};
use crate::isa::{Isa, vectorised};
use crate::math::exp;

/// What turns a row's logits into their gradients: dz = e^(z - lse) (all + spread (z - lse + entropy)), plus the
/// gradients at single ids. The division by the temperature is in the factors.
pub(super) struct RowGradient {
    lse: f32,
    entropy: f32,
    all: f32,
    spread: f32,
    pub target: i32,
    pub d_target: f32,
}

pub(super) fn row_gradients(x: &Inputs<'_>, lse: &[f32], entropy: &[f32], d: &Gradients<'_>) -> Vec<RowGradient> {
    let (targets, d_logp) = (x.targets.i32(), d.d_logp.f32());
    let scale = 1.0 / x.temperature;
    let row = |r: usize| {
        let d_target = if targets[r] < 0 { 0.0 } else { d_logp[r] };
        let mut all = f64::from(d_target);
        if let Some(d_given) = d.d_given {
            let g = d_given.len() / targets.len();
            all += d_given.f32()[r * g..][..g].iter().map(|&d| f64::from(d)).sum::<f64>();
        }
        let (entropy, spread) = d.d_entropy.map_or((0.0, 0.0), |d| (entropy[r], -d.f32()[r] * scale));
        let all = (-all * f64::from(scale)) as f32;
        RowGradient { lse: lse[r], entropy, all, spread, target: targets[r], d_target: d_target * scale }
    };
    (0..targets.len()).map(row).collect()
}

impl RowGradient {
    /// Logits in, gradients out, but for those at single ids.
    pub fn apply(&self, isa: Isa, z: &mut [f32], scale: f32) {
        if self.all == 0.0 && self.spread == 0.0 {
            // A row without a gradient costs nothing, and what its logits are does not matter.
            z.fill(0.0);
            return;
        }
        softmax_gradient(isa, z, scale, self.lse, self.entropy, self.all, self.spread);
    }
}

vectorised! {
    fn softmax_gradient(isa: Isa, z: &mut [f32], scale: f32, lse: f32, entropy: f32, all: f32, spread: f32) {
        for z in z {
            let t = *z * scale - lse;
            *z = exp(t) * (all + spread * (t + entropy));
        }
    }
}
