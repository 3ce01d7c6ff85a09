//! The line that a run shows of itself while it trains: loss and its course, speed, time left, the last validation.

use super::text::{duration, spark};
use hadal_train::{Metrics, Start};
use std::time::{Duration, Instant};

/// Steps that speed and time left are judged by.
const RECENT: usize = 20;
/// Columns of the course of the loss.
const COLUMNS: usize = 16;

/// What has been seen of a run.
pub struct Progress {
    begin: Instant,
    steps: u64,
    tokens_per_step: usize,
    losses: Vec<f64>,
    seconds: Vec<f64>,
    valid: Option<(u64, f64)>,
}

impl Progress {
    /// Before the first step; time counts from here.
    pub fn new() -> Self {
        let (losses, seconds) = (Vec::new(), Vec::new());
        Self { begin: Instant::now(), steps: 0, tokens_per_step: 0, losses, seconds, valid: None }
    }

    /// What the run is going to be.
    pub fn start(&mut self, s: &Start) {
        (self.steps, self.tokens_per_step) = (s.steps, s.tokens_per_step);
    }

    /// Takes a step in, and describes the run after it (without the step's number).
    pub fn step(&mut self, m: &Metrics) -> String {
        self.losses.push(m.loss_main);
        self.seconds.push(m.seconds);
        self.valid = m.valid_bits_per_byte.map(|b| (m.step, b)).or(self.valid);
        let recent = &self.seconds[self.seconds.len().saturating_sub(RECENT)..];
        let mean = recent.iter().sum::<f64>() / recent.len() as f64;
        let left = mean * self.steps.saturating_sub(m.step) as f64;
        let mut line = format!("loss {:.3} {}", m.loss_main, spark(&self.losses, COLUMNS));
        line += &format!(" {:.0} tokens/s, {} left", self.tokens_per_step as f64 / mean, duration(left));
        match self.valid {
            Some((step, b)) if step == m.step => line += &format!(", held out {b:.3} bits per byte"),
            Some((step, b)) => line += &format!(", held out {b:.3} (step {step})"),
            None => {}
        }
        line
    }

    /// Time since the run began, and tokens a second of its steps (without validation, checkpoints, tokenising).
    pub fn ended(&self) -> (Duration, f64) {
        let tokens = self.tokens_per_step * self.seconds.len();
        (self.begin.elapsed(), tokens as f64 / self.seconds.iter().sum::<f64>().max(f64::MIN_POSITIVE))
    }
}
