//! A run from text to checkpoints: who may write where, what there is already, and the walk from text to the loop.

use crate::TrainError;
use crate::config::saved::{self, Build, RUN_FILE};
use crate::config::{DataSettings, TrainConfig};
use crate::metrics::{Metrics, MetricsFile};
use crate::plan::{self, StepSize};
use crate::prepare::{Prepared, prepare, with_special_tokens};
use crate::record;
use crate::run_loop::Loop;
use crate::saver::{Keep, Saver, newest};
use crate::state::{Progress, State, Writer};
use crate::step::Trainer;
use hadal_files::{Disk, Lock};
use hadal_kernels::Ctx;
use hadal_model::io::SaveOptions;
use hadal_model::{Model, ModelConfig, Params};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// Everything a run is made of.
#[derive(Clone, Debug)]
pub struct Run {
    /// The model.
    pub model: ModelConfig,
    /// How to train it.
    pub config: TrainConfig,
    /// The text.
    pub data: DataSettings,
    /// Where everything goes; must not exist or be empty, unless the run is resumed.
    pub out: PathBuf,
    /// Go on with the run in `out`, if there is one.
    pub resume: bool,
    /// Resume although settings that may change within a run differ from the saved ones.
    pub override_saved: bool,
    /// Who runs it.
    pub build: Build,
}

/// What is known before the first step.
#[derive(Clone, Debug)]
pub struct Start {
    /// Trained parameters, MTP included.
    pub parameters: usize,
    /// Tokens to train on, and held out.
    pub tokens: (u64, u64),
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
    /// The last step.
    pub last: Metrics,
    /// Steps done.
    pub step: u64,
    /// False if the observer stopped it before its last step.
    pub finished: bool,
    /// Beginnings of a few held-out documents.
    pub prompts: Vec<String>,
    /// The windows of held-out text that were validated on, each with its last target.
    pub held: Vec<Vec<u32>>,
}

/// Watches a run.
pub trait Observer {
    /// A phase before training begins.
    fn phase(&mut self, what: &str);
    /// So many bytes of `total` are done in a phase that takes long.
    fn progress(&mut self, _what: &str, _done: u64, _total: u64) {}
    /// Training begins.
    fn start(&mut self, start: &Start);
    /// A step is done.
    fn step(&mut self, metrics: &Metrics);
    /// A checkpoint is on disk.
    fn checkpoint(&mut self, path: &Path);
    /// A run goes on from a checkpoint after so many steps, with these remarks (settings that changed).
    fn resumed(&mut self, from: &Path, step: u64, remarks: &[String]);
    /// True if the run is to save and end after the step under way.
    fn stop(&self) -> bool {
        false
    }
}

/// Trains to the end, or until the observer stops it.
pub fn pretrain(ctx: &Ctx, run: &Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    pretrain_on(&Disk::new(), ctx, run, observer)
}

/// As [`pretrain`], with its files going through `disk`.
pub fn pretrain_on(disk: &Disk, ctx: &Ctx, run: &Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
    let claim = Claim::take(&run.out, run.resume)?;
    let mut run = run.clone();
    let ready = run.config.record_batches.as_deref().map_or(Ok(()), record::check);
    let begun = ready.and_then(|()| Begun::new(disk, ctx, &mut run, observer)).inspect_err(|_| claim.give_up())?;
    let outcome = begun.train(disk, ctx, &run, observer);
    drop(claim);
    outcome
}

/// The output directory, locked against other runs.
struct Claim {
    out: PathBuf,
    new: bool,
    lock: Lock,
}

impl Claim {
    /// Makes the directory, or takes an empty one, or, to resume, that of a run.
    fn take(out: &Path, resume: bool) -> Result<Self, TrainError> {
        let bad = |what: String| TrainError::Io { path: out.display().to_string(), what };
        let expected =
            if resume { "expected the directory of a run" } else { "expected a new or empty directory for the run" };
        if out.is_file() {
            return Err(bad(format!("{expected}, found a file")));
        }
        let new = !out.exists();
        std::fs::create_dir_all(out).map_err(|e| bad(format!("{expected}, which cannot be made: {e}")))?;
        let fits = || match Found::look(out)? {
            Found::Nothing => Ok(()),
            Found::Run | Found::Text if resume => Ok(()),
            Found::Run => Err(bad(format!("{expected}, found a run in it (--resume goes on with it)"))),
            Found::Text => {
                Err(bad(format!("{expected}, found the text of a run that never began (--resume goes on with it)")))
            }
            Found::Other if resume => Err(bad(format!("{expected} ({RUN_FILE}), found other files"))),
            Found::Other => Err(bad(format!("{expected}, found files in it"))),
        };
        // Before the lock, so that none is left in a directory of something else; and once nobody else writes here.
        fits()?;
        let lock = Lock::take(out)?.map_err(|holder| {
            let who = holder.map_or("another process".into(), |id| format!("process {id}"));
            bad(format!("expected a directory that no other run writes to, found {who} writing to it"))
        })?;
        fits()?;
        Ok(Self { out: out.to_path_buf(), new, lock })
    }

    /// Leaves nothing of a run that never began.
    fn give_up(&self) {
        // Ours alone where it was made here; the error that led here is the one to report.
        if self.new && matches!(Found::look(&self.out), Ok(Found::Nothing | Found::Text)) {
            let _ = std::fs::remove_dir_all(self.out.join(DATA));
            let _ = std::fs::remove_file(self.lock.path());
            let _ = std::fs::remove_dir(&self.out);
        }
    }
}

/// What an output directory holds, but for names that begin with a dot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A run that may go on.
    Run,
    /// The tokenised text of a run that was killed before its first step.
    Text,
    Other,
}

impl Found {
    fn look(dir: &Path) -> Result<Self, TrainError> {
        let found = visible(dir)?;
        Ok(match found.as_slice() {
            [] => Self::Nothing,
            names if names.iter().any(|name| name == RUN_FILE) => Self::Run,
            [one] if one == DATA => Self::Text,
            _ => Self::Other,
        })
    }
}

/// Tokenised text, within a run's directory.
const DATA: &str = "data";

/// Names in a directory but those that begin with a dot.
fn visible(dir: &Path) -> Result<Vec<String>, TrainError> {
    let entries = std::fs::read_dir(dir).map_err(|e| TrainError::read(dir, &e))?;
    let names = entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_, _>>().map_err(|e| TrainError::read(dir, &e))?;
    Ok(names.into_iter().filter(|name| !name.starts_with('.')).collect())
}

/// A run with its text, and where it stands.
struct Begun {
    data: Prepared,
    state: Option<State>,
    remarks: Vec<String>,
}

impl Begun {
    /// Finds the checkpoint to go on from and prepares the text. Given leave, a run that goes on gives up recording its
    /// batches.
    fn new(disk: &Disk, ctx: &Ctx, run: &mut Run, observer: &mut dyn Observer) -> Result<Self, TrainError> {
        disk.sweep(&run.out)?;
        let file = run.out.join(RUN_FILE);
        let mut remarks = if file.exists() { saved::check(&file, run)? } else { Vec::new() };
        let state = newest(&run.out)?.map(|dir| State::open(&dir)).transpose()?;
        if let Some(state) = &state {
            if run.override_saved && run.config.record_batches.take().is_some() {
                remarks.push("train.record_batches: given up, since the recording would be of a part".into());
            }
            fits_schedule(run, state.progress())?;
        }
        // A run's tokenizer is the one in its checkpoints, whatever made it.
        let tokenizer = state.as_ref().map(|s| s.dir().to_path_buf());
        let data = prepare(disk, ctx, run, tokenizer.as_deref(), observer)?;
        if let Some(state) = &state {
            state.check(&saved::fixed(run), &data.fingerprint)?;
        }
        Ok(Self { data, state, remarks })
    }

    fn train(self, disk: &Disk, ctx: &Ctx, run: &Run, observer: &mut dyn Observer) -> Result<Outcome, TrainError> {
        let Self { data, state, remarks } = self;
        let config = with_special_tokens(run.model.clone(), &data.tokenizer);
        let c = &run.config;
        plan::reserve(ctx, &step_size(&config, c)).map_err(|what| TrainError::Config { what })?;
        let mut model = Model::whole(ctx, config.clone());
        model.recompute = c.recompute;
        let layout = model.layout.clone();
        observer.start(&Start {
            parameters: layout.parameters(),
            tokens: data.tokens,
            bytes_per_token: data.bytes_per_token,
            steps: c.schedule.steps,
            tokens_per_step: c.batch * c.seq,
        });
        let begin = Progress { step: 0, next_sample: 0, tokens: 0, valid_bits_per_byte: None };
        let progress = state.as_ref().map_or(begin, |s| s.progress().clone());
        let trainer = match &state {
            None => {
                let params = Params::init(ctx, &config, layout.clone(), c.precision, c.seed);
                let mut trainer = Trainer::new(ctx, model, params, c.adamw, c.objective);
                if c.ema_decay > 0.0 {
                    trainer.keep_average(c.ema_decay, None);
                }
                trainer
            }
            Some(state) => {
                // In the order of a run from its first step, so that on a GPU everything lies where it did.
                let params = state.params(ctx, &layout, c.precision)?;
                let mut trainer = Trainer::new(ctx, model, params, c.adamw, c.objective);
                state.restore(ctx, &layout, c.ema_decay, &mut trainer)?;
                observer.resumed(state.dir(), progress.step, &remarks);
                trainer
            }
        };
        // Only now is it certain that the run goes on, and with these settings.
        disk.replace(&run.out.join(RUN_FILE), saved::write(run).as_bytes())?;
        let (metrics, last) = MetricsFile::open(disk, &run.out.join("metrics.jsonl"), progress.step)?;
        let writer = Writer {
            disk: disk.clone(),
            out: run.out.clone(),
            config,
            layout,
            precision: c.precision,
            fixed: saved::fixed(run),
            data: data.fingerprint.clone(),
            build: run.build,
            extra: data.tokenizer.files().into_iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect(),
            shard_bytes: SaveOptions::new(c.precision.act()).shard_bytes,
        };
        let saver =
            Saver::new(writer, Keep { last: c.keep_last, best: c.keep_best, initial: c.save_initial }, c.save_beside)?;
        let fresh = state.is_none();
        let (unread, before) = (VecDeque::new(), None);
        Loop { run, data, trainer, metrics, saver, observer, progress, last, fresh, unread, before }.go(ctx)
    }
}

/// One of the steps that a run consists of.
fn step_size(config: &ModelConfig, c: &TrainConfig) -> StepSize {
    StepSize {
        config: config.clone(),
        precision: c.precision,
        recompute: c.recompute,
        micro_batches: c.batch.div_ceil(c.micro_batch),
        sequences: c.micro_batch,
        tokens: c.seq,
        objective: c.objective,
        average: c.ema_decay > 0.0,
    }
}

/// A run of fewer steps than it has done, or with a record of batches that would be of a part, is not resumed.
fn fits_schedule(run: &Run, done: &Progress) -> Result<(), TrainError> {
    let refuse = |what: String| Err(TrainError::Config { what });
    if run.config.record_batches.is_some() {
        return refuse(
            "train.record_batches: expected a run recorded from its first step, found one that resumes (--override \
             gives the recording up)"
                .into(),
        );
    }
    if run.config.schedule.steps < done.step {
        let (steps, done) = (run.config.schedule.steps, done.step);
        return refuse(format!("train.steps = {steps}: expected at least the {done} steps that the run has done"));
    }
    Ok(())
}
