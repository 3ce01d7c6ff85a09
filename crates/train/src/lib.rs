//! Training: one step loop, its optimiser and schedule, data to loss, validation, checkpoints. It prints nothing:
//! whoever runs it watches through [`Observer`].

mod config;
mod evaluate;
mod examine;
mod load;
mod metrics;
mod optimizer;
pub mod plan;
mod prepare;
mod pretrain;
mod record;
mod run_loop;
mod saver;
mod schedule;
mod state;
mod step;

pub use config::saved::{self, Build, RUN_FILE};
pub use config::{DataSettings, RunFile, Settings, SourceSettings, TrainConfig, precision};
pub use evaluate::{Evaluation, Held, evaluate, sequence};
pub use examine::{Drafts, Examination, examine};
pub use load::Load;
pub use metrics::Metrics;
pub use optimizer::{AdamW, Optimizer};
pub use pretrain::{Observer, Outcome, Run, Start, pretrain, pretrain_on};
pub use record::Recorder;
pub use schedule::Schedule;
pub use step::{Objective, StepReport, StepUnderWay, Trainer};

use std::path::Path;

/// Why a run cannot start or go on; one line each.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A setting that cannot be.
    #[error("{what}")]
    Config {
        /// Which, what was expected and found.
        what: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {what}")]
    Io {
        /// The file.
        path: String,
        /// What happened.
        what: String,
    },
    /// A text file or the tokenizer.
    #[error(transparent)]
    Data(#[from] hadal_data::DataError),
    /// Text that reads well and does not suffice.
    #[error("{corpus}: {why}")]
    Corpus {
        /// The files, or that it is the built-in one.
        corpus: String,
        /// What it lacks.
        why: hadal_data::DataError,
    },
    /// A file that cannot be written.
    #[error(transparent)]
    File(#[from] hadal_files::FileError),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] hadal_model::io::IoError),
    /// A model's configuration.
    #[error(transparent)]
    Model(#[from] hadal_model::config::ConfigError),
    /// The observer asked for an end before the first step.
    #[error("stopped while preparing the text; nothing was trained; the same command begins again")]
    Stopped,
    /// The loss, the gradients or the weights are no numbers any more.
    #[error(
        "step {step}: expected a finite {what}, found {found}; the last checkpoint is untouched (a lower train.lr may help)"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// What was measured.
        what: &'static str,
        /// Its value.
        found: f64,
    },
}

impl TrainError {
    fn read(path: &Path, e: &std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), what: format!("cannot read: {e}") }
    }

    fn write(path: &Path, e: &std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), what: format!("cannot write: {e}") }
    }
}
