//! metrics.jsonl: one line a step, numbers that read back as the same numbers.

use crate::TrainError;
use hadal_files::Disk;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One step as recorded. `step` counts finished steps: the loss of line 1 is that of the initial weights.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
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
    /// The record of a run that goes on after `step` steps, and its last line: what was written past that step, or was
    /// not written out by a killed run, is cut off. At step 0 the file is new. Lines that are missing or no metrics are
    /// an error: the record of a run has no holes.
    pub fn open(disk: &Disk, path: &Path, step: u64) -> Result<(Self, Option<Metrics>), TrainError> {
        let text = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            text => text.map_err(|e| TrainError::read(path, &e))?,
        };
        let (kept, last) = cut(path, &text, step)?;
        if kept < text.len() || step == 0 {
            disk.replace(path, &text[..kept])?;
        }
        let file = File::options().append(true).open(path).map_err(|e| TrainError::write(path, &e))?;
        Ok((Self { path: path.to_path_buf(), file }, last))
    }

    /// Appends a line, whole or not at all as far as the system allows.
    pub fn append(&mut self, m: &Metrics) -> Result<(), TrainError> {
        let mut line = serde_json::to_string(m).map_err(|e| TrainError::write(&self.path, &e.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| TrainError::write(&self.path, &e))
    }

    /// Flushes to the disk: before a checkpoint, so that none is newer than the record.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(|e| TrainError::write(&self.path, &e))
    }
}

/// Bytes of the lines of steps 1 to `step`, and the last of them.
fn cut(path: &Path, text: &[u8], step: u64) -> Result<(usize, Option<Metrics>), TrainError> {
    let bad = |line: u64, found: String| {
        let what = format!("line {line}: expected the metrics of step {line}, found {found}");
        TrainError::Io { path: path.display().to_string(), what }
    };
    let (mut at, mut last) = (0, None);
    let mut lines = text.split_inclusive(|&b| b == b'\n');
    for expected in 1..=step {
        let line = lines.next().ok_or_else(|| bad(expected, "the end of the file".into()))?;
        let m: Metrics = serde_json::from_slice(line).map_err(|e| bad(expected, e.to_string()))?;
        if m.step != expected {
            return Err(bad(expected, format!("those of step {}", m.step)));
        }
        at += line.len();
        last = Some(m);
    }
    Ok((at, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> Metrics {
        let loss = 1.0 / step as f64;
        Metrics {
            step,
            loss,
            loss_main: loss,
            loss_mtp: 0.0,
            loss_balance: 0.0,
            lr: 1e-3,
            grad_norm: 0.1,
            max_violation: 0.0,
            tokens: step,
            seconds: 0.3,
            tokens_per_s: 3.3,
            valid_bits_per_byte: None,
            valid_loss: Some(0.1 + loss),
        }
    }

    #[test]
    fn a_record_is_cut_back_to_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let open = |step| MetricsFile::open(&Disk::new(), &path, step);
        let (mut file, last) = open(0).unwrap();
        assert_eq!(last, None);
        (1..=5).for_each(|i| file.append(&metrics(i)).unwrap());
        file.file.write_all(b"{\"step\":6,\"lo").unwrap();
        file.sync().unwrap();
        let (mut file, last) = open(4).unwrap();
        assert_eq!(last, Some(metrics(4)));
        file.append(&metrics(5)).unwrap();
        assert_eq!(open(5).unwrap().1, Some(metrics(5)));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
        let error = open(7).err().unwrap().to_string();
        assert!(error.contains("line 6: expected the metrics of step 6, found the end of the file"), "{error}");
        std::fs::write(&path, "{}\n").unwrap();
        assert!(open(1).err().unwrap().to_string().contains("line 1: expected the metrics of step 1"));
        assert_eq!(open(0).unwrap().1, None);
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
