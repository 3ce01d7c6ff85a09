//! metrics.jsonl: one line a step, numbers that read back as the same numbers.

use crate::TrainError;
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One step as recorded. `step` counts finished steps: the loss of line 1 is that of the initial weights.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Metrics {
    /// Finished steps.
    pub step: u64,
    /// Sum of the parts, before this step's update.
    pub loss: f64,
    /// Cross-entropy, nats a token.
    pub loss_main: f64,
    /// lambda-weighted MTP loss.
    pub loss_mtp: f64,
    /// alpha-weighted sequence-wise balance loss.
    pub loss_balance: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Before clipping.
    pub grad_norm: f32,
    /// Largest expert load over the mean, less 1, in the worst layer.
    pub max_violation: f64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Wall time of this step.
    pub seconds: f64,
    /// Rate of this step.
    pub tokens_per_s: f64,
    /// Validation after this step's update, where there was one: bits per byte of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_bits_per_byte: Option<f64>,
    /// The same, nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
}

/// The file, a line at a time.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Creates `path`; an existing file is an error.
    pub fn create(path: &Path) -> Result<Self, TrainError> {
        let file = File::create_new(path).map_err(|e| TrainError::write(path, &e))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends a line, whole or not at all as far as the system allows.
    pub fn append(&mut self, m: &Metrics) -> Result<(), TrainError> {
        let mut line = serde_json::to_string(m).map_err(|e| TrainError::write(&self.path, &e.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| TrainError::write(&self.path, &e))
    }
}
