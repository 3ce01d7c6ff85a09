//! Learning rate by step: linear warm-up, constant, cosine to the floor (V3 report 4.2).

/// The three phases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Highest rate.
    pub peak: f64,
    /// Rate at the end.
    pub floor: f64,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Steps at the peak after warm-up.
    pub constant: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// Rate of step `step` (0-based). The first step already moves; the last step of warm-up has the peak; the last
    /// step of all has the floor.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let begin = self.warmup + self.constant;
        if step < begin {
            return self.peak;
        }
        let left = self.steps.saturating_sub(begin).max(1);
        let done = ((step + 1 - begin) as f64 / left as f64).min(1.0);
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_meet() {
        let s = Schedule { peak: 2.0, floor: 0.5, warmup: 4, constant: 3, steps: 17 };
        let r: Vec<f64> = (0..17).map(|i| s.rate(i)).collect();
        assert_eq!(r[..7], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]);
        assert!(r[7..].windows(2).all(|w| w[1] < w[0]));
        assert!((r[11] - 1.25).abs() < 1e-12, "halfway down: {}", r[11]);
        assert!((r[16] - 0.5).abs() < 1e-12);
        assert!((s.rate(100) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn without_warmup_or_decay_it_is_constant() {
        let s = Schedule { peak: 1.0, floor: 1.0, warmup: 0, constant: 0, steps: 5 };
        assert!((0..9).all(|i| s.rate(i) == 1.0));
    }
}
