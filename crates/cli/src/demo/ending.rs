//! Where a run ended, and what to try with what it left.

use super::text::{duration, quoted};
use hadal_train::{Metrics, Outcome, Run};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// The end of a run.
#[derive(Serialize)]
pub struct Ending {
    checkpoint: PathBuf,
    steps: u64,
    loss: f64,
    valid_bits_per_byte: Option<f64>,
    tokens: u64,
    /// Since the run was started or resumed, without the report.
    seconds: f64,
    /// Of the steps alone; 0 if there was none left to make.
    tokens_per_s: f64,
    /// Of the report.
    report_seconds: f64,
    /// Commands to try.
    next: Vec<String>,
}

impl Ending {
    /// From the last step and what the clock said: of the run, of its steps (tokens a second), of the report.
    pub fn new(run: &Run, outcome: &Outcome, (took, rate): (Duration, f64), report: Duration) -> Self {
        let last: &Metrics = &outcome.last;
        Self {
            checkpoint: outcome.checkpoint.clone(),
            steps: outcome.step,
            loss: last.loss,
            valid_bits_per_byte: last.valid_bits_per_byte,
            tokens: last.tokens,
            seconds: took.as_secs_f64(),
            tokens_per_s: rate,
            report_seconds: report.as_secs_f64(),
            next: next(run),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut s = format!("\nTrained {} steps, {} tokens", self.steps, self.tokens);
        if self.tokens_per_s > 0.0 {
            s += &format!("; took {} at {:.0} tokens/s", duration(self.seconds), self.tokens_per_s);
        }
        if self.report_seconds >= 0.5 {
            s += &format!("; report {}", duration(self.report_seconds));
        }
        if let Some(bits) = self.valid_bits_per_byte {
            s += &format!("\nHeld-out text: {bits:.3} bits per byte");
        }
        s += &format!("\nCheckpoint: {}\n", self.checkpoint.display());
        for (i, command) in self.next.iter().enumerate() {
            s += &format!("{} {command}\n", if i == 0 { "Try:" } else { "    " });
        }
        let latest = self.checkpoint.display();
        s + &format!("In Python: transformers.AutoModelForCausalLM.from_pretrained({:?})\n", latest.to_string())
    }
}

fn next(run: &Run) -> Vec<String> {
    let dir = quoted(&run.out);
    let mut commands = vec![format!("hadal generate {dir} 'Once upon a time'"), format!("hadal inspect {dir}")];
    let latest = quoted(&run.out.join("latest"));
    let fp8 = match run.out.file_name() {
        Some(name) => run.out.with_file_name(format!("{}-fp8", name.display())),
        None => run.out.join("fp8"),
    };
    let fp8 = quoted(&fp8);
    let steps = run.config.schedule.steps.saturating_mul(2);
    commands.push(format!("hadal pretrain --resume --out {dir} --override --steps {steps}"));
    commands.push(format!("hadal convert {latest} {fp8} --dtype fp8"));
    commands
}
