//! The tokens of every step in one file, so that another trainer can take the same ones in the same order.

use crate::TrainError;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// Says before a run what would stop [`Recorder::write`] after it.
pub(crate) fn check(path: &Path) -> Result<(), TrainError> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = match (parent.is_dir(), path.is_dir()) {
        (true, false) => return Ok(()),
        (false, _) => "no such directory".to_string(),
        (true, true) => "a directory".to_string(),
    };
    let what = format!("expected a file to record batches in, found {found}");
    Err(TrainError::Io { path: path.display().to_string(), what })
}

/// Collects windows `[steps, batch, seq + 1]`.
pub struct Recorder {
    shape: [usize; 3],
    tokens: Vec<u8>,
}

impl Recorder {
    /// Nothing yet, of steps of `batch` windows of `seq + 1` tokens.
    pub fn new(batch: usize, seq: usize) -> Self {
        Self { shape: [0, batch, seq + 1], tokens: Vec::new() }
    }

    /// The windows of the next step.
    pub fn add(&mut self, windows: &[Vec<u32>]) {
        self.shape[0] += 1;
        self.tokens.extend(windows.iter().flatten().flat_map(|&t| (t as i32).to_le_bytes()));
    }

    /// A safetensors file with one i32 tensor `tokens`.
    pub fn bytes(&self) -> Result<Vec<u8>, SafeTensorError> {
        let view = TensorView::new(Dtype::I32, self.shape.to_vec(), &self.tokens)?;
        safetensors::serialize([("tokens", view)], None)
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), TrainError> {
        let io = |e: SafeTensorError| TrainError::Io {
            path: path.display().to_string(),
            what: format!("cannot write: {e}"),
        };
        Ok(hadal_files::Disk::new().replace(path, &self.bytes().map_err(io)?)?)
    }
}
