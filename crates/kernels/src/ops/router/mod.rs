//! DeepSeekMoE's gate, from logits (V3 report 2.1.2, V2 report 2.1.2). All in f32.
//!
//! score = sigmoid(logits) or softmax(logits); choice = score + bias (bias: selection only); a group's score is its
//! largest choice (V2) or the sum of its two largest (V3); the best `topk_group` groups stay; the `top_k` largest
//! choices within them are chosen, written in descending order of choice. Ties go to the lowest index, of groups as of
//! experts. weight = score at the chosen, divided by (their sum + 1e-20) if `norm_topk_prob`, times `scale`.
//! A given choice replaces selection only: weights and gradients come from the current scores.
//! A NaN choice loses to every number, so that even a broken token gets K distinct experts.

mod cpu;
mod cuda;
mod lanes;
#[cfg(test)]
mod reference;
mod select;
#[cfg(test)]
mod tests;

pub(crate) use select::{Rule, select};

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// V3.
    Sigmoid,
    /// V2.
    Softmax,
}

/// How a group of experts is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// V2: its best expert.
    Max,
    /// V3: the sum of its two best; needs at least two experts per group.
    TopTwo,
}

/// The gate's fixed parameters.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// Score function.
    pub scoring: Scoring,
    /// Groups the experts are cut into (1: no limit).
    pub n_group: usize,
    /// Groups a token may use.
    pub topk_group: usize,
    /// Judgement of a group.
    pub group_score: GroupScore,
    /// Divide the chosen scores by their sum.
    pub norm_topk_prob: bool,
    /// routed_scaling_factor.
    pub scale: f32,
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// f32 `[N, E]`.
    pub logits: View<'a>,
    /// f32 `[E]`: e_score_correction_bias; None for none.
    pub bias: Option<View<'a>>,
    /// i32 `[N, K]`: use this choice instead of selecting (kept in the given order).
    pub given: Option<View<'a>>,
    /// f32 `[N, E]`.
    pub scores: ViewMut<'a>,
    /// i32 `[N, K]`.
    pub indices: ViewMut<'a>,
    /// f32 `[N, K]`.
    pub weights: ViewMut<'a>,
}

/// Scores, choice and weights of each token.
pub fn forward(ctx: &Ctx, c: &Config, a: Forward<'_>) {
    let _timer = ctx
        .timer("router forward", sizes![c.experts, c.top_k, a.logits, a.bias, a.given, a.scores, a.indices, a.weights]);
    c.check();
    let n = c.tokens(a.logits.len());
    assert!(
        a.scores.len() == n * c.experts && a.indices.len() == n * c.top_k && a.weights.len() == n * c.top_k,
        "router: logits [{n}, {}], but scores {}, indices {}, weights {} for top {}",
        c.experts,
        a.scores.len(),
        a.indices.len(),
        a.weights.len(),
        c.top_k
    );
    assert!(
        a.bias.is_none_or(|b| b.len() == c.experts),
        "router: {:?} biases of {} experts",
        a.bias.map(|b| b.len()),
        c.experts
    );
    let given = a.given.map(|g| g.len());
    assert!(given.is_none_or(|g| g == n * c.top_k), "router: {given:?} given indices, expected {n} * {}", c.top_k);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, c, a),
        Device::Cpu(cpu) => cpu::forward(cpu, c, a),
    }
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// f32 `[N, E]`, the forward's.
    pub scores: View<'a>,
    /// i32 `[N, K]`, the forward's.
    pub indices: View<'a>,
    /// f32 `[N, K]`.
    pub d_weights: View<'a>,
    /// f32 `[N, E]`: gradient of the scores from elsewhere (the balance loss).
    pub d_scores: Option<View<'a>>,
    /// f32 `[N, E]`, overwritten.
    pub d_logits: ViewMut<'a>,
}

/// Gradient of the logits. The choice itself has none.
pub fn backward(ctx: &Ctx, c: &Config, a: Backward<'_>) {
    let _timer = ctx
        .timer("router backward", sizes![c.experts, c.top_k, a.scores, a.indices, a.d_weights, a.d_scores, a.d_logits]);
    c.check();
    let n = c.tokens(a.scores.len());
    assert!(
        a.indices.len() == n * c.top_k
            && a.d_weights.len() == n * c.top_k
            && a.d_scores.is_none_or(|d| d.len() == n * c.experts)
            && a.d_logits.len() == n * c.experts,
        "router: scores [{n}, {}], but indices {}, d_weights {}, d_scores {:?}, d_logits {} for top {}",
        c.experts,
        a.indices.len(),
        a.d_weights.len(),
        a.d_scores.map(|d| d.len()),
        a.d_logits.len(),
        c.top_k
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward(cuda, c, a),
        Device::Cpu(cpu) => cpu::backward(cpu, c, a),
    }
}

impl Config {
    fn check(&self) {
        assert!(
            self.n_group > 0 && self.experts.is_multiple_of(self.n_group) && self.topk_group <= self.n_group,
            "router: {self:?}: groups do not fit"
        );
        let per_group = self.experts / self.n_group;
        assert!(
            self.top_k > 0 && self.top_k <= self.topk_group * per_group,
            "router: {self:?}: too few experts for the choice"
        );
        assert!(
            self.n_group == 1 || self.group_score == GroupScore::Max || per_group >= 2,
            "router: {self:?}: the two best of one expert"
        );
    }

    fn tokens(&self, scores: usize) -> usize {
        assert!(scores.is_multiple_of(self.experts), "router: {scores} scores are not rows of {}", self.experts);
        scores / self.experts
    }
}
