//! `bench train`: the real step (forward, backward, clip, AdamW on FP32 masters, bias update), without MTP, on real
//! token ids. With `--export` it writes weights, tokens and the optimiser's constants instead, so that another trainer
//! can do the same steps; with `--from` it takes them.

use super::by_op::ByOp;
use super::case::{Against, restricted};
use super::measure::{Budget, median, spread};
use super::peaks::Peaks;
use super::resident;
use super::row::{Ahead, Row, Sink, Training};
use super::tokens::Tokens;
use crate::output::Output;
use crate::pretrain::assignment;
use crate::{Global, memory, open};
use anyhow::{Context, bail, ensure};
use clap::Args;
use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Ctx, DType, Mark};
use hadal_model::account::{Activations, Flops, Passes, TrainingMemory};
use hadal_model::{
    Checkpoint, Layout, Model, ModelConfig, Params, Precision, Recompute, SaveOptions, Scope, Sequence,
    preset_sequence, save_checkpoint,
};
use hadal_train::plan::{self, StepSize};
use hadal_train::{
    AdamW, Objective, Recorder, RunFile, Settings, StepUnderWay, TrainConfig, TrainError, Trainer, sequence,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Options of `bench train`.
#[derive(Args)]
pub struct Train {
    /// Model: nano, mini, 1b, v2-lite, moonlight-16b, v3.
    #[arg(long, value_name = "P", required_unless_present = "from", conflicts_with = "from")]
    preset: Option<String>,
    /// Set a key of the preset's model, as model.n_routed_experts=64; the value is TOML. Repeatable.
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "from")]
    set: Vec<String>,
    /// Weights, tokens and constants that `--export` has written.
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Sequences a step `[default: 8]`.
    #[arg(long, allow_negative_numbers = true, value_name = "B", conflicts_with = "from")]
    batch: Option<usize>,
    /// Tokens a sequence `[default: the preset's]`.
    #[arg(long, allow_negative_numbers = true, value_name = "T", conflicts_with = "from")]
    seq: Option<usize>,
    /// Steps, of which the first is not timed, of a GPU's the first two `[default: 20, or all that there are tokens for]`.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    steps: Option<usize>,
    /// Numbers to compute in: bf16 or fp32.
    #[arg(long, default_value = "bf16", value_name = "D")]
    dtype: String,
    /// What backward computes again instead of keeping it: none, paper (as `pretrain` by itself) or all.
    #[arg(long, default_value = "paper", value_name = "R", conflicts_with = "export")]
    recompute: String,
    /// Write the model (FP32), its tokens and the optimiser's constants to a new directory, and train nothing.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["from", "record"])]
    export: Option<PathBuf>,
    /// Tell how much of a step's time each op takes.
    #[arg(long, conflicts_with = "export")]
    by_op: bool,
    /// With --by-op, tell calls of an op apart that differ in sizes.
    #[arg(long, requires = "by_op")]
    by_size: bool,
    /// Append the result to `bench/record/<machine>/<date>.jsonl`.
    #[arg(long)]
    record: bool,
}

/// Learning rate of every step: high enough to learn, low enough that two trainers' losses stay close.
const RATE: f64 = 3e-4;
/// Steps on a GPU that are not timed: one is launched, one recorded.
const WARM_ON_GPU: usize = 2;
/// A key that `--set` may have, and those that change nothing without MTP.
const EXAMPLE: &str = "model.n_routed_experts=64";
const OF_MTP: [&str; 2] = ["num_nextn_predict_layers", "mtp_hidden"];
/// Files of an export beside the model's.
const TOKENS: &str = "tokens.safetensors";
const CONSTANTS: &str = "bench.json";

/// What another trainer must know to do the same step.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Constants {
    lr: f64,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    clip: f32,
    balance_alpha: f32,
    bias_gamma: f32,
}

impl Constants {
    fn of(c: &TrainConfig) -> Self {
        let AdamW { beta1, beta2, eps, weight_decay, clip } = c.adamw;
        let Objective { balance_alpha, bias_gamma, .. } = c.objective;
        Self { lr: c.schedule.peak, beta1, beta2, eps, weight_decay, clip, balance_alpha, bias_gamma }
    }

    fn adamw(&self) -> AdamW {
        let Self { beta1, beta2, eps, weight_decay, clip, .. } = *self;
        AdamW { beta1, beta2, eps, weight_decay, clip }
    }

    fn objective(&self) -> Objective {
        Objective { mtp_lambda: 0.0, balance_alpha: self.balance_alpha, bias_gamma: self.bias_gamma }
    }
}

/// What is to be trained, before there are weights.
struct Job {
    name: String,
    config: ModelConfig,
    constants: Constants,
    tokens: Tokens,
    steps: usize,
    recompute: Recompute,
}

impl Train {
    /// Measures, or exports.
    pub fn run(&self, ctx: &Ctx, global: &Global, out: &Output) -> anyhow::Result<()> {
        let precision = open::precision(&self.dtype)?;
        let (least, why) = self.least_steps(ctx);
        if let Some(found) = self.steps.filter(|&n| n < least) {
            bail!("--steps {found}: expected at least {least}{why}");
        }
        // What the process holds before the model is built: nothing of what follows is to hide in it.
        let before = resident::now();
        let job = match (&self.from, &self.preset) {
            (Some(dir), _) => {
                ensure!(global.seed.is_none(), "--seed has no effect with --from");
                self.read(ctx, dir, precision, out)?
            }
            (None, Some(preset)) => self.make(ctx, preset, precision, global.seed.unwrap_or(0))?,
            (None, None) => bail!("--preset: expected the name of a preset, found none"),
        };
        let mut sink = Sink::new(out, self.record, &ctx.device)?;
        job.reserve(ctx, precision)?;
        let mut model = Model::whole(ctx, job.config.clone());
        model.recompute = job.recompute;
        let params = match &self.from {
            Some(dir) => Checkpoint::open(dir)?.load(ctx, &model.config, model.layout.clone(), precision)?.0,
            None => Params::init(ctx, &model.config, model.layout.clone(), precision, global.seed.unwrap_or(0)),
        };
        if let Some(dir) = &self.export {
            return job.export(dir, &params, out);
        }
        let mut row = job.measure(ctx, model, params, before, self.by_op.then(|| ByOp::new(ctx, self.by_size)))?;
        let Tokens { batch, seq, .. } = job.tokens;
        let mut case = format!("{} {batch}x{seq} {} {}", job.name, self.dtype, global.device_name());
        if job.recompute != Recompute::default() {
            case += &format!(" recompute {}", job.recompute.name());
        }
        row.case = restricted(ctx, &case);
        row.share_of_peak = job.share_of_peak(ctx, precision, row.ours)?;
        sink.put(row)
    }

    fn recompute(&self) -> anyhow::Result<Recompute> {
        self.recompute.parse().map_err(|e| anyhow::anyhow!("--{e}"))
    }

    /// Fewest steps, and why: some that are not timed come before those that are.
    fn least_steps(&self, ctx: &Ctx) -> (usize, &'static str) {
        match ctx.device.as_cuda() {
            _ if self.export.is_some() => (1, ""),
            Some(_) if !self.by_op => (WARM_ON_GPU + 1, " on a GPU: the first is launched, the second recorded"),
            _ => (2, ": the first is not timed"),
        }
    }

    /// From a preset's name.
    fn make(&self, ctx: &Ctx, preset: &str, precision: Precision, seed: u64) -> anyhow::Result<Job> {
        let (name, config) = self.model(preset)?;
        let steps = self.steps.unwrap_or(20);
        let settings = Settings {
            steps: Some(steps as u64),
            batch: Some(self.batch.unwrap_or(8)),
            // As `pretrain` has it: of the preset's own length, or of all the positions that are left.
            seq: self.seq.or(preset_sequence(preset).map(|n| n.min(config.max_position_embeddings))),
            lr: Some(RATE),
            warmup: Some(0),
            constant: Some(steps as u64),
            ..Settings::default()
        };
        let resolved = TrainConfig::resolve(settings, &config).map_err(of_options)?;
        let recompute = self.recompute()?;
        fits(ctx, &config, (precision, recompute), [steps, resolved.batch, resolved.seq])?;
        let tokens = Tokens::built_in(seed, config.vocab_size, steps, resolved.batch, resolved.seq)?;
        Ok(Job { name, config, constants: Constants::of(&resolved), tokens, steps, recompute })
    }

    /// The preset with the keys that `--set` changes, without MTP, and what both are called together.
    fn model(&self, preset: &str) -> anyhow::Result<(String, ModelConfig)> {
        let mut file = RunFile::default();
        file.set("model.preset", preset.into(), "--preset")?;
        let mut name = preset.to_string();
        for text in &self.set {
            let (key, value) = assignment(text)?;
            let of_model = key.strip_prefix("model.");
            let of_model =
                of_model.with_context(|| format!("--set {text}: expected a key of the model, as {EXAMPLE}"))?;
            ensure!(
                !OF_MTP.contains(&of_model),
                "--set {text}: has no effect on hadal bench train, which trains without MTP"
            );
            name += &format!(" {of_model}={value}");
            file.set(key, value, &format!("--set {text}"))?;
        }
        let mut config = file.resolve_model()?;
        config.num_nextn_predict_layers = 0;
        Ok((name, config))
    }

    /// From a directory that [`Job::export`] wrote.
    fn read(&self, ctx: &Ctx, dir: &Path, precision: Precision, out: &Output) -> anyhow::Result<Job> {
        let config = open::config(dir, out)?;
        let path = dir.join(CONSTANTS);
        let cannot = || format!("{}: expected what hadal bench train --export writes", path.display());
        let exported: Exported =
            serde_json::from_slice(&std::fs::read(&path).with_context(cannot)?).with_context(cannot)?;
        let path = dir.join(TOKENS);
        let tokens = Tokens::read(&path, config.vocab_size)?;
        let (found, most) = (tokens.seq, config.max_position_embeddings);
        ensure!(found <= most, "{}: expected sequences of at most {most} tokens, found {found}", path.display());
        let (found, (least, _)) = (tokens.steps, self.least_steps(ctx));
        ensure!(found >= least, "{}: expected tokens of at least {least} steps, found {found}", path.display());
        let steps = self.steps.unwrap_or(found);
        ensure!(steps <= found, "--steps {steps}: expected at most {found}, as many as {} has", path.display());
        let recompute = self.recompute()?;
        fits(ctx, &config, (precision, recompute), [steps, tokens.batch, tokens.seq])?;
        Ok(Job { name: exported.name, config, constants: exported.constants, tokens, steps, recompute })
    }
}

/// What is wrong with settings of a run, in the words of this verb: its options are called as the keys.
fn of_options(e: TrainError) -> anyhow::Error {
    let what = e.to_string().replacen("train.", "--", 1).replacen(" = ", " ", 1);
    anyhow::anyhow!(what.replacen(", seq = ", " --seq ", 1))
}

/// Bytes that a token takes while the corpus is cut into windows: of text, and as an id that was and one that is kept.
const BYTES_A_TOKEN: usize = 14;

/// An error if this machine's memory cannot hold the model in training and its tokens; a GPU's is looked at by itself.
fn fits(
    ctx: &Ctx,
    config: &ModelConfig,
    (precision, recompute): (Precision, Recompute),
    sizes: [usize; 3],
) -> anyhow::Result<()> {
    if ctx.device.as_cuda().is_some() {
        return Ok(());
    }
    let ([steps, batch, seq], workers) = (sizes, ctx.host().workers());
    let layout = Layout::new(config, Scope::whole(config));
    let passes = Passes { precision, recompute, sequences: batch, tokens: seq, workers };
    let memory = TrainingMemory::of(&layout, precision, DType::F32, Activations::of(config, passes));
    let tokens = [batch, seq + 1, BYTES_A_TOKEN].iter().fold(steps, |all, &n| all.saturating_mul(n));
    memory::fits("the model in training and its tokens", memory.total().saturating_add(tokens))
}

/// The file beside model and tokens.
#[derive(Serialize, Deserialize)]
struct Exported {
    name: String,
    constants: Constants,
}

impl Job {
    fn export(&self, dir: &Path, params: &Params, out: &Output) -> anyhow::Result<()> {
        let mut recorder = Recorder::new(self.tokens.batch, self.tokens.seq);
        (0..self.steps).for_each(|step| recorder.add(&self.tokens.windows(step)));
        let tokens = recorder.bytes().with_context(|| dir.join(TOKENS).display().to_string())?;
        let exported = serde_json::to_vec_pretty(&Exported { name: self.name.clone(), constants: self.constants })?;
        let extra = [(TOKENS, &tokens[..]), (CONSTANTS, &exported[..])];
        save_checkpoint(dir, &self.config, params, SaveOptions::new(DType::F32), &extra)?;
        out.text(&format!("{} with tokens of {} steps in {}\n", self.name, self.steps, dir.display()));
        out.object(&serde_json::json!({ "export": dir, "steps": self.steps }));
        Ok(())
    }

    fn measure(
        &self,
        ctx: &Ctx,
        model: Model,
        params: Params,
        before: Option<u64>,
        mut by_op: Option<ByOp>,
    ) -> anyhow::Result<Row> {
        let mut trainer = Trainer::new(ctx, model, params, self.constants.adamw(), self.constants.objective());
        let moments = 2 * trainer.params.master.bytes();
        let state = (trainer.params.bytes() + trainer.grads().bytes() + moments) as u64;
        let forgotten = resident::forget();
        let (mut seconds, mut losses) = (Vec::new(), Vec::new());
        if let (Some(cuda), None) = (ctx.device.as_cuda(), &by_op) {
            let (seconds, losses, ahead) = self.run_ahead(ctx, cuda, &mut trainer)?;
            let peak = (cuda.memory().peak as u64).saturating_sub(state);
            let training = Training { ahead: Some(ahead), ..Training::new(&losses, Some(peak), state, None) };
            return Ok(self.row(ctx, &seconds, training));
        }
        for step in 0..self.steps {
            let begin = Instant::now();
            let sequences: Vec<Sequence> = self.tokens.windows(step).iter().map(|w| sequence(w)).collect();
            let ctx = Ctx { step: step as u64, ..ctx.clone() };
            let report = trainer.step(&ctx, &[sequences], self.constants.lr);
            seconds.push(begin.elapsed().as_secs_f64());
            by_op.iter_mut().for_each(|b| b.add(seconds[step]));
            let loss = report.losses.main;
            ensure!(loss.is_finite(), "step {}: expected a finite loss, found {loss}", step + 1);
            losses.push(loss);
        }
        // What a GPU takes is not resident; it is told of steps that are not timed by op.
        let on_host = ctx.device.as_cuda().is_none();
        let most = forgotten.and_then(|()| resident::most()).zip(before).filter(|_| on_host);
        let peak = most.map(|(most, before)| most.saturating_sub(before + state));
        let by_op = by_op.map(|b| b.medians());
        Ok(self.row(ctx, &seconds, Training::new(&losses, peak, state, by_op)))
    }

    /// Steps on a GPU as a run has them: the host is ahead and waits for none. The first is launched, the second
    /// recorded, and both are waited for; what is timed is replayed.
    fn run_ahead(&self, ctx: &Ctx, cuda: &Cuda, trainer: &mut Trainer) -> anyhow::Result<(Vec<f64>, Vec<f64>, Ahead)> {
        let mut begin = |step: usize| {
            let sequences: Vec<Sequence> = self.tokens.windows(step).iter().map(|w| sequence(w)).collect();
            let ctx = Ctx { step: step as u64, ..ctx.clone() };
            trainer.begin(&ctx, &[sequences], self.constants.lr)
        };
        let warm = WARM_ON_GPU;
        let mut under_way: Vec<StepUnderWay> = (0..warm).map(&mut begin).collect();
        cuda.synchronize();
        let (before, start) = ((cuda.waits(), cuda.replays()), ctx.mark());
        under_way.extend((warm..self.steps).map(&mut begin));
        let timed = self.steps - warm;
        let ((waits, copies), replays) = (cuda.waits(), cuda.replays() - before.1);
        let waited = (waits - before.0.0 + copies - before.0.1) as f64 / timed as f64;
        let ahead = Ahead { host_waits: waited, graph_replayed: replays == timed as u64 };
        let losses: Vec<f64> = under_way.iter().map(|u| u.read().losses.main).collect();
        if let Some(step) = losses.iter().position(|l| !l.is_finite()) {
            bail!("step {}: expected a finite loss, found {}", step + 1, losses[step]);
        }
        let ends: Vec<Mark> = under_way.into_iter().skip(warm).map(StepUnderWay::into_end).collect();
        let begins = std::iter::once(&start).chain(&ends);
        // The first is what the others are not timed without.
        let seconds = std::iter::once(0.0).chain(ends.iter().zip(begins).map(|(end, begin)| end.since(begin)));
        Ok((seconds.collect(), losses, ahead))
    }

    /// The first of `seconds` is left out: it touches memory for the first time.
    fn row(&self, ctx: &Ctx, seconds: &[f64], training: Training) -> Row {
        let timed = &seconds[1..];
        let rate = |s: f64| (self.tokens.batch * self.tokens.seq) as f64 / s;
        let [fastest, slowest] = spread(timed);
        Row {
            spread: [rate(slowest), rate(fastest)],
            training: Some(training),
            ..Row::new(&ctx.device, "train", self.name.clone(), "tokens/s", rate(median(timed)))
        }
    }

    /// On a GPU, its memory in one piece; an error says what would fit.
    fn reserve(&self, ctx: &Ctx, precision: Precision) -> anyhow::Result<()> {
        let size = StepSize {
            config: self.config.clone(),
            precision,
            recompute: self.recompute,
            micro_batches: 1,
            sequences: self.tokens.batch,
            tokens: self.tokens.seq,
            objective: self.constants.objective(),
            average: false,
        };
        plan::reserve(ctx, &size).map_err(anyhow::Error::msg)
    }

    /// Of the operations that the model needs, recomputed ones not counted.
    fn share_of_peak(&self, ctx: &Ctx, precision: Precision, tokens_per_s: f64) -> anyhow::Result<Option<f64>> {
        let against = if precision == Precision::Bf16 { Against::Bf16 } else { Against::F32 };
        let peak = Peaks::default().of(ctx, against, &Budget::new(5, 0.2, &ctx.device)?);
        let needed = Flops::training(&self.config, self.tokens.seq).total() * tokens_per_s;
        Ok(peak.map(|p| needed / 1e9 / p))
    }
}
