//! From text to a checkpoint: the walk is tokenizer, split, windows, steps, validation, files.

use crate::TrainError;
use crate::config::saved::Build;
use crate::config::{DataSettings, TrainConfig};
use crate::evaluate::{Evaluation, Held, evaluate, sequence};
use crate::metrics::{Metrics, MetricsFile};
use crate::prepare::{Prepared, prepare, with_special_tokens};
use crate::record::{self, Recorder};
use crate::step::{StepReport, Trainer};
use hadal_kernels::{Ctx, DType, Device, Elem, bf16};
use hadal_model::io::{SaveOptions, save_checkpoint};
use hadal_model::{Model, ModelConfig, Params, Sequence};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Everything a run is made of.
#[derive(Clone, Debug)]
pub struct Run {
    /// The model.
    pub model: ModelConfig,
    /// How to train it.
    pub config: TrainConfig,
    /// The text.
    pub data: DataSettings,
    /// Where everything goes; must not exist or be empty.
    pub out: PathBuf,
    /// Go on with the run in `out`, if there is one.
    pub resume: bool,
    /// Go on though settings differ, as far as they may.
    pub override_saved: bool,
    /// What runs it.
    pub build: Build,
}

/// What is known before the first step.
#[derive(Clone, Debug)]
pub struct Start {
    /// Trained parameters, MTP included.
    pub parameters: usize,
    /// Tokens to train on, and held out.
    pub tokens: (usize, usize),
    /// Bytes of text a token stands for, on the training side.
    pub bytes_per_token: f64,
    /// Steps to come.
    pub steps: u64,
    /// Tokens a step.
    pub tokens_per_step: usize,
}

/// What a run leaves.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The last checkpoint's directory.
    pub checkpoint: PathBuf,
    /// Steps made; fewer than asked for if the run was told to stop.
    pub step: u64,
    /// All steps are made.
    pub finished: bool,
    /// The last step.
    pub last: Metrics,
    /// Beginnings of a few held-out documents.
    pub prompts: Vec<String>,
}

/// Watches a run.
pub trait Observer {
    /// A phase before training begins.
    fn phase(&mut self, what: &str);
    /// Training begins.
    fn start(&mut self, start: &Start);
    /// A step is done.
    fn step(&mut self, metrics: &Metrics);
    /// A checkpoint is on disk.
    fn checkpoint(&mut self, path: &Path);
    /// True once the run is to save and leave; asked after every step.
    fn stop(&self) -> bool {
        false
    }
}

/// Trains to the end.
pub fn pretrain(ctx: &Ctx, run: &Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let new = claim(&run.out)?;
    let ready = run.config.record_batches.as_deref().map_or(Ok(()), record::check);
    let data = ready.and_then(|()| prepare(ctx, run, observer)).inspect_err(|_| {
        if new {
            // Nothing is in it yet; should something be, it is not ours to remove.
            let _ = std::fs::remove_dir(&run.out);
        }
    })?;
    let config = with_special_tokens(run.model.clone(), &data.tokenizer);
    let model = Model::whole(ctx, config.clone());
    let params = Params::init(ctx, &config, model.layout.clone(), run.config.precision, run.config.seed);
    let stream = data.train.stream();
    observer.start(&Start {
        parameters: model.layout.parameters(),
        tokens: (stream.tokens.len(), data.held.tokens.len()),
        bytes_per_token: stream.bytes as f64 / stream.tokens.len() as f64,
        steps: run.config.schedule.steps,
        tokens_per_step: run.config.batch * run.config.seq,
    });
    let trainer = Trainer::new(ctx, model, params, run.config.adamw, run.config.objective);
    let metrics = MetricsFile::create(&run.out.join("metrics.jsonl"))?;
    Loop { run, data, config, trainer, metrics, observer }.go(ctx)
}

/// Makes the output directory (true), or takes an empty one (false).
fn claim(out: &Path) -> Result<bool, TrainError> {
    let bad = |what: String| Err(TrainError::Io { path: out.display().to_string(), what });
    let expected = "expected a new or empty directory for the run";
    match std::fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            Some(_) => bad(format!("{expected}, found files in it")),
            None => Ok(false),
        },
        Err(_) if out.is_file() => bad(format!("{expected}, found a file")),
        Err(_) => match std::fs::create_dir_all(out) {
            Ok(()) => Ok(true),
            Err(e) => bad(format!("{expected}, which cannot be made: {e}")),
        },
    }
}

/// Weights that gave something else are no checkpoint.
fn finite(step: u64, what: &'static str, found: f64) -> Result<(), TrainError> {
    if found.is_finite() { Ok(()) } else { Err(TrainError::Diverged { step, what, found }) }
}

/// Weights one task checks.
const CHECKED: usize = 1 << 16;

/// The first weight that is no finite number once rounded to `dtype`.
fn not_finite(ctx: &Ctx, weights: &[f32], dtype: DType) -> Option<f32> {
    let stored = |x: f32| if dtype == DType::Bf16 { bf16::round(x).f32() } else { x };
    let mut found = vec![None; weights.len().div_ceil(CHECKED)];
    let Device::Cpu(cpu) = &ctx.device;
    cpu.chunks_mut(&mut found, 1, |i, found| {
        let piece = &weights[i * CHECKED..weights.len().min((i + 1) * CHECKED)];
        found[0] = piece.iter().map(|&x| stored(x)).find(|x| !x.is_finite());
    });
    found.into_iter().flatten().next()
}

struct Loop<'a> {
    run: &'a Run,
    data: Prepared,
    config: ModelConfig,
    trainer: Trainer,
    metrics: MetricsFile,
    observer: &'a mut dyn Observer,
}

impl Loop<'_> {
    fn go(mut self, ctx: &Ctx) -> Result<Outcome, TrainError> {
        let c = &self.run.config;
        let mut recorder = c.record_batches.as_ref().map(|_| Recorder::new(c.batch, c.seq));
        if c.save_initial {
            self.save(ctx, 0)?;
        }
        let mut outcome = None;
        for step in 0..c.schedule.steps {
            let ctx = Ctx { step, ..ctx.clone() };
            let begin = Instant::now();
            let windows = self.windows(step);
            if let Some(r) = &mut recorder {
                r.add(&windows);
            }
            let sequences: Vec<Sequence> = windows.iter().map(|w| sequence(w)).collect();
            let micro: Vec<Vec<Sequence>> = sequences.chunks(c.micro_batch).map(<[Sequence]>::to_vec).collect();
            let lr = c.schedule.rate(step);
            let report = self.trainer.step(&ctx, &micro, lr);
            let seconds = begin.elapsed().as_secs_f64();
            let last = self.record(&ctx, step + 1, lr, &report, seconds)?;
            if (step + 1).is_multiple_of(c.checkpoint_every) || step + 1 == c.schedule.steps {
                let checkpoint = self.save(&ctx, step + 1)?;
                let prompts = self.data.prompts.clone();
                let (step, finished) = (step + 1, step + 1 == c.schedule.steps);
                outcome = Some(Outcome { checkpoint, step, finished, last, prompts });
            }
        }
        if let (Some(r), Some(path)) = (recorder, &c.record_batches) {
            r.write(path)?;
        }
        outcome.ok_or_else(|| TrainError::Config { what: "train.steps = 0: expected at least 1".into() })
    }

    /// The tokens of a step: a function of (seed, step) alone.
    fn windows(&self, step: u64) -> Vec<Vec<u32>> {
        let batch = self.run.config.batch as u64;
        (step * batch..(step + 1) * batch).map(|i| self.data.train.sample(i)).collect()
    }

    fn record(
        &mut self,
        ctx: &Ctx,
        step: u64,
        lr: f64,
        report: &StepReport,
        seconds: f64,
    ) -> Result<Metrics, TrainError> {
        let c = &self.run.config;
        let loss = report.losses.total();
        finite(step, "loss", loss)?;
        finite(step, "gradient norm", report.grad_norm.into())?;
        let tokens = (c.batch * c.seq) as u64;
        let due = step.is_multiple_of(c.eval_every) || step == c.schedule.steps;
        let valid = due.then(|| self.evaluate(ctx));
        finite(step, "validation loss", valid.map_or(0.0, |v| v.loss))?;
        let m = Metrics {
            step,
            loss,
            loss_main: report.losses.main,
            loss_mtp: report.losses.mtp,
            loss_balance: report.losses.balance,
            lr,
            grad_norm: report.grad_norm,
            max_violation: report.load.max_violation(),
            tokens: step * tokens,
            seconds,
            tokens_per_s: tokens as f64 / seconds,
            valid_bits_per_byte: valid.map(|v| v.bits_per_byte),
            valid_loss: valid.map(|v| v.loss),
        };
        self.metrics.append(&m)?;
        self.observer.step(&m);
        Ok(m)
    }

    fn evaluate(&self, ctx: &Ctx) -> Evaluation {
        let c = &self.run.config;
        let held = Held {
            stream: &self.data.held,
            byte_lengths: &self.data.byte_lengths,
            seq: c.seq,
            batch: c.micro_batch,
            max_tokens: c.eval_tokens,
        };
        evaluate(ctx, &self.trainer.model, &self.trainer.params, held)
    }

    /// Writes step-NNNNNN and points `latest` at it; weights that a checkpoint cannot hold as finite numbers are
    /// refused.
    fn save(&mut self, ctx: &Ctx, step: u64) -> Result<PathBuf, TrainError> {
        let dtype = self.run.config.precision.act();
        if let Some(x) = not_finite(ctx, self.trainer.params.master.view().f32(), dtype) {
            return Err(TrainError::Diverged { step, what: "weight", found: x.into() });
        }
        let name = format!("step-{step:06}");
        let dir = self.run.out.join(&name);
        let files = self.data.tokenizer.files();
        let extra: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (*n, b.as_slice())).collect();
        let options = SaveOptions::new(dtype);
        save_checkpoint(&dir, &self.config, &self.trainer.params, options, &extra)?;
        point_latest(&self.run.out, &name)?;
        self.observer.checkpoint(&dir);
        Ok(dir)
    }
}

/// Replaces `out/latest`, a link to the newest checkpoint, in one rename.
fn point_latest(out: &Path, name: &str) -> Result<(), TrainError> {
    let (latest, tmp) = (out.join("latest"), out.join(".latest.tmp"));
    let _ = std::fs::remove_file(&tmp); // Left by a killed run, or not there.
    #[cfg(unix)]
    std::os::unix::fs::symlink(name, &tmp).map_err(|e| TrainError::write(&tmp, &e))?;
    // Where links need privileges, a file that holds the name.
    #[cfg(not(unix))]
    std::fs::write(&tmp, name).map_err(|e| TrainError::write(&tmp, &e))?;
    std::fs::rename(&tmp, &latest).map_err(|e| TrainError::write(&latest, &e))
}
