//! `hadal pretrain`: from text to a checkpoint, with progress, ending in text that the model writes.

use crate::demo;
use crate::inspect::scaled;
use crate::output::Output;
use crate::progress::Bytes;
use crate::{BUILD, Global, interrupt, memory};
use anyhow::Context;
use clap::{ArgGroup, Args};
use hadal_kernels::{Ctx, DType};
use hadal_model::account::{Activations, Passes, TrainingMemory};
use hadal_model::{Layout, Scope};
use hadal_train::{Metrics, Observer, Outcome, RUN_FILE, Run, RunFile, Start, TrainError};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use toml::Value;

/// Options of `pretrain`.
#[derive(Args)]
#[command(group = ArgGroup::new("model"))]
#[command(after_help = "Examples:
  hadal pretrain --preset nano --out first-run
  hadal pretrain --preset nano --data shakespeare.txt poems.txt --out run --steps 1000
  hadal pretrain --config my.toml --out run --dtype fp32 --seed 3
  hadal pretrain --preset nano --set model.num_hidden_layers=4 --set train.beta1=0.8 --out run
  hadal pretrain --resume --out run
  hadal pretrain --resume --override --steps 2000 --out run

Without --data the text is a corpus that hadal generates itself: English, Chinese, code,
arithmetic, puzzles.
DIR gets run.toml (all settings), metrics.jsonl (a line a step), step-NNNNNN/ (a checkpoint
that transformers loads), latest, best, data/ (the text as tokens).
Ctrl-C and SIGTERM save a checkpoint and leave, with exit code 130 and 143; once more leaves at
once.")]
pub struct Pretrain {
    /// Model by name: nano, mini, 1b, v2-lite, moonlight-16b, v3.
    #[arg(long, value_name = "P", group = "model")]
    preset: Option<String>,
    /// TOML file with `[model]`, `[data]` and `[train]`; options here win over it.
    #[arg(long, value_name = "F", group = "model")]
    config: Option<PathBuf>,
    /// Text: files, folders, globs; .jsonl and .ndjson hold a JSON object a line.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Option<Vec<PathBuf>>,
    /// A tokenizer.json, or a directory with one; by default a byte-level BPE is trained on the text.
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Directory of the run; new or empty without --resume.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the run in DIR from its newest checkpoint; in an empty DIR, start one. Alone, takes all settings from
    /// DIR/run.toml.
    #[arg(long)]
    resume: bool,
    /// With --resume: take settings that differ from DIR/run.toml, where a run may change them.
    #[arg(long = "override", requires = "resume")]
    override_saved: bool,
    /// Set any key of a run file, as train.beta1=0.8 or model.num_hidden_layers=4; the value is TOML, strings may be
    /// bare. Repeatable.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Optimiser steps `[default: 1000]`.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    steps: Option<u64>,
    /// Sequences a step `[default: 4]`.
    #[arg(long, allow_negative_numbers = true, value_name = "B")]
    batch: Option<usize>,
    /// Sequences in flight at once; gradients accumulate over batch / micro-batch passes `[default: batch]`.
    #[arg(long, allow_negative_numbers = true, value_name = "B")]
    micro_batch: Option<usize>,
    /// Tokens a sequence `[default: the preset's (nano 256, mini 512, 1b 2048, others 4096), else 256]`.
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    seq: Option<usize>,
    /// Numbers to compute in: bf16 or fp32 `[default: bf16]`.
    #[arg(long, value_name = "D")]
    dtype: Option<String>,
    /// Peak learning rate `[default: 0.002]`.
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    lr: Option<f64>,
    /// Steps between checkpoints `[default: a quarter of the steps]`.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Steps between validations `[default: a quarter of the steps]`.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    eval_every: Option<u64>,
    /// Also write the initial weights, as step-000000.
    #[arg(long)]
    save_initial: bool,
    /// Record the tokens of every step in this safetensors file, for comparison with other trainers.
    #[arg(long, value_name = "FILE")]
    record_batches: Option<PathBuf>,
    /// End without the report: no samples, no measurements of the finished model.
    #[arg(long)]
    no_demo: bool,
}

impl Pretrain {
    /// Trains, then lets the model write.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<ExitCode> {
        let ctx = global.ctx()?;
        let run = self.resolve(global)?;
        // A GPU's memory is looked at when the run's size is known to the last token.
        if ctx.device.as_cuda().is_none() {
            fits(&ctx, &run)?;
        }
        let seen = demo::progress::Progress::new(&run.config);
        let mut progress = Progress { out: *out, bar: None, bytes: Bytes::default(), seen };
        let signals = interrupt::watch().context("signals cannot be watched")?;
        let outcome = match hadal_train::pretrain(&ctx, &run, &mut progress) {
            Err(stopped @ TrainError::Stopped) => {
                out.object(&serde_json::json!({ "stopped": { "checkpoint": null, "what": stopped.to_string() } }));
                out.text(&format!("\n{stopped}\n"));
                return Ok(ExitCode::from(interrupt::code()));
            }
            other => other?,
        };
        drop(signals);
        progress.finish();
        if !outcome.finished {
            return Ok(self.stopped(&outcome, out));
        }
        // The report is inference.
        ctx.device.as_cuda().into_iter().for_each(|cuda| cuda.set_invariant(true));
        demo::end(&ctx, &run, &outcome, progress.seen.ended(), !self.no_demo, out)?;
        Ok(ExitCode::SUCCESS)
    }

    /// The end of a run that was told to stop.
    fn stopped(&self, outcome: &Outcome, out: &Output) -> ExitCode {
        let resume = format!("hadal pretrain --resume --out {}", demo::quoted(&self.out));
        out.object(&serde_json::json!({
            "stopped": { "step": outcome.step, "checkpoint": outcome.checkpoint, "resume": resume },
        }));
        let dir = outcome.checkpoint.display();
        out.text(&format!("\nStopped after step {}. Checkpoint: {dir}\nTo go on: {resume}\n", outcome.step));
        ExitCode::from(interrupt::code())
    }

    fn resolve(&self, global: &Global) -> anyhow::Result<Run> {
        let saved = self.out.join(RUN_FILE);
        let mut file = match &self.config {
            Some(path) => RunFile::read(path)?,
            None if self.resume && self.preset.is_none() && saved.exists() => RunFile::read(&saved)?,
            None => RunFile::default(),
        };
        if self.data.is_some() {
            // Options win over the file: these paths are all the text there is.
            file.data.sources = None;
        }
        for (flag, key, value) in self.flags(global) {
            file.set(key, value.with_context(|| flag)?, flag)?;
        }
        for text in &self.set {
            let (key, value) = assignment(text)?;
            file.set(key, value, &format!("--set {text}"))?;
        }
        if file.model.is_none() && self.config.is_none() {
            anyhow::bail!("{}", self.no_model());
        }
        let run = file.resolve(self.out.clone(), BUILD)?;
        Ok(Run { resume: self.resume, override_saved: self.override_saved, ..run })
    }

    fn no_model(&self) -> String {
        let options = "--preset <P> or --config <F>";
        if !self.resume {
            return format!("expected a model to train: {options}, or --resume with the --out of a run");
        }
        format!(
            "{}: expected a run to go on with ({RUN_FILE}), found none; a new one needs {options}",
            self.out.display()
        )
    }

    /// The options that are short for keys, as (option, key, value).
    fn flags(&self, global: &Global) -> Vec<(&'static str, &'static str, anyhow::Result<Value>)> {
        let flag = |flag, key, value: Option<anyhow::Result<Value>>| Some((flag, key, value?));
        let paths =
            |paths: &Vec<PathBuf>| paths.iter().map(path_value).collect::<anyhow::Result<_>>().map(Value::Array);
        [
            flag("--preset", "model.preset", self.preset.clone().map(|name| Ok(name.into()))),
            flag("--data", "data.paths", self.data.as_ref().map(paths)),
            flag("--tokenizer", "data.tokenizer", self.tokenizer.as_ref().map(path_value)),
            flag("--steps", "train.steps", self.steps.map(integer)),
            flag("--batch", "train.batch", self.batch.map(integer)),
            flag("--micro-batch", "train.micro_batch", self.micro_batch.map(integer)),
            flag("--seq", "train.seq", self.seq.map(integer)),
            flag("--dtype", "train.dtype", self.dtype.clone().map(|name| Ok(name.into()))),
            flag("--seed", "train.seed", global.seed.map(integer)),
            flag("--lr", "train.lr", self.lr.map(|x| Ok(x.into()))),
            flag("--checkpoint-every", "train.checkpoint_every", self.checkpoint_every.map(integer)),
            flag("--eval-every", "train.eval_every", self.eval_every.map(integer)),
            flag("--save-initial", "train.save_initial", self.save_initial.then(|| Ok(true.into()))),
            flag("--record-batches", "train.record_batches", self.record_batches.as_ref().map(path_value)),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// TOML's integers end at 2^63 - 1.
fn integer<N: TryInto<i64> + std::fmt::Display + Copy>(n: N) -> anyhow::Result<Value> {
    let fits = n.try_into().map_err(|_| anyhow::anyhow!("{n}: expected at most {}", i64::MAX))?;
    Ok(Value::Integer(fits))
}

fn path_value(path: impl AsRef<Path>) -> anyhow::Result<Value> {
    let path = path.as_ref();
    let text =
        path.to_str().with_context(|| format!("path {}: expected UTF-8, which a run file can hold", path.display()))?;
    Ok(Value::from(text))
}

/// `KEY=VALUE`, the value in TOML; what is no TOML and does not begin like a string, list or table is a bare string.
pub fn assignment(text: &str) -> anyhow::Result<(&str, Value)> {
    let expected = || format!("--set {text}: expected KEY=VALUE, as train.steps=100");
    let (key, value) = text.split_once('=').with_context(expected)?;
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() || value.is_empty() {
        anyhow::bail!(expected());
    }
    match value.parse::<Value>() {
        Ok(value) => Ok((key, value)),
        Err(e) if value.starts_with(['"', '\'', '[', '{']) => {
            anyhow::bail!("--set {text}: expected a TOML value: {}", e.message().replace('\n', " "))
        }
        Err(_) => Ok((key, Value::from(value))),
    }
}

/// Refuses a run that this machine's memory can never hold.
fn fits(ctx: &Ctx, run: &Run) -> anyhow::Result<()> {
    let (model, c) = (&run.model, &run.config);
    let layout = Layout::new(model, Scope::whole(model));
    let (precision, recompute) = (c.precision, c.recompute);
    let (sequences, tokens, workers) = (c.micro_batch, c.seq, ctx.host().workers());
    let passes = Passes { precision, recompute, sequences, tokens, workers };
    let training = TrainingMemory::of(&layout, c.precision, DType::F32, Activations::of(model, passes));
    let average = if c.ema_decay > 0.0 { training.masters } else { 0 };
    // What a checkpoint is written from beside training.
    let copy = if c.save_beside { training.masters + training.moments + average } else { 0 };
    let needed = training.total().saturating_add(average).saturating_add(copy);
    let hint = if c.save_beside { "; train.save_beside = false takes less" } else { "" };
    memory::fits(&format!("the run (hadal inspect says what it needs{hint})"), needed)
}

/// A bar on a terminal, plain lines elsewhere, JSON lines for machines.
struct Progress {
    out: Output,
    bar: Option<ProgressBar>,
    bytes: Bytes,
    seen: demo::progress::Progress,
}

impl Progress {
    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => self.out.text(&format!("{text}\n")),
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn phase(&mut self, what: &str) {
        self.out.object(&serde_json::json!({ "phase": what }));
        self.line(format!("{what} ..."));
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) {
        self.bytes.show(what, done, total, &self.out);
    }

    fn start(&mut self, s: &Start) {
        self.out.object(&serde_json::json!({
            "parameters": s.parameters, "train_tokens": s.tokens.0, "valid_tokens": s.tokens.1,
            "bytes_per_token": s.bytes_per_token, "steps": s.steps, "tokens_per_step": s.tokens_per_step,
        }));
        self.line(format!(
            "{} parameters; {} training and {} held-out tokens of {:.2} bytes; {} steps of {} tokens",
            scaled(s.parameters as f64, ""),
            scaled(s.tokens.0 as f64, ""),
            scaled(s.tokens.1 as f64, ""),
            s.bytes_per_token,
            s.steps,
            s.tokens_per_step
        ));
        if !self.out.json() {
            let bar = ProgressBar::with_draw_target(Some(s.steps), ProgressDrawTarget::stderr());
            let style = "{pos}/{len} {wide_msg}";
            bar.set_style(ProgressStyle::with_template(style).unwrap_or(ProgressStyle::default_bar()));
            self.bar = Some(bar);
        }
    }

    fn step(&mut self, m: &Metrics) {
        self.out.object(m);
        let message = self.seen.step(m);
        let Some(bar) = &self.bar else { return };
        bar.set_position(m.step);
        bar.set_message(message.clone());
        let due = m.step == 1 || m.step.is_multiple_of(20);
        if m.valid_bits_per_byte.is_some() || (bar.is_hidden() && due) {
            let unit = if m.valid_bits_per_byte.is_some() { " bits per byte" } else { "" };
            self.line(format!("step {}: {message}{unit}", m.step));
        }
    }

    fn resumed(&mut self, from: &Path, step: u64, remarks: &[String]) {
        self.out.object(&serde_json::json!({ "resumed": { "checkpoint": from, "step": step, "remarks": remarks } }));
        self.line(format!("going on after step {step} from {}", from.display()));
        remarks.iter().for_each(|remark| self.line(format!("  {remark}")));
    }

    fn stop(&self) -> bool {
        interrupt::stop()
    }

    fn checkpoint(&mut self, path: &Path) {
        self.out.object(&serde_json::json!({ "checkpoint": path }));
        self.line(format!("wrote {}", path.display()));
    }
}
