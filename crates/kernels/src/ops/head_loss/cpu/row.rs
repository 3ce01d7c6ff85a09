//! What a row's outputs are made of, slice by slice.

use crate::isa::{Isa, vectorised};
use crate::math::exp;

/// Partial sums that a row keeps within a slice.
const LANES: usize = 16;

/// What one row has gathered from the slices so far, relative to its largest logit.
#[derive(Clone, Copy, Default)]
pub struct Row {
    /// Largest z.
    max: f64,
    /// sum of e^(z - max); zero before the first slice.
    sum: f64,
    /// sum of e^(z - max) (z - max).
    dot: f64,
    /// z of the target.
    pub target: f32,
}

impl Row {
    /// Takes in the row's logits of the next slice.
    pub fn add(&mut self, isa: Isa, x: &[f32], scale: f32) {
        let max = largest(isa, x) * scale;
        let (sum, dot) = exp_sums(isa, x, scale, max);
        let new = Row { max: f64::from(max), sum, dot, ..*self };
        *self = if self.sum == 0.0 { new } else { self.merge(&new) };
    }

    /// Both sums relative to the larger of the two maxima.
    fn merge(&self, b: &Row) -> Row {
        let max = self.max.max(b.max);
        let (da, db) = (self.max - max, b.max - max);
        let (ea, eb) = (da.exp(), db.exp());
        Row {
            max,
            sum: self.sum * ea + b.sum * eb,
            dot: (self.dot + self.sum * da) * ea + (b.dot + b.sum * db) * eb,
            target: self.target,
        }
    }

    pub fn lse(&self) -> f64 {
        self.max + self.sum.ln()
    }

    /// lse - sum p z, with the maximum cancelled by hand.
    pub fn entropy(&self) -> f64 {
        self.sum.ln() - self.dot / self.sum
    }
}

vectorised! {
    /// The largest element. A NaN may be taken for it, or passed over.
    fn largest(isa: Isa, x: &[f32]) -> f32 {
        // Floats in ascending order have ascending keys, and a maximum of integers may be taken in any order. Flipping
        // the lower bits of a negative is its own inverse.
        let flip = |bits: i32| bits ^ ((bits >> 31) & i32::MAX);
        let key = x.iter().map(|x| flip(x.to_bits() as i32)).fold(i32::MIN, i32::max);
        f32::from_bits(flip(key) as u32)
    }
}

vectorised! {
    /// sum of e^t and of e^t t, with t = x scale - max.
    fn exp_sums(isa: Isa, x: &[f32], scale: f32, max: f32) -> (f64, f64) {
        let (mut sum, mut dot) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (blocks, rest) = x.as_chunks::<LANES>();
        let mut add = |l: usize, x: f32| {
            let t = x * scale - max;
            let e = exp(t);
            sum[l] += e;
            dot[l] += e * t;
        };
        for b in blocks {
            for l in 0..LANES {
                add(l, b[l]);
            }
        }
        rest.iter().enumerate().for_each(|(l, &x)| add(l, x));
        let total = |lanes: [f32; LANES]| lanes.iter().fold(0.0, |a, &b| a + f64::from(b));
        (total(sum), total(dot))
    }
}
