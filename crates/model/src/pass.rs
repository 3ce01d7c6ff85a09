//! One micro-batch through the whole training objective: cross-entropy, MTP, balance (V3 report, eq. 17, 24, 25).
//! Every loss is a weighted sum whose weights the caller has normalised over the global batch.

use crate::heads::{self, HeadGradient, HeadOutput, Request};
use crate::stages::Norm;
use crate::trunk::{self, Input, LayerTrace, Options, Routing};
use crate::weight_grad::{Shared, WeightGrads};
use crate::{Batch, Depth, Model, MtpHidden, Params, mtp};
use hadal_kernels::ops::head_loss;
use hadal_kernels::{Buf, Ctx, DType, Download};
use std::sync::Arc;

/// Weight of each part of the loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossWeights {
    /// Of each predicted token: 1 / (predicted tokens of the global batch).
    pub token: f32,
    /// Of each token predicted by an MTP layer: lambda / depth * `token`.
    pub mtp: f32,
    /// Of each sequence's balance loss in each MoE layer, by depth: alpha / (sequences of the global batch at that
    /// depth). Empty leaves the loss out.
    pub balance: Vec<f32>,
}

/// Weighted sums over the micro-batch; the loss is their sum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// Cross-entropy.
    pub main: f64,
    /// MTP.
    pub mtp: f64,
    /// Sequence-wise balance.
    pub balance: f64,
}

impl Losses {
    /// What is minimised.
    pub fn total(&self) -> f64 {
        self.main + self.mtp + self.balance
    }

    /// Each term summed in f64, in order; a log-probability is 0 where there is no target.
    fn of(terms: impl Iterator<Item = (Part, Vec<f32>, f32)>) -> Self {
        let mut losses = Self::default();
        for (part, x, weight) in terms {
            let sum = f64::from(weight) * x.iter().map(|&x| f64::from(x)).sum::<f64>();
            match part {
                Part::Main => losses.main -= sum,
                Part::Mtp => losses.mtp -= sum,
                Part::Balance => losses.balance += sum,
            }
        }
        losses
    }
}

impl std::iter::Sum for Losses {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let add = |a: Self, b: Self| Self { main: a.main + b.main, mtp: a.mtp + b.mtp, balance: a.balance + b.balance };
        all.fold(Self::default(), add)
    }
}

/// What a loss is the weighted sum of, on the device: summing it waits for the pass, so that who runs steps decides when.
#[derive(Clone, Debug, Default)]
pub struct LossTerms {
    terms: Vec<(Part, Shared, f32)>,
}

/// Which part of the loss a term belongs to.
#[derive(Clone, Copy, Debug)]
enum Part {
    Main,
    Mtp,
    Balance,
}

/// Terms on their way to the host.
pub struct LossDownload {
    terms: Vec<(Part, Download, f32)>,
}

impl LossTerms {
    /// Adds what each MoE layer's balance loss is, weighted.
    fn balance(&mut self, traces: &[LayerTrace], weight: Option<f32>) {
        let terms = traces.iter().filter_map(|t| Some((Part::Balance, t.balance.clone()?, weight?)));
        self.terms.extend(terms);
    }

    /// The sums; waits for a GPU.
    pub fn read(&self) -> Losses {
        Losses::of(self.terms.iter().map(|(part, x, weight)| (*part, x.view().to_f32(), *weight)))
    }

    /// Asks for the terms as they are once the pass is done.
    pub fn download(&self, ctx: &Ctx) -> LossDownload {
        LossDownload { terms: self.terms.iter().map(|(part, x, w)| (*part, ctx.download(x.view()), *w)).collect() }
    }
}

impl LossDownload {
    /// The sums; waits until the terms are there.
    pub fn read(&self) -> Losses {
        Losses::of(self.terms.iter().map(|(part, x, weight)| (*part, x.f32(), *weight)))
    }
}

/// A finished forward pass, ready for backward.
pub struct Forward {
    trunk: trunk::Saved,
    norm: Norm,
    head: Head,
    mtp: Vec<(mtp::Saved, Head)>,
    /// Parts of the loss, to be summed.
    pub losses: LossTerms,
    /// Routing of every MoE layer, MTP layers last.
    pub traces: Vec<LayerTrace>,
}

impl Forward {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        let main = self.trunk.bytes() + self.norm.bytes_with_input() + self.head.bytes();
        main + self.mtp.iter().map(|(saved, head)| saved.bytes() + head.bytes()).sum::<usize>()
    }
}

/// A head that has run on a depth.
enum Head {
    /// Its output and d_logp.
    Forward(HeadOutput, Shared),
    /// Both directions: the log-probabilities, and the gradient of the normed states.
    Both(Shared, Buf),
}

impl Head {
    fn bytes(&self) -> usize {
        match self {
            Self::Forward(out, d) => out.bytes() + d.bytes(),
            Self::Both(logp, d_normed) => logp.bytes() + d_normed.bytes(),
        }
    }

    fn logp(&self) -> &Shared {
        match self {
            Self::Forward(HeadOutput { logp, .. }, _) | Self::Both(logp, _) => logp,
        }
    }

    /// Gradient of the normed states, which come from `norm`.
    fn backward(self, ctx: &Ctx, model: &Model, params: &Params, norm: &Norm, jobs: &mut WeightGrads<'_>) -> Buf {
        match self {
            Self::Forward(mut out, d_logp) => {
                out.restore(|| norm.again(ctx, params));
                let gradient = HeadGradient { d_logp, d_entropy: None, d_given: None };
                heads::backward(ctx, model, params, out, gradient, jobs)
            }
            Self::Both(_, d_normed) => d_normed,
        }
    }
}

/// Runs a head on a depth.
fn predict(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    (k, depth): (usize, &Depth),
    hidden: &Shared,
    weight: f32,
    jobs: Option<&mut WeightGrads<'_>>,
) -> Head {
    let mut d = ctx.empty(DType::F32, depth.n);
    head_loss::target_weights(ctx, depth.targets.view(), -weight, d.view_mut());
    if let Some(jobs) = jobs.filter(|jobs| jobs.runs_at_once()) {
        let (logp, d_normed) = heads::at_once(ctx, model, params, (hidden, &depth.targets), k, &d, jobs);
        return Head::Both(logp, d_normed);
    }
    let request = Request { targets: depth.targets.clone(), temperature: 1.0, given: None, top_k: 0 };
    let mut out = heads::forward(ctx, model, params, hidden, request, k);
    if !model.recompute.keeps_norms() {
        out.forget();
    }
    Head::Forward(out, Arc::new(d))
}

/// f32 `[S]`: the balance weight of every sequence of a depth.
fn balance_weights(ctx: &Ctx, depth: &Depth, weights: &LossWeights, k: usize) -> Option<Buf> {
    weights.balance.get(k).map(|&w| ctx.filled(depth.cu.len() - 1, w))
}

/// Forward of a whole model over one micro-batch.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batch: &Batch,
    weights: &LossWeights,
    routing: Option<&Routing>,
) -> Forward {
    whole(ctx, model, params, batch, weights, routing, None)
}

/// As [`forward`], for a backward pass with the same `jobs`. If these run at once, so do the heads' gradients: on the host's cores
/// each head's logits then serve both directions. The bits are the same.
pub fn forward_to_train(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batch: &Batch,
    weights: &LossWeights,
    jobs: &mut WeightGrads<'_>,
) -> Forward {
    whole(ctx, model, params, batch, weights, None, Some(jobs))
}

fn whole(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batch: &Batch,
    weights: &LossWeights,
    routing: Option<&Routing>,
    jobs: Option<&mut WeightGrads<'_>>,
) -> Forward {
    let depth = &batch.depths[0];
    let balance = balance_weights(ctx, depth, weights, 0);
    let options = Options { routing, balance: balance.as_ref() };
    let (h, trunk, traces) = trunk::forward(ctx, model, params, depth, Input::Tokens, options);
    after_trunk(ctx, model, params, batch, weights, routing, (h, trunk, traces), jobs)
}

/// Final norm, head and MTP over a trunk's output: what the last pipeline stage does.
pub fn tail(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batch: &Batch,
    weights: &LossWeights,
    routing: Option<&Routing>,
    h: Shared,
    trunk: trunk::Saved,
    traces: Vec<LayerTrace>,
) -> Forward {
    after_trunk(ctx, model, params, batch, weights, routing, (h, trunk, traces), None)
}

fn after_trunk(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batch: &Batch,
    weights: &LossWeights,
    routing: Option<&Routing>,
    (h, trunk, mut traces): (Shared, trunk::Saved, Vec<LayerTrace>),
    mut jobs: Option<&mut WeightGrads<'_>>,
) -> Forward {
    let (normed, norm) = heads::final_norm(ctx, model, params, &h);
    let head = predict(ctx, model, params, (0, &batch.depths[0]), &normed, weights.token, jobs.as_deref_mut());
    let mut losses = LossTerms { terms: vec![(Part::Main, head.logp().clone(), weights.token)] };
    losses.balance(&traces, weights.balance.first().copied());
    let mut feed = match model.config.mtp_hidden {
        MtpHidden::PostNorm => normed,
        MtpHidden::PreNorm => h,
    };
    let mut saved = Vec::new();
    for k in 1..=model.layout.mtp.len() {
        let depth = &batch.depths[k];
        let balance = balance_weights(ctx, depth, weights, k);
        let options = Options { routing, balance: balance.as_ref() };
        let o = mtp::forward(ctx, model, params, k, depth, &feed, options);
        let head = predict(ctx, model, params, (k, depth), &o.normed, weights.mtp, jobs.as_deref_mut());
        losses.terms.push((Part::Mtp, head.logp().clone(), weights.mtp));
        losses.balance(o.trace.as_slice(), weights.balance.get(k).copied());
        traces.extend(o.trace);
        saved.push((o.saved, head));
        feed = o.feed;
    }
    Forward { trunk, norm, head, mtp: saved, losses, traces }
}

/// Backward of a whole model: all weight gradients as jobs, in the order they must run.
pub fn backward(ctx: &Ctx, model: &Model, params: &Params, forward: Forward) -> WeightGrads<'static> {
    backward_input(ctx, model, params, forward).1
}

/// As [`backward`], with the gradient of the trunk's input `[n, D]` for an earlier stage.
pub fn backward_input(ctx: &Ctx, model: &Model, params: &Params, f: Forward) -> (Shared, WeightGrads<'static>) {
    let mut jobs = WeightGrads::default();
    (backward_into(ctx, model, params, f, &mut jobs), jobs)
}

/// As [`backward`] with jobs that the caller provides, which may run at once; returns the gradient of the trunk's input
/// `[n, D]`.
pub fn backward_into(ctx: &Ctx, model: &Model, params: &Params, f: Forward, jobs: &mut WeightGrads<'_>) -> Shared {
    // What watches the routing has seen it.
    drop(f.traces);
    let mut d_feed = None;
    for (i, (saved, head)) in f.mtp.into_iter().enumerate().rev() {
        let d_normed = head.backward(ctx, model, params, &saved.norm, jobs);
        d_feed = Some(mtp::backward(ctx, model, params, i + 1, saved, d_normed, d_feed, jobs));
    }
    let d_normed = f.head.backward(ctx, model, params, &f.norm, jobs);
    let dh = mtp::norm_backward(ctx, model, params, f.norm, d_normed, d_feed, jobs);
    trunk::backward(ctx, model, params, f.trunk, dh, jobs)
}
