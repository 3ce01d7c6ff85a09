//! How far a phase over many bytes has come: a bar on a terminal, now and then a line elsewhere, JSON for machines.

use crate::inspect::scaled;
use crate::output::Output;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal, and between two objects but the first and the last.
const PATIENCE: Duration = Duration::from_secs(5);

/// One phase after another.
#[derive(Default)]
pub struct Bytes {
    phase: Option<Phase>,
}

struct Phase {
    what: String,
    bar: ProgressBar,
    began: Instant,
    told: Instant,
}

impl Bytes {
    /// `done` of `total` bytes of `what` are done; as often as it pleases the caller.
    pub fn show(&mut self, what: &str, done: u64, total: u64, out: &Output) {
        let (mut phase, new) = match self.phase.take() {
            Some(phase) if phase.what == what => (phase, false),
            _ => (Phase::new(what, total, out), true),
        };
        let due = phase.told.elapsed() >= PATIENCE;
        let seconds = phase.began.elapsed().as_secs_f64().max(1e-9);
        let rate = done as f64 / seconds;
        let left = (total.saturating_sub(done)) as f64 / rate.max(1.0);
        if new || due || done >= total {
            out.object(&serde_json::json!({
                "progress": what, "done": done, "total": total, "bytes_per_s": rate, "seconds_left": left,
            }));
        }
        phase.bar.set_position(done);
        if due {
            phase.told = Instant::now();
        }
        if due && phase.bar.is_hidden() && done < total {
            let (done, total) = (scaled(done as f64, "B"), scaled(total as f64, "B"));
            out.text(&format!("{what}: {done} of {total}, {}, about {left:.0} s left\n", scaled(rate, "B/s")));
        }
        if done < total {
            self.phase = Some(phase);
        }
    }
}

impl Drop for Phase {
    /// The line is free for what comes, an error included.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Phase {
    fn new(what: &str, total: u64, out: &Output) -> Self {
        let target = if out.json() { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = "{bar:30} {bytes}/{total_bytes}, {bytes_per_sec} [{elapsed} < {eta}]";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()));
        let now = Instant::now();
        Self { what: what.to_string(), bar, began: now, told: now }
    }
}
