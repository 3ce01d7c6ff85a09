//! The loop over steps: tokens in, metrics and checkpoints out.

use crate::TrainError;
use crate::evaluate::{Evaluation, Held, evaluate, sequence};
use crate::metrics::{Metrics, MetricsFile};
use crate::prepare::Prepared;
use crate::pretrain::{Observer, Outcome, Run};
use crate::record::Recorder;
use crate::saver::Saver;
use crate::state::{Arenas, Progress, name};
use crate::step::{StepReport, StepUnderWay, Trainer};
use hadal_kernels::{Buf, Ctx, DType, Elem, Mark, bf16};
use hadal_model::Sequence;
use std::collections::VecDeque;
use std::path::PathBuf;

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
    let cpu = ctx.host();
    cpu.chunks_mut(&mut found, 1, |i, found| {
        let piece = &weights[i * CHECKED..weights.len().min((i + 1) * CHECKED)];
        found[0] = piece.iter().map(|&x| stored(x)).find(|x| !x.is_finite());
    });
    found.into_iter().flatten().next()
}

/// Steps that a GPU may be given before what the first of them measured is read: the host waits once for half of them,
/// while the GPU has the other half to do.
const BEHIND: usize = 16;

/// A step whose measurements nobody has read.
pub(crate) struct Unread {
    under_way: StepUnderWay,
    step: u64,
    tokens: u64,
    lr: f64,
    valid: Option<Evaluation>,
}

/// A run under way.
pub(crate) struct Loop<'a> {
    pub run: &'a Run,
    pub data: Prepared,
    pub trainer: Trainer,
    pub metrics: MetricsFile,
    pub saver: Saver,
    pub observer: &'a mut dyn Observer,
    pub progress: Progress,
    pub last: Option<Metrics>,
    /// In the order of steps.
    pub unread: VecDeque<Unread>,
    /// Since when the first of them has taken its time: the end of the step before, or its own beginning.
    pub before: Option<Mark>,
    /// From the initial weights, not from a checkpoint.
    pub fresh: bool,
}

impl Loop<'_> {
    /// Runs the steps that are left.
    pub fn go(mut self, ctx: &Ctx) -> Result<Outcome, TrainError> {
        let c = &self.run.config;
        let mut recorder = c.record_batches.as_ref().map(|_| Recorder::new(c.batch, c.seq));
        if c.save_initial && self.fresh {
            self.save(ctx)?;
        }
        let mut finished = true;
        while self.progress.step < c.schedule.steps {
            self.step(ctx, recorder.as_mut())?;
            finished = self.progress.step == c.schedule.steps;
            let stop = !finished && self.observer.stop();
            if stop || finished || self.progress.step.is_multiple_of(c.checkpoint_every) {
                self.save(ctx)?;
            }
            if stop {
                break;
            }
            let done = self.saver.poll()?;
            self.tell(&done);
        }
        let done = self.saver.wait()?;
        self.tell(&done);
        if let (Some(r), Some(path), true) = (recorder, &c.record_batches, finished) {
            r.write(path)?;
        }
        let none = || TrainError::Config { what: "train.steps = 0: expected at least 1".into() };
        let step = self.progress.step;
        let checkpoint = self.run.out.join(name(step));
        let held = self.held().windows().map(<[u32]>::to_vec).collect();
        let (last, prompts) = (self.last.ok_or_else(none)?, self.data.prompts);
        Ok(Outcome { checkpoint, last, step, finished, prompts, held })
    }

    fn step(&mut self, ctx: &Ctx, recorder: Option<&mut Recorder>) -> Result<(), TrainError> {
        let c = &self.run.config;
        let step = self.progress.step;
        let ctx = Ctx { step, ..ctx.clone() };
        if self.unread.is_empty() {
            self.before = Some(ctx.mark());
        }
        let windows = self.windows()?;
        if let Some(r) = recorder {
            r.add(&windows);
        }
        let sequences: Vec<Sequence> = windows.iter().map(|w| sequence(w)).collect();
        let micro: Vec<Vec<Sequence>> = sequences.chunks(c.micro_batch).map(<[Sequence]>::to_vec).collect();
        let lr = c.schedule.rate(step);
        let under_way = self.trainer.begin(&ctx, &micro, lr);
        self.progress.step += 1;
        self.progress.next_sample += c.batch as u64;
        self.progress.tokens += (c.batch * c.seq) as u64;
        let step = self.progress.step;
        let due = step.is_multiple_of(c.eval_every) || step == c.schedule.steps;
        if due {
            // Weights that gave something else are not worth a validation.
            self.read_all()?;
            self.sound(step, &under_way.read())?;
        }
        let valid = due.then(|| self.evaluate(&ctx));
        self.progress.valid_bits_per_byte = valid.map(|v| v.bits_per_byte);
        self.unread.push_back(Unread { under_way, step, tokens: self.progress.tokens, lr, valid });
        match self.unread.len() {
            _ if due => self.read_all(),
            BEHIND => self.read_first(BEHIND / 2),
            _ => self.read_ready(),
        }
    }

    /// A step's loss and gradient are numbers.
    fn sound(&self, step: u64, report: &StepReport) -> Result<(), TrainError> {
        finite(step, "loss", report.losses.total())?;
        finite(step, "gradient norm", report.grad_norm.into())
    }

    /// Reads what steps measured that are over.
    fn read_ready(&mut self) -> Result<(), TrainError> {
        let ready = |unread: &VecDeque<Unread>| unread.front().is_some_and(|u| u.under_way.is_ready());
        while let Some(first) = ready(&self.unread).then(|| self.unread.pop_front()).flatten() {
            self.record(first)?;
        }
        Ok(())
    }

    /// Reads what all steps measured, and waits for it.
    fn read_all(&mut self) -> Result<(), TrainError> {
        self.read_first(self.unread.len())
    }

    /// Reads what the first `n` steps measured, and waits for it.
    fn read_first(&mut self, n: usize) -> Result<(), TrainError> {
        let first: Vec<Unread> = self.unread.drain(..n).collect();
        first.into_iter().try_for_each(|unread| self.record(unread))
    }

    /// The tokens of the next step: a function of the seed and the number of the first sample.
    fn windows(&self) -> Result<Vec<Vec<u32>>, TrainError> {
        let first = self.progress.next_sample;
        let samples = (first..first + self.run.config.batch as u64).map(|i| self.data.train.sample(i));
        Ok(samples.collect::<Result<_, _>>()?)
    }

    fn record(&mut self, unread: Unread) -> Result<(), TrainError> {
        let c = &self.run.config;
        let Unread { under_way, step, tokens, lr, valid } = unread;
        let report = under_way.read();
        let end = under_way.into_end();
        let seconds = self.before.replace(end.clone()).map_or(0.0, |before| end.since(&before));
        let loss = report.losses.total();
        self.sound(step, &report)?;
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
            tokens,
            seconds,
            tokens_per_s: (c.batch * c.seq) as f64 / seconds,
            valid_bits_per_byte: valid.map(|v| v.bits_per_byte),
            valid_loss: valid.map(|v| v.loss),
        };
        self.metrics.append(&m)?;
        self.observer.step(&m);
        self.last = Some(m);
        Ok(())
    }

    fn evaluate(&self, ctx: &Ctx) -> Evaluation {
        evaluate(ctx, &self.trainer.model, &self.trainer.params, self.held())
    }

    fn held(&self) -> Held<'_> {
        let c = &self.run.config;
        Held {
            stream: &self.data.held,
            byte_lengths: &self.data.byte_lengths,
            seq: c.seq,
            batch: c.micro_batch,
            max_tokens: c.eval_tokens,
        }
    }

    /// Hands the state after this step to the saver; weights that a checkpoint cannot hold as finite numbers are refused.
    fn save(&mut self, ctx: &Ctx) -> Result<(), TrainError> {
        self.read_all()?;
        let dtype = self.run.config.precision.act();
        let master = self.trainer.params.master.host();
        let master = master.view().f32();
        if let Some(x) = not_finite(ctx, master, dtype) {
            return Err(TrainError::Diverged { step: self.progress.step, what: "weight", found: x.into() });
        }
        self.metrics.sync()?;
        // Writing needs memory of its own, and after the last step nothing else does.
        ctx.device.release();
        let [m, v] = self.trainer.optimizer().moments().map(Buf::host);
        let ema = self.trainer.average().map(Buf::host);
        let ema = ema.as_ref().map(|e| e.view().f32());
        let arenas = Arenas { master, m: m.view().f32(), v: v.view().f32(), ema };
        let updates = self.trainer.optimizer().updates();
        let done = self.saver.save(&arenas, self.progress.clone(), updates)?;
        self.tell(&done);
        Ok(())
    }

    fn tell(&mut self, done: &[PathBuf]) {
        done.iter().for_each(|path| self.observer.checkpoint(path));
    }
}
