//! One optimiser step: micro-batches forward and backward, gradients in micro-batch order, clip and AdamW, bias update.

use crate::load::{Counts, CountsDownload, Load};
use crate::optimizer::{AdamW, Optimizer};
use hadal_comm::ExpertRange;
use hadal_kernels::cuda::Graph;
use hadal_kernels::ops::add;
use hadal_kernels::{Buf, Ctx, Device, Download, Mark};
use hadal_model::pass::{self, LossDownload, LossTerms, LossWeights, Losses};
use hadal_model::{Batch, Grads, Model, Params, Sequence, WeightGrads};

/// The objective beside cross-entropy, and the balancing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// lambda: weight of the MTP loss (V3 report, eq. 25).
    pub mtp_lambda: f32,
    /// alpha: weight of the sequence-wise balance loss (eq. 17); 0 leaves it out.
    pub balance_alpha: f32,
    /// gamma: speed of the bias update; 0 leaves the biases alone.
    pub bias_gamma: f32,
}

/// A model in training on one rank, which holds all experts: loss weights are normalised over this rank's batches, its
/// gradients are reduced with nobody's, and the norm is of what it holds.
pub struct Trainer {
    /// What it is.
    pub model: Model,
    /// Its weights.
    pub params: Params,
    /// Run weight gradients only after the last micro-batch (same bits, more memory).
    pub defer: bool,
    grads: Grads,
    optimizer: Optimizer,
    objective: Objective,
    average: Option<Average>,
    counts: Counts,
    /// The inputs of the last step, whose buffers the next one uses again.
    batches: Vec<Batch>,
    /// How the last step went.
    course: Option<Course>,
}

/// A step that may be done again in the same way.
struct Course {
    weights: LossWeights,
    /// Where its losses are found.
    terms: Vec<LossTerms>,
    /// Its recording, from the second step of a kind on.
    graph: Option<Graph>,
}

/// A step that the device may not have done yet.
pub struct StepUnderWay {
    losses: Vec<LossDownload>,
    norm: Download,
    load: CountsDownload,
    end: Mark,
}

/// A running average of the masters.
struct Average {
    decay: f32,
    weights: Buf,
}

/// What a step measured.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Parts of the loss.
    pub losses: Losses,
    /// Gradient norm before clipping.
    pub grad_norm: f32,
    /// Expert load over the global batch.
    pub load: Load,
}

impl Trainer {
    /// Wraps a model and its weights. Panics unless the model's exchange holds all experts (a contract breach): on
    /// several ranks every one of these sums would be of a part, and no other rank would ever be asked for the rest.
    pub fn new(ctx: &Ctx, model: Model, params: Params, adamw: AdamW, objective: Objective) -> Self {
        let (held, all) = (model.exchange.experts(), ExpertRange::all(model.config.n_routed_experts));
        assert_eq!(held, all, "a Trainer is one rank with all experts: it reduces nothing over ranks");
        let grads = Grads::zeros(ctx, model.layout.clone());
        let optimizer = Optimizer::new(ctx, &model.layout, adamw);
        let counts = Counts::new(ctx, &model.layout, model.config.n_routed_experts);
        let (batches, course) = (Vec::new(), None);
        Self { model, params, defer: false, grads, optimizer, objective, average: None, counts, batches, course }
    }

    /// Keeps an exponential moving average of the weights from here on (V3 report 3.2.3): after every step
    /// average = decay * average + (1 - decay) * weights. It begins at `weights`, or at the present ones.
    pub fn keep_average(&mut self, decay: f32, weights: Option<Buf>) {
        let weights = weights.unwrap_or_else(|| self.params.master.clone());
        assert_eq!(weights.len(), self.params.master.len(), "an average of another layout");
        self.average = Some(Average { decay, weights });
        self.course = None;
    }

    /// The average of the weights, if one is kept: an f32 arena of the layout.
    pub fn average(&self) -> Option<&Buf> {
        self.average.as_ref().map(|a| &a.weights)
    }

    /// The state of AdamW.
    pub(crate) fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// As [`Trainer::optimizer`], to take up its state after some updates.
    pub(crate) fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// The gradients of the last step, before clipping.
    pub fn grads(&mut self) -> &mut Grads {
        &mut self.grads
    }

    /// Loss weights of a global batch: every predicted token and every sequence counts alike (eq. 24 divides every
    /// depth by the main model's T).
    fn weights(&self) -> LossWeights {
        let depth = self.model.layout.mtp.len();
        let sum =
            |f: fn(&hadal_model::Depth) -> usize, k: usize| self.batches.iter().map(|b| f(&b.depths[k])).sum::<usize>();
        let token = 1.0 / sum(|d| d.predicted, 0).max(1) as f64;
        let mtp = f64::from(self.objective.mtp_lambda) / depth.max(1) as f64 * token;
        let alpha = f64::from(self.objective.balance_alpha);
        let balance = |k| (alpha / sum(|d| d.sequences, k).max(1) as f64) as f32;
        LossWeights {
            token: token as f32,
            mtp: mtp as f32,
            balance: if alpha > 0.0 { (0..=depth).map(balance).collect() } else { Vec::new() },
        }
    }

    /// Gradients of a global batch given as micro-batches, left in `grads`, and the losses; no update.
    pub fn gradients(&mut self, ctx: &Ctx, micro_batches: &[Vec<Sequence>]) -> (Losses, Load) {
        self.take_in(ctx, micro_batches);
        let terms = self.differentiate(ctx, &self.weights());
        (terms.iter().map(LossTerms::read).sum(), self.counts.download(ctx).read())
    }

    /// One whole step at learning rate `lr`; waits for its end.
    pub fn step(&mut self, ctx: &Ctx, micro_batches: &[Vec<Sequence>], lr: f64) -> StepReport {
        self.begin(ctx, micro_batches, lr).read()
    }

    /// Gives the device one whole step; what it measures can be read later. On a GPU a step like the one before it is
    /// recorded, and those that follow are replayed: the same launches without the host's time for each.
    pub fn begin(&mut self, ctx: &Ctx, micro_batches: &[Vec<Sequence>], lr: f64) -> StepUnderWay {
        let same_buffers = self.take_in(ctx, micro_batches);
        let weights = self.weights();
        self.optimizer.advance(lr);
        let before = self.course.take().filter(|c| same_buffers && c.weights == weights);
        let course = match (before, ctx.device.as_cuda()) {
            (Some(Course { terms, graph: Some(graph), weights }), _) if graph.replay() => {
                Course { weights, terms, graph: Some(graph) }
            }
            (Some(before), Some(cuda)) if cuda.may_record() => {
                // What it held is free for the recording.
                drop(before);
                let (graph, terms) = cuda.capture(|| self.work(ctx, &weights));
                assert!(graph.replay(), "nothing has happened since the recording");
                Course { weights, terms, graph: Some(graph) }
            }
            _ => Course { terms: self.work(ctx, &weights), weights, graph: None },
        };
        let under_way = StepUnderWay {
            losses: course.terms.iter().map(|t| t.download(ctx)).collect(),
            norm: ctx.download(self.optimizer.norm()),
            load: self.counts.download(ctx),
            end: ctx.mark(),
        };
        // On a CPU nothing is gained by keeping what will be computed again.
        self.course = ctx.device.as_cuda().map(|_| course);
        under_way
    }

    /// The batch into the buffers of the last step; false if they do not fit and there are new ones.
    fn take_in(&mut self, ctx: &Ctx, micro_batches: &[Vec<Sequence>]) -> bool {
        let fits = self.batches.len() == micro_batches.len();
        let same = fits && self.batches.iter_mut().zip(micro_batches).all(|(b, s)| b.refill(s));
        if !same {
            let depth = self.model.layout.mtp.len();
            // What was recorded names the buffers that go.
            self.course = None;
            self.batches = micro_batches.iter().map(|s| Batch::new(ctx, s, depth)).collect();
        }
        same
    }

    /// All of a step that the device does. On a CPU one of its workers goes through it: an operation then begins at once
    /// where it is called, and wakes the other workers alone.
    fn work(&mut self, ctx: &Ctx, weights: &LossWeights) -> Vec<LossTerms> {
        match &ctx.device {
            Device::Cpu(cpu) => cpu.install(|| self.operations(ctx, weights)),
            Device::Cuda(_) => self.operations(ctx, weights),
        }
    }

    fn operations(&mut self, ctx: &Ctx, weights: &LossWeights) -> Vec<LossTerms> {
        let terms = self.differentiate(ctx, weights);
        self.optimizer.apply(ctx, &mut self.params, &self.grads);
        if self.objective.bias_gamma > 0.0 {
            self.counts.update_biases(ctx, &mut self.params, self.objective.bias_gamma);
        }
        if let Some(a) = &mut self.average {
            add::blend(ctx, 1.0 - a.decay, self.params.master.view(), a.weights.view_mut());
        }
        terms
    }

    /// Gradients of the batch, its losses, and the experts' load.
    fn differentiate(&mut self, ctx: &Ctx, weights: &LossWeights) -> Vec<LossTerms> {
        self.grads.clear();
        self.counts.clear();
        let mut terms = Vec::new();
        let mut pass = |ctx: &Ctx, batch: &Batch, jobs: &mut WeightGrads<'_>| {
            let forward = pass::forward_to_train(ctx, &self.model, &self.params, batch, weights, jobs);
            terms.push(forward.losses.clone());
            self.counts.add(ctx, &forward.traces);
            pass::backward_into(ctx, &self.model, &self.params, forward, jobs);
        };
        let mut queue = WeightGrads::default();
        for (i, batch) in self.batches.iter().enumerate() {
            let ctx = Ctx { micro_batch: i as u32, ..ctx.clone() };
            match self.defer {
                true => pass(&ctx, batch, &mut queue),
                false => pass(&ctx, batch, &mut WeightGrads::at_once(&ctx, &self.params, &mut self.grads)),
            }
        }
        queue.run(ctx, &self.params, &mut self.grads);
        self.grads.fold(ctx);
        terms
    }
}

impl StepUnderWay {
    /// Whether reading it waits for nothing.
    pub fn is_ready(&self) -> bool {
        self.end.has_passed()
    }

    /// When the step was over, on its device's clock.
    pub fn into_end(self) -> Mark {
        self.end
    }

    /// What it measured; waits for its end.
    pub fn read(&self) -> StepReport {
        let losses = self.losses.iter().map(LossDownload::read).sum();
        StepReport { losses, grad_norm: self.norm.f32()[0], load: self.load.read() }
    }
}
