//! The formulas of the contract over all logits at once, in f64.

/// Plain inputs; `given` has G ids a row.
pub struct Inputs<'a> {
    pub hidden: &'a [f64],
    pub weight: &'a [f64],
    pub d: usize,
    pub targets: &'a [i32],
    pub temperature: f64,
    pub given: &'a [i32],
}

#[derive(Default)]
pub struct Outputs {
    pub lse: Vec<f64>,
    pub logp: Vec<f64>,
    pub entropy: Vec<f64>,
    pub given_logp: Vec<f64>,
    /// Of all V ids, most likely first.
    pub ranked: Vec<(Vec<i32>, Vec<f64>)>,
}

impl Inputs<'_> {
    fn vocabulary(&self) -> usize {
        self.weight.len() / self.d
    }

    fn given_of(&self, r: usize) -> &[i32] {
        let g = self.given.len() / self.targets.len();
        &self.given[r * g..(r + 1) * g]
    }

    /// z of row `r`.
    fn logits(&self, r: usize) -> Vec<f64> {
        let x = &self.hidden[r * self.d..(r + 1) * self.d];
        let dot = |w: &[f64]| x.iter().zip(w).map(|(a, b)| a * b).sum::<f64>();
        self.weight.chunks(self.d).map(|w| dot(w) / self.temperature).collect()
    }
}

fn log_sum_exp(z: &[f64]) -> f64 {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln()
}

pub fn forward(x: &Inputs<'_>) -> Outputs {
    let mut out = Outputs::default();
    for r in 0..x.targets.len() {
        let z = x.logits(r);
        let lse = log_sum_exp(&z);
        out.lse.push(lse);
        out.logp.push(if x.targets[r] < 0 { 0.0 } else { z[x.targets[r] as usize] - lse });
        out.entropy.push(lse - z.iter().map(|z| (z - lse).exp() * z).sum::<f64>());
        out.given_logp.extend(x.given_of(r).iter().map(|&id| z[id as usize] - lse));
        let mut ids: Vec<i32> = (0..z.len() as i32).collect();
        // A stable sort: equals stay in the order of their ids.
        ids.sort_by(|&a, &b| z[b as usize].total_cmp(&z[a as usize]));
        let logp = ids.iter().map(|&id| z[id as usize] - lse).collect();
        out.ranked.push((ids, logp));
    }
    out
}

/// Gradients of hidden and weight; `d_entropy` and `d_given` may be zeros.
pub fn backward(x: &Inputs<'_>, d_logp: &[f64], d_entropy: &[f64], d_given: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (d, v) = (x.d, x.vocabulary());
    let (mut d_hidden, mut d_weight) = (vec![0.0; x.hidden.len()], vec![0.0; x.weight.len()]);
    for r in 0..x.targets.len() {
        let z = x.logits(r);
        let lse = log_sum_exp(&z);
        let entropy = lse - z.iter().map(|z| (z - lse).exp() * z).sum::<f64>();
        let given = x.given_of(r);
        let d_given = &d_given[r * given.len()..(r + 1) * given.len()];
        for j in 0..v {
            let p = (z[j] - lse).exp();
            let one = |id: i32| if id == j as i32 { 1.0 } else { 0.0 };
            let mut dz = -d_entropy[r] * p * (z[j] - lse + entropy);
            if x.targets[r] >= 0 {
                dz += d_logp[r] * (one(x.targets[r]) - p);
            }
            for (&id, &dg) in given.iter().zip(d_given) {
                dz += dg * (one(id) - p);
            }
            dz /= x.temperature;
            for i in 0..d {
                d_hidden[r * d + i] += dz * x.weight[j * d + i];
                d_weight[j * d + i] += dz * x.hidden[r * d + i];
            }
        }
    }
    (d_hidden, d_weight)
}
