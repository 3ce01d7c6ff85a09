//! The line that a run shows of itself while it trains: loss and its course, speed, time left, the last validation.

use super::text::{duration, spark};
use hadal_train::{Metrics, TrainConfig};
use std::time::{Duration, Instant};

/// Steps that speed and time left are judged by.
const RECENT: usize = 20;
/// Columns of the course of the loss over the whole run, so that the line fits a terminal of 80.
const COLUMNS: usize = 12;

/// What has been seen of a run.
pub struct Progress {
    begin: Instant,
    /// Of the whole run, those before a resumption included.
    steps: u64,
    tokens_per_step: usize,
    /// Sum and number of the losses in each column.
    course: [(f64, u32); COLUMNS],
    seconds: Vec<f64>,
    valid: Option<f64>,
}

impl Progress {
    /// Before a run of these settings; time counts from here.
    pub fn new(c: &TrainConfig) -> Self {
        Self::of(c.schedule.steps, c.batch * c.seq)
    }

    fn of(steps: u64, tokens_per_step: usize) -> Self {
        let (course, seconds) = ([(0.0, 0); COLUMNS], Vec::new());
        Self { begin: Instant::now(), steps, tokens_per_step, course, seconds, valid: None }
    }

    /// Takes a step in, and describes the run after it (without the step's number).
    pub fn step(&mut self, m: &Metrics) -> String {
        let (sum, count) = &mut self.course[self.column(m.step)];
        (*sum, *count) = (*sum + m.loss_main, *count + 1);
        self.seconds.push(m.seconds);
        self.valid = m.valid_bits_per_byte.or(self.valid);
        let recent = &self.seconds[self.seconds.len().saturating_sub(RECENT)..];
        let mean = recent.iter().sum::<f64>() / recent.len() as f64;
        let left = mean * self.steps.saturating_sub(m.step) as f64;
        let rate = self.tokens_per_step as f64 / mean;
        let line = format!("loss {:.3} {} {rate:.0} tokens/s, {} left", m.loss_main, self.course(), duration(left));
        self.valid.map_or(line.clone(), |b| format!("{line}, held out {b:.3}"))
    }

    /// The column of a step, from 1: a run of fewer steps than columns has a column for each.
    fn column(&self, step: u64) -> usize {
        let columns = (COLUMNS as u64).min(self.steps.max(1));
        (step.saturating_sub(1) * columns / self.steps.max(1)).min(columns - 1) as usize
    }

    /// The mean loss in each column; steps before a resumption and those to come have none.
    fn course(&self) -> String {
        spark(&self.course.map(|(sum, count)| (count > 0).then(|| sum / f64::from(count))))
    }

    /// Time since the run began, and tokens a second of its steps (without validation, checkpoints, tokenising); 0 if it
    /// made none.
    pub fn ended(&self) -> (Duration, f64) {
        let tokens = self.tokens_per_step * self.seconds.len();
        (self.begin.elapsed(), tokens as f64 / self.seconds.iter().sum::<f64>().max(f64::MIN_POSITIVE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64, loss: f64, valid: Option<f64>) -> Metrics {
        Metrics {
            step,
            loss,
            loss_main: loss,
            loss_mtp: 0.0,
            loss_balance: 0.0,
            lr: 0.0,
            grad_norm: 0.0,
            max_violation: 0.0,
            tokens: step * 100,
            seconds: 2.0,
            tokens_per_s: 50.0,
            valid_bits_per_byte: valid,
            valid_loss: None,
        }
    }

    #[test]
    fn the_line_has_loss_course_speed_time_and_validation() {
        let mut p = Progress::of(60, 100);
        assert_eq!(p.step(&metrics(1, 4.0, None)), "loss 4.000 ▁··········· 50 tokens/s, 1 min 58 s left");
        for step in 2..20 {
            p.step(&metrics(step, 2.9, (step == 9).then_some(1.5)));
        }
        let line = p.step(&metrics(20, 2.0, None));
        assert_eq!(line, "loss 2.000 █▄▄▁········ 50 tokens/s, 1 min 20 s left, held out 1.500");
        assert_eq!(p.ended().1, 50.0);
        // A run that goes on, and one of few steps.
        assert!(Progress::of(60, 100).step(&metrics(31, 2.0, None)).starts_with("loss 2.000 ······▁····· "));
        let mut p = Progress::of(3, 100);
        (1..3).for_each(|step| drop(p.step(&metrics(step, 4.0 - step as f64, None))));
        assert!(p.step(&metrics(3, 2.5, None)).starts_with("loss 2.500 █▁▅········· "));
    }
}
