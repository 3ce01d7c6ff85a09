//! A run's settings. A TOML file and the command line fill the same table of optional keys ([`RunFile`]); resolving it
//! gives every value, and refuses keys that would have no effect. The resolved run is saved with it ([`saved`]).

pub(crate) mod data;
mod file;
pub mod saved;
mod settings;
#[cfg(test)]
mod tests;

pub use data::{DataSettings, SourceSettings};
pub use file::RunFile;
pub use settings::Settings;

use crate::TrainError;
use crate::optimizer::AdamW;
use crate::schedule::Schedule;
use crate::step::Objective;
use hadal_model::{ModelConfig, Precision, Recompute};
use std::path::PathBuf;

/// Every value of a run.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Sequences a step.
    pub batch: usize,
    /// Sequences in flight at once.
    pub micro_batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Numbers the model computes in.
    pub precision: Precision,
    /// What backward computes again instead of keeping it.
    pub recompute: Recompute,
    /// Seed of weights, order of data and split.
    pub seed: u64,
    /// Learning rate; holds the number of steps.
    pub schedule: Schedule,
    /// Optimiser constants.
    pub adamw: AdamW,
    /// Objective beside cross-entropy.
    pub objective: Objective,
    /// Steps between validations.
    pub eval_every: u64,
    /// Validate on at most this many tokens.
    pub eval_tokens: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Newest checkpoints that are kept, at least 1.
    pub keep_last: u64,
    /// Keep the checkpoint that validated best too.
    pub keep_best: bool,
    /// Write checkpoints beside training, from a copy of weights and moments; otherwise training waits for them.
    pub save_beside: bool,
    /// Decay of the averaged weights, in [0, 1); 0 for none.
    pub ema_decay: f32,
    /// Write the initial weights.
    pub save_initial: bool,
    /// Where to record tokens.
    pub record_batches: Option<PathBuf>,
}

/// Most tokens of one step: rows in flight are counted in i32.
const MAX_STEP_TOKENS: usize = i32::MAX as usize;
/// Most steps: a sample's number (step * batch) fits u64 whatever the batch.
const MAX_STEPS: u64 = 1 << 32;

/// Reads "bf16" or "fp32".
pub fn precision(name: &str) -> Result<Precision, TrainError> {
    match name {
        "bf16" => Ok(Precision::Bf16),
        "fp32" => Ok(Precision::Fp32),
        other => Err(TrainError::Config { what: format!("dtype \"{other}\": expected bf16 or fp32") }),
    }
}

/// Reads "none", "paper" or "all"; the default without a name.
fn recompute(name: Option<&str>) -> Result<Recompute, TrainError> {
    let read = |name: &str| name.parse().map_err(|what| TrainError::Config { what: format!("train.{what}") });
    name.map_or(Ok(Recompute::default()), read)
}

fn refuse(cond: bool, what: impl FnOnce() -> String) -> Result<(), TrainError> {
    if cond { Err(TrainError::Config { what: what() }) } else { Ok(()) }
}

impl TrainConfig {
    /// Defaults suit small models from scratch; betas, decay, clip, lambda, alpha and gamma are the V3 report's.
    pub fn resolve(s: Settings, model: &ModelConfig) -> Result<Self, TrainError> {
        let steps = s.steps.unwrap_or(1000);
        let batch = s.batch.unwrap_or(4);
        let peak = s.lr.unwrap_or(2e-3);
        // Sequences are 256 tokens unless the model reads fewer.
        let seq = s.seq.unwrap_or(256.min(model.max_position_embeddings));
        let warmup = s.warmup.unwrap_or((steps / 20).min(2000));
        let constant = s.constant.unwrap_or((steps / 10 * 6 + steps % 10 * 6 / 10).min(steps.saturating_sub(warmup)));
        let moe = model.has_experts();
        refuse(s.min_lr.is_some() && warmup.checked_add(constant) == Some(steps), || {
            format!("train.min_lr has no effect: warmup = {warmup} and constant = {constant} leave no step to decay in")
        })?;
        refuse(s.mtp_lambda.is_some() && model.num_nextn_predict_layers == 0, || {
            "train.mtp_lambda has no effect: the model has no MTP layer (num_nextn_predict_layers = 0)".into()
        })?;
        refuse(s.balance_alpha.is_some_and(|a| a > 0.0) && !moe, || {
            "train.balance_alpha has no effect: the model has no MoE layer".into()
        })?;
        refuse(s.bias_gamma.is_some_and(|g| g > 0.0) && !(moe && model.correction_bias), || {
            "train.bias_gamma has no effect: the model's gates have no correction bias".into()
        })?;
        let c = Self {
            batch,
            micro_batch: s.micro_batch.unwrap_or(batch),
            seq,
            precision: precision(s.dtype.as_deref().unwrap_or("bf16"))?,
            recompute: recompute(s.recompute.as_deref())?,
            seed: s.seed.unwrap_or(0),
            schedule: Schedule { peak, floor: s.min_lr.unwrap_or(peak / 10.0), warmup, constant, steps },
            adamw: AdamW {
                beta1: s.beta1.unwrap_or(0.9),
                beta2: s.beta2.unwrap_or(0.95),
                eps: s.eps.unwrap_or(1e-8),
                weight_decay: s.weight_decay.unwrap_or(0.1),
                clip: s.clip.unwrap_or(1.0),
            },
            objective: Objective {
                mtp_lambda: s.mtp_lambda.unwrap_or(0.3),
                balance_alpha: s.balance_alpha.unwrap_or(if moe { 1e-4 } else { 0.0 }),
                bias_gamma: s.bias_gamma.unwrap_or(if model.correction_bias { 1e-3 } else { 0.0 }),
            },
            eval_every: s.eval_every.unwrap_or((steps / 4).max(1)),
            eval_tokens: s.eval_tokens.unwrap_or(16 * 1024),
            checkpoint_every: s.checkpoint_every.unwrap_or((steps / 4).max(1)),
            keep_last: s.keep_last.unwrap_or(3),
            keep_best: s.keep_best.unwrap_or(true),
            save_beside: s.save_beside.unwrap_or(true),
            ema_decay: s.ema_decay.unwrap_or(0.0),
            save_initial: s.save_initial.unwrap_or(false),
            record_batches: s.record_batches,
        };
        c.validate(model)?;
        Ok(c)
    }

    fn validate(&self, model: &ModelConfig) -> Result<(), TrainError> {
        let zero = [
            ("steps", self.schedule.steps == 0),
            ("batch", self.batch == 0),
            ("micro_batch", self.micro_batch == 0),
            ("seq", self.seq == 0),
            ("eval_every", self.eval_every == 0),
            ("eval_tokens", self.eval_tokens == 0),
            ("checkpoint_every", self.checkpoint_every == 0),
            ("keep_last", self.keep_last == 0),
        ];
        for (name, bad) in zero {
            refuse(bad, || format!("train.{name} = 0: expected at least 1"))?;
        }
        // Sizes that TOML's signed integers have no room for could not be saved with the run.
        let large = [
            ("seed", self.seed),
            ("eval_every", self.eval_every),
            ("eval_tokens", self.eval_tokens as u64),
            ("checkpoint_every", self.checkpoint_every),
            ("keep_last", self.keep_last),
        ];
        for (name, n) in large {
            refuse(i64::try_from(n).is_err(), || format!("train.{name} = {n}: expected at most {}", i64::MAX))?;
        }
        refuse(!self.batch.is_multiple_of(self.micro_batch), || {
            format!("train.micro_batch = {}: expected a divisor of batch = {}", self.micro_batch, self.batch)
        })?;
        let tokens = self.batch.checked_mul(self.seq).filter(|&n| n <= MAX_STEP_TOKENS);
        refuse(tokens.is_none(), || {
            let (batch, seq) = (self.batch, self.seq);
            format!("train.batch = {batch}, seq = {seq}: expected at most {MAX_STEP_TOKENS} tokens a step together")
        })?;
        refuse(self.seq > model.max_position_embeddings, || {
            format!(
                "train.seq = {}: expected at most the model's max_position_embeddings = {}",
                self.seq, model.max_position_embeddings
            )
        })?;
        refuse(self.seq <= model.num_nextn_predict_layers, || {
            format!("train.seq = {}: expected more than the MTP depth {}", self.seq, model.num_nextn_predict_layers)
        })?;
        let s = &self.schedule;
        refuse(s.warmup.checked_add(s.constant).is_none_or(|n| n > s.steps), || {
            let (warmup, constant) = (s.warmup, s.constant);
            format!("train.warmup = {warmup}, constant = {constant}: expected at most steps = {} together", s.steps)
        })?;
        refuse(s.steps > MAX_STEPS, || format!("train.steps = {}: expected at most {MAX_STEPS}", s.steps))?;
        self.validate_numbers()
    }

    fn validate_numbers(&self) -> Result<(), TrainError> {
        let (s, a, o) = (&self.schedule, &self.adamw, &self.objective);
        let at_least_zero = [
            ("min_lr", s.floor),
            ("weight_decay", a.weight_decay.into()),
            ("mtp_lambda", o.mtp_lambda.into()),
            ("balance_alpha", o.balance_alpha.into()),
            ("bias_gamma", o.bias_gamma.into()),
        ];
        let positive = [("lr", s.peak), ("eps", a.eps.into()), ("clip", a.clip.into())];
        for (name, x) in positive {
            refuse(x.is_nan() || x <= 0.0, || format!("train.{name} = {x}: expected a number > 0"))?;
        }
        // Computed with in f32, where more is as good as infinite.
        for (name, x) in [("lr", s.peak), ("eps", a.eps.into())] {
            refuse(!(x as f32).is_finite(), || {
                format!("train.{name} = {x:?}: expected a finite number that f32 holds")
            })?;
        }
        for (name, x) in at_least_zero {
            refuse(!(x.is_finite() && x >= 0.0), || format!("train.{name} = {x}: expected a finite number >= 0"))?;
        }
        refuse(s.floor > s.peak, || format!("train.min_lr = {}: expected at most lr = {}", s.floor, s.peak))?;
        for (name, x) in [("beta1", a.beta1), ("beta2", a.beta2), ("ema_decay", self.ema_decay)] {
            refuse(!(0.0..1.0).contains(&x), || format!("train.{name} = {x}: expected a number in [0, 1)"))?;
        }
        Ok(())
    }
}
