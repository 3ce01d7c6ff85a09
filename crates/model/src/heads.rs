//! What reads the trunk: the final norm and the language-model head. Trunk and heads are separate objects, so that
//! other heads (MTP, scalar) attach the same way.

use crate::stages::Norm;
use crate::weight_grad::{HeadJob, Shared, WeightGrads};
use crate::{Model, ParamId, Params};
use hadal_kernels::ops::{gemm, head_loss};
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// Final norm `[n, D]` to `[n, D]`.
pub fn final_norm(ctx: &Ctx, model: &Model, params: &Params, h: &Shared) -> (Shared, Norm) {
    let Some(id) = model.layout.norm else { panic!("this part of the model has no head") };
    norm(ctx, model, params, id, h)
}

/// A norm of the residual stream.
pub(crate) fn norm(ctx: &Ctx, model: &Model, params: &Params, id: ParamId, h: &Shared) -> (Shared, Norm) {
    let d = model.config.hidden_size;
    Norm::forward(ctx, params, id, (h, d), h.len() / d, model.config.rms_norm_eps as f32)
}

/// What a loss wants to know of each position.
pub struct Request {
    /// i32 `[n]`, -1 for none.
    pub targets: Shared,
    /// Logits are divided by this.
    pub temperature: f32,
    /// i32 `[n, G]`: ids whose log-probabilities are wanted.
    pub given: Option<Shared>,
    /// K: how many of the most likely ids are wanted; 0 for none.
    pub top_k: usize,
}

/// Each position's answer, and what backward needs.
pub struct HeadOutput {
    /// None while it is left to be computed again.
    hidden: Option<Shared>,
    request: Request,
    /// Which use of the head: 0 main, k the MTP layer of depth k.
    n: usize,
    lse: Shared,
    /// f32 `[n]`: log-probability of the target.
    pub logp: Shared,
    /// f32 `[n]`, nats.
    pub entropy: Shared,
    /// f32 `[n, G]`.
    pub given_logp: Option<Buf>,
    /// (i32 `[n, K]`, f32 `[n, K]`): the most likely ids and their log-probabilities, descending, ties to the lowest
    /// id.
    pub top: Option<(Buf, Buf)>,
}

impl HeadOutput {
    /// Bytes kept until backward; targets and given ids are the caller's.
    pub fn bytes(&self) -> usize {
        let given = self.given_logp.as_ref().map_or(0, Buf::bytes);
        let top = self.top.as_ref().map_or(0, |(ids, logp)| ids.bytes() + logp.bytes());
        self.hidden.as_ref().map_or(0, |h| h.bytes())
            + self.lse.bytes()
            + self.logp.bytes()
            + self.entropy.bytes()
            + given
            + top
    }

    /// Drops the normed states, which whoever calls has to give back before backward.
    pub(crate) fn forget(&mut self) {
        self.hidden = None;
    }

    /// The normed states again, unless they are here.
    pub(crate) fn restore(&mut self, hidden: impl FnOnce() -> Shared) {
        self.hidden.get_or_insert_with(hidden);
    }
}

/// Gradients of a loss.
pub struct HeadGradient {
    /// f32 `[n]`.
    pub d_logp: Shared,
    /// f32 `[n]`.
    pub d_entropy: Option<Shared>,
    /// f32 `[n, G]`.
    pub d_given: Option<Shared>,
}

/// The head over normed states `[n, D]`; `n` names the use of the shared head.
pub fn forward(ctx: &Ctx, model: &Model, params: &Params, hidden: &Shared, request: Request, n: usize) -> HeadOutput {
    let tokens = request.targets.len();
    let mut lse = ctx.empty(DType::F32, tokens);
    let (mut logp, mut entropy) = (ctx.empty(DType::F32, tokens), ctx.empty(DType::F32, tokens));
    let mut given_logp = request.given.as_ref().map(|g| ctx.zeros(DType::F32, g.len()));
    let k = request.top_k;
    let mut top = (k > 0).then(|| (ctx.zeros(DType::I32, tokens * k), ctx.zeros(DType::F32, tokens * k)));
    let inputs = head_loss::Inputs {
        hidden: hidden.view(),
        weight: params.weight(head_id(model)),
        targets: request.targets.view(),
        temperature: request.temperature,
        given: request.given.as_ref().map(|g| g.view()),
    };
    let outputs = head_loss::Outputs {
        lse: lse.view_mut(),
        logp: logp.view_mut(),
        entropy: entropy.view_mut(),
        given_logp: given_logp.as_mut().map(Buf::view_mut),
        top: top.as_mut().map(|(ids, logp)| (ids.view_mut(), logp.view_mut())),
    };
    head_loss::forward(ctx, inputs, outputs);
    let (lse, logp, entropy) = (Arc::new(lse), Arc::new(logp), Arc::new(entropy));
    HeadOutput { hidden: Some(hidden.clone()), request, n, lse, logp, entropy, given_logp, top }
}

/// [`forward`] and [`backward`] of cross-entropy, if the head's own gradient is taken at once: the log-probabilities of
/// `targets` (i32 `[n]`) and the gradient of the normed states, by that of each (f32 `[n]`). The bits are the same.
pub(crate) fn at_once(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    (hidden, targets): (&Shared, &Shared),
    n: usize,
    d_logp: &Buf,
    jobs: &mut WeightGrads<'_>,
) -> (Shared, Buf) {
    let id = head_id(model);
    let [mut lse, mut logp, mut entropy] = [0; 3].map(|_| ctx.empty(DType::F32, targets.len()));
    let mut d_hidden = ctx.empty(hidden.dtype(), hidden.len());
    let inputs = head_loss::Inputs {
        hidden: hidden.view(),
        weight: params.weight(id),
        targets: targets.view(),
        temperature: 1.0,
        given: None,
    };
    let outputs = head_loss::Outputs {
        lse: lse.view_mut(),
        logp: logp.view_mut(),
        entropy: entropy.view_mut(),
        given_logp: None,
        top: None,
    };
    let gradients = head_loss::Gradients {
        d_logp: d_logp.view(),
        d_entropy: None,
        d_given: None,
        d_hidden: Some(d_hidden.view_mut()),
        d_weight: jobs.head_at_once(id, n),
    };
    head_loss::forward_backward(ctx, inputs, outputs, gradients);
    (Arc::new(logp), d_hidden)
}

fn head_id(model: &Model) -> ParamId {
    model.layout.head.unwrap_or_else(|| panic!("this part of the model has no head"))
}

/// Gradient of the normed states `[n, D]`; the head's own goes to `jobs`.
pub fn backward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    output: HeadOutput,
    g: HeadGradient,
    jobs: &mut WeightGrads<'_>,
) -> Buf {
    let hidden = output.hidden.unwrap_or_else(|| panic!("a head whose states were dropped and not restored"));
    let job = HeadJob {
        id: head_id(model),
        n: output.n,
        targets: output.request.targets,
        temperature: output.request.temperature,
        given: output.request.given,
        lse: output.lse,
        entropy: output.entropy,
        d_logp: g.d_logp,
        d_entropy: g.d_entropy,
        d_given: g.d_given,
        hidden,
    };
    let mut d_hidden = ctx.empty(job.hidden.dtype(), job.hidden.len());
    jobs.head(ctx, params, job, d_hidden.view_mut());
    d_hidden
}

/// Logits f32 `[n, V]` of normed states `[n, D]`: for inference and for files; training never forms them.
pub fn logits(ctx: &Ctx, model: &Model, params: &Params, hidden: &Buf) -> Buf {
    let w = params.weight(head_id(model));
    let mut z = ctx.empty(DType::F32, hidden.len() / w.cols * w.rows);
    gemm::linear(ctx, hidden.view(), &w, z.view_mut());
    z
}
