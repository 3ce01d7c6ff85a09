//! Time: medians of interleaved runs, by the host's clock or by marks that a GPU passes.

use hadal_kernels::Device;
use std::time::Instant;

/// Work that can be done again and again.
pub type Work = Box<dyn FnMut()>;

/// How much to measure, on what.
#[derive(Clone)]
pub struct Budget {
    repeats: usize,
    seconds: f64,
    device: Device,
}

/// A timed run takes at least so long: shorter work is done several times in it, so that the clock does not count.
const SHORTEST: f64 = 1e-3;

/// Most timed runs of a case that can be asked for: a number with digits too many would never end.
const MOST_REPEATS: usize = 1_000_000;

impl Budget {
    /// At least `repeats` timed runs, and more until `seconds` have passed.
    pub fn new(repeats: usize, seconds: f64, device: &Device) -> anyhow::Result<Self> {
        let counts = 1..=MOST_REPEATS;
        anyhow::ensure!(
            counts.contains(&repeats),
            "--repeats {repeats}: expected at least 1, at most {MOST_REPEATS} (--seconds asks for longer runs)"
        );
        anyhow::ensure!((0.0..=3600.0).contains(&seconds), "--seconds {seconds}: expected a number from 0 to 3600");
        Ok(Self { repeats, seconds, device: device.clone() })
    }

    /// As much as a peak needs on a GPU, which is measured before and after every case.
    pub fn short(&self) -> Self {
        Self { repeats: self.repeats.min(5), seconds: 0.0, device: self.device.clone() }
    }

    /// Seconds that one doing of each work took, run by run: each twice to warm up, then in turns.
    pub fn interleaved(&self, works: &mut [Work]) -> Vec<Vec<f64>> {
        let short = self.seconds.min(SHORTEST);
        let times_of = |work: &mut Work| {
            work();
            (short / self.timed(work, 1)).ceil().clamp(1.0, 1e6) as usize
        };
        let times: Vec<usize> = works.iter_mut().map(times_of).collect();
        let mut all = vec![Vec::new(); works.len()];
        let begin = Instant::now();
        while all[0].len() < self.repeats || begin.elapsed().as_secs_f64() < self.seconds {
            for ((work, &times), all) in works.iter_mut().zip(&times).zip(&mut all) {
                all.push(self.timed(work, times));
            }
        }
        all
    }

    /// Seconds of one of `times` doings.
    fn timed(&self, work: &mut Work, times: usize) -> f64 {
        let mut all = || (0..times).for_each(|_| work());
        let seconds = match self.device.as_cuda() {
            Some(cuda) => cuda.time(all),
            None => {
                let begin = Instant::now();
                all();
                begin.elapsed().as_secs_f64()
            }
        };
        // A clock that stood still would make a rate infinite, which JSON has no number for.
        seconds.max(1e-9) / times as f64
    }
}

/// The middle one; of an even number the mean of the middle two.
pub fn median(xs: &[f64]) -> f64 {
    let mut xs = xs.to_vec();
    xs.sort_by(f64::total_cmp);
    let mid = xs.len() / 2;
    match xs.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => xs[mid],
        _ => (xs[mid - 1] + xs[mid]) / 2.0,
    }
}

/// The least and the largest.
pub fn spread(xs: &[f64]) -> [f64; 2] {
    [xs.iter().copied().fold(f64::INFINITY, f64::min), xs.iter().copied().fold(f64::NEG_INFINITY, f64::max)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), [1.0, 3.0]);
    }

    #[test]
    fn runs_take_turns() {
        let log = Rc::new(Cell::new(0u64));
        let work = |digit: u64| -> Work {
            let log = log.clone();
            Box::new(move || log.set(log.get() * 10 + digit))
        };
        let device = Device::cpu(Some(1)).unwrap();
        let times = Budget::new(3, 0.0, &device).unwrap().interleaved(&mut [work(1), work(2)]);
        assert_eq!(log.get(), 1_122_121_212);
        assert!(times.len() == 2 && times.iter().all(|t| t.len() == 3 && t.iter().all(|&s| s > 0.0)));
    }

    #[test]
    fn budgets_that_cannot_be_are_refused() {
        let device = Device::cpu(Some(1)).unwrap();
        for repeats in [0, MOST_REPEATS + 1, usize::MAX] {
            assert!(Budget::new(repeats, 1.0, &device).is_err(), "{repeats}");
        }
        for seconds in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(Budget::new(1, seconds, &device).is_err(), "{seconds}");
        }
    }
}
