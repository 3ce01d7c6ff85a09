//! The keys of `[train]`.

use serde::{Deserialize, Serialize, Serializer};
use std::path::PathBuf;

/// `[train]`, every key optional.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Optimiser steps.
    pub steps: Option<u64>,
    /// Sequences a step.
    pub batch: Option<usize>,
    /// Sequences in flight at once; divides `batch`.
    pub micro_batch: Option<usize>,
    /// Tokens a sequence.
    pub seq: Option<usize>,
    /// "bf16" or "fp32".
    pub dtype: Option<String>,
    /// What backward computes again: "none", "paper" or "all".
    pub recompute: Option<String>,
    /// Seed of weights, order of data and split.
    pub seed: Option<u64>,
    /// Peak learning rate.
    pub lr: Option<f64>,
    /// Learning rate at the end.
    pub min_lr: Option<f64>,
    /// Steps of warm-up.
    pub warmup: Option<u64>,
    /// Steps at the peak.
    pub constant: Option<u64>,
    /// AdamW.
    #[serde(serialize_with = "shortest")]
    pub beta1: Option<f32>,
    /// AdamW.
    #[serde(serialize_with = "shortest")]
    pub beta2: Option<f32>,
    /// AdamW.
    #[serde(serialize_with = "shortest")]
    pub eps: Option<f32>,
    /// AdamW.
    #[serde(serialize_with = "shortest")]
    pub weight_decay: Option<f32>,
    /// Largest gradient norm.
    #[serde(serialize_with = "shortest")]
    pub clip: Option<f32>,
    /// lambda of the MTP loss.
    #[serde(serialize_with = "shortest")]
    pub mtp_lambda: Option<f32>,
    /// alpha of the sequence-wise balance loss.
    #[serde(serialize_with = "shortest")]
    pub balance_alpha: Option<f32>,
    /// gamma of the bias update.
    #[serde(serialize_with = "shortest")]
    pub bias_gamma: Option<f32>,
    /// Decay of the averaged weights; 0 for none.
    #[serde(serialize_with = "shortest")]
    pub ema_decay: Option<f32>,
    /// Steps between validations.
    pub eval_every: Option<u64>,
    /// Validate on at most this many tokens.
    pub eval_tokens: Option<usize>,
    /// Steps between checkpoints; the last step always writes one.
    pub checkpoint_every: Option<u64>,
    /// Newest checkpoints that are kept.
    pub keep_last: Option<u64>,
    /// Keep the checkpoint that validated best too.
    pub keep_best: Option<bool>,
    /// Write checkpoints beside training, from a copy of weights and moments; otherwise training waits for them.
    pub save_beside: Option<bool>,
    /// Write the initial weights as step-000000.
    pub save_initial: Option<bool>,
    /// Record the tokens of every step in this safetensors file.
    pub record_batches: Option<PathBuf>,
}

impl Settings {
    /// True if the phases that are set leave no step to decay in.
    pub(super) fn never_decays(&self) -> bool {
        let phases = self.warmup.zip(self.constant).and_then(|(warmup, constant)| warmup.checked_add(constant));
        phases.is_some() && phases == self.steps
    }
}

/// TOML's numbers are f64: 0.1 is written as 0.1, not as the nearest f32's many digits, if it reads back as that f32.
fn shortest<S: Serializer>(x: &Option<f32>, to: S) -> Result<S::Ok, S::Error> {
    let Some(x) = x else { return to.serialize_none() };
    let short = x.to_string().parse::<f64>().ok().filter(|&y| y as f32 == *x);
    to.serialize_some(&short.unwrap_or(f64::from(*x)))
}
