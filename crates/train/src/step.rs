//! One optimiser step: micro-batches forward and backward, gradients in micro-batch order, clip and AdamW, bias update.

use crate::optimizer::{AdamW, Load, Optimizer};
use hadal_comm::ExpertRange;
use hadal_kernels::ops::add;
use hadal_kernels::{Buf, Ctx};
use hadal_model::pass::{self, LossWeights, Losses};
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
        Self { model, params, defer: false, grads, optimizer, objective, average: None }
    }

    /// Keeps an exponential moving average of the weights from here on (V3 report 3.2.3): after every step
    /// average = decay * average + (1 - decay) * weights. It begins at `weights`, or at the present ones.
    pub fn keep_average(&mut self, decay: f32, weights: Option<Buf>) {
        let weights = weights.unwrap_or_else(|| self.params.master.clone());
        assert_eq!(weights.len(), self.params.master.len(), "an average of another layout");
        self.average = Some(Average { decay, weights });
    }

    /// The average of the weights, if one is kept: an f32 arena of the layout.
    pub fn average(&self) -> Option<&Buf> {
        self.average.as_ref().map(|a| &a.weights)
    }

    /// The state of AdamW.
    pub(crate) fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// Takes up the state of AdamW after some updates.
    pub(crate) fn set_optimizer(&mut self, optimizer: Optimizer) {
        self.optimizer = optimizer;
    }

    /// The gradients of the last step, before clipping.
    pub fn grads(&mut self) -> &mut Grads {
        &mut self.grads
    }

    /// Loss weights of a global batch: every predicted token and every sequence counts alike (eq. 24 divides every
    /// depth by the main model's T).
    fn weights(&self, batches: &[Batch]) -> LossWeights {
        let depth = self.model.layout.mtp.len();
        let sum =
            |f: fn(&hadal_model::Depth) -> usize, k: usize| batches.iter().map(|b| f(&b.depths[k])).sum::<usize>();
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
        self.grads.clear();
        let depth = self.model.layout.mtp.len();
        let batches: Vec<Batch> = micro_batches.iter().map(|s| Batch::new(ctx, s, depth)).collect();
        let weights = self.weights(&batches);
        let (mut losses, mut load) = (Losses::default(), Load::default());
        let mut queue = WeightGrads::default();
        for (i, batch) in batches.iter().enumerate() {
            let ctx = Ctx { micro_batch: i as u32, ..ctx.clone() };
            let forward = pass::forward(&ctx, &self.model, &self.params, batch, &weights, None);
            losses.main += forward.losses.main;
            losses.mtp += forward.losses.mtp;
            losses.balance += forward.losses.balance;
            load.add(&forward.traces);
            if self.defer {
                pass::backward_into(&ctx, &self.model, &self.params, forward, &mut queue);
            } else {
                let mut jobs = WeightGrads::at_once(&ctx, &self.params, &mut self.grads);
                pass::backward_into(&ctx, &self.model, &self.params, forward, &mut jobs);
            }
        }
        queue.run(ctx, &self.params, &mut self.grads);
        self.grads.fold(ctx);
        load.reduce(&self.model);
        (losses, load)
    }

    /// One whole step at learning rate `lr`.
    pub fn step(&mut self, ctx: &Ctx, micro_batches: &[Vec<Sequence>], lr: f64) -> StepReport {
        let (losses, load) = self.gradients(ctx, micro_batches);
        let grad_norm = self.optimizer.update(ctx, &mut self.params, &self.grads, lr);
        if self.objective.bias_gamma > 0.0 {
            load.update_biases(&mut self.params, self.objective.bias_gamma);
        }
        if let Some(a) = &mut self.average {
            add::blend(ctx, 1.0 - a.decay, self.params.master.view(), a.weights.view_mut());
        }
        StepReport { losses, grad_norm, load }
    }
}
