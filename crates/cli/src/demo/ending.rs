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
    loss: f64,
    valid_bits_per_byte: Option<f64>,
    tokens: u64,
    /// Of the run as started, without the report.
    seconds: f64,
    /// Of the steps alone.
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
        let mut s = format!(
            "\nTrained on {} tokens in {}, {:.0} tokens/s",
            self.tokens,
            duration(self.seconds),
            self.tokens_per_s
        );
        if self.report_seconds >= 0.5 {
            s += &format!("; report in {}", duration(self.report_seconds));
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
    let latest = quoted(&run.out.join("latest"));
    let other = {
        let mut name = run.out.file_name().unwrap_or_default().to_os_string();
        name.push("-fp8");
        quoted(&run.out.with_file_name(name))
    };
    vec![
        format!("hadal generate {dir} 'Once upon a time'"),
        format!("hadal inspect {dir}"),
        format!("hadal pretrain --resume --out {dir} --override --steps {}", 2 * run.config.schedule.steps),
        format!("hadal convert {latest} {other} --dtype fp8"),
    ]
}
