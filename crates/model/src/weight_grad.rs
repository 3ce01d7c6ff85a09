//! Weight gradients as work that can wait. A backward pass for the input leaves jobs that own what they need; running
//! them later, in the same order, gives the same bits (V3 report 3.2.1: backward split into input and weight parts).

use crate::{Grads, ParamId, Params};
use hadal_kernels::ops::gemm::{self, MatMut};
use hadal_kernels::ops::gemm_grouped::{self, Rows};
use hadal_kernels::ops::rmsnorm::{self, InputGradient, WeightGradient};
use hadal_kernels::ops::{embedding, head_loss};
use hadal_kernels::{Buf, Ctx, DType, ViewMut};
use std::sync::Arc;

/// An activation that both a pass and queued jobs may hold.
pub type Shared = Arc<Buf>;

enum Job {
    /// `dW[.., first ..]` += dy^T x, into `cols` columns of a wider matrix.
    Linear { id: ParamId, first: usize, cols: usize, x: Shared, dy: Shared },
    /// dw += sum dy * x * rstd.
    Norm(NormJob),
    /// dW_e += dy_e^T x_e.
    Grouped { id: ParamId, offsets: Shared, x: ExpertRows, dy: ExpertRows },
    /// Rows of the table, use `n`.
    Embedding { id: ParamId, n: usize, tokens: Shared, dy: Shared },
    /// The output head, use `n`.
    Head(HeadJob),
}

/// Rows of experts `[cap, D]`, sorted by expert, that both a pass and queued jobs may hold.
#[derive(Clone, Debug)]
pub enum ExpertRows {
    /// As they are.
    Sorted(Shared),
    /// Those of tokens, read where they lie by the products ([`gemm_grouped::gathers`]).
    Tokens {
        /// `[n, D]`.
        x: Shared,
        /// i32 `[n K]`.
        slot_of_row: Shared,
        /// K.
        top_k: usize,
    },
}

impl ExpertRows {
    /// As products take them.
    pub(crate) fn view(&self) -> Rows<'_> {
        match self {
            Self::Sorted(rows) => rows.view().into(),
            Self::Tokens { x, slot_of_row, top_k } => {
                Rows::Tokens { x: x.view(), slot_of_row: slot_of_row.view(), top_k: *top_k }
            }
        }
    }

    /// Their type, and how many elements all rows have.
    pub(crate) fn shape(&self) -> (DType, usize) {
        match self {
            Self::Sorted(rows) => (rows.dtype(), rows.len()),
            Self::Tokens { x, top_k, .. } => (x.dtype(), x.len() * top_k),
        }
    }

    fn held(&self) -> impl Iterator<Item = &Shared> {
        let (first, second) = match self {
            Self::Sorted(rows) => (rows, None),
            Self::Tokens { x, slot_of_row, .. } => (x, Some(slot_of_row)),
        };
        std::iter::once(first).chain(second)
    }
}

/// What the gradient of a norm's weight needs.
pub(crate) struct NormJob {
    pub id: ParamId,
    pub x: Shared,
    pub x_stride: usize,
    pub rstd: Shared,
    pub dy: Shared,
}

/// What the output head's weight gradient needs.
pub(crate) struct HeadJob {
    pub id: ParamId,
    /// Which use of the shared head: 0 main, k the MTP layer of depth k.
    pub n: usize,
    pub hidden: Shared,
    pub targets: Shared,
    pub temperature: f32,
    pub given: Option<Shared>,
    pub lse: Shared,
    pub entropy: Shared,
    pub d_logp: Shared,
    pub d_entropy: Option<Shared>,
    pub d_given: Option<Shared>,
}

/// Weight gradients in the order they must run: queued, or run as they come, which is the same order.
#[derive(Default)]
pub struct WeightGrads<'a> {
    jobs: Vec<Job>,
    now: Option<Now<'a>>,
}

/// Where jobs run that do not wait.
struct Now<'a> {
    ctx: &'a Ctx,
    params: &'a Params,
    grads: &'a mut Grads,
}

impl<'a> WeightGrads<'a> {
    /// Jobs that run at once, so that what they need can go before backward goes on: the bits of a queue run later, with
    /// the memory of one job. The weights must be those of the forward pass.
    pub fn at_once(ctx: &'a Ctx, params: &'a Params, grads: &'a mut Grads) -> Self {
        Self { jobs: Vec::new(), now: Some(Now { ctx, params, grads }) }
    }

    fn add(&mut self, job: Job) {
        match &mut self.now {
            Some(now) => job.run(now.ctx, now.params, now.grads),
            None => self.jobs.push(job),
        }
    }

    pub(crate) fn linear(&mut self, id: ParamId, cols: usize, x: &Shared, dy: &Shared) {
        self.columns(id, 0, cols, x, dy);
    }

    pub(crate) fn columns(&mut self, id: ParamId, first: usize, cols: usize, x: &Shared, dy: &Shared) {
        self.add(Job::Linear { id, first, cols, x: x.clone(), dy: dy.clone() });
    }

    /// A norm's gradient of its input, and of its weight: at once both come from one reading of its rows.
    pub(crate) fn norm(&mut self, ctx: &Ctx, params: &Params, job: NormJob, input: InputGradient<'_>) {
        let dw = self.now.as_mut().map(|now| now.grads.first_of(job.id));
        let queued = dw.is_none();
        job.backward(ctx, params, Some(input), dw);
        if queued {
            self.jobs.push(Job::Norm(job));
        }
    }

    pub(crate) fn grouped(&mut self, id: ParamId, offsets: &Shared, x: ExpertRows, dy: ExpertRows) {
        self.add(Job::Grouped { id, offsets: offsets.clone(), x, dy });
    }

    pub(crate) fn embedding(&mut self, id: ParamId, n: usize, tokens: &Shared, dy: &Shared) {
        self.add(Job::Embedding { id, n, tokens: tokens.clone(), dy: dy.clone() });
    }

    /// The head's gradient of its input, and its own: at once both come from the same gradients of logits.
    pub(crate) fn head(&mut self, ctx: &Ctx, params: &Params, job: HeadJob, d_hidden: ViewMut<'_>) {
        let d_weight = self.now.as_mut().map(|now| now.grads.first_of_use(job.id, job.n));
        let queued = d_weight.is_none();
        job.backward(ctx, params, Some(d_hidden), d_weight);
        if queued {
            self.jobs.push(Job::Head(job));
        }
    }

    /// Where the head's own gradient goes, and whether it is added to what is there, if jobs do not wait.
    pub(crate) fn head_at_once(&mut self, id: ParamId, n: usize) -> Option<(ViewMut<'_>, bool)> {
        self.now.as_mut().map(|now| now.grads.first_of_use(id, n))
    }

    /// Whether jobs do not wait.
    pub(crate) fn runs_at_once(&self) -> bool {
        self.now.is_some()
    }

    /// Appends later jobs.
    pub fn append(&mut self, later: WeightGrads<'_>) {
        later.jobs.into_iter().for_each(|job| self.add(job));
    }

    /// Number of jobs waiting.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Bytes of activations that the queue keeps alive (each counted once).
    pub fn bytes(&self) -> usize {
        let mut seen = std::collections::HashMap::new();
        for job in &self.jobs {
            for b in job.held() {
                seen.insert(Arc::as_ptr(b), b.bytes());
            }
        }
        seen.values().sum()
    }

    /// Runs all jobs in order, accumulating into `grads`. The weights must be those of the forward pass.
    pub fn run(self, ctx: &Ctx, params: &Params, grads: &mut Grads) {
        for job in self.jobs {
            job.run(ctx, params, grads);
        }
    }
}

impl Job {
    fn held(&self) -> Vec<&Shared> {
        match self {
            Job::Linear { x, dy, .. } => vec![x, dy],
            Job::Norm(n) => vec![&n.x, &n.rstd, &n.dy],
            Job::Grouped { offsets, x, dy, .. } => std::iter::once(offsets).chain(x.held()).chain(dy.held()).collect(),
            Job::Embedding { tokens, dy, .. } => vec![tokens, dy],
            Job::Head(h) => {
                let optional = [&h.given, &h.d_entropy, &h.d_given].into_iter().flatten();
                [&h.hidden, &h.targets, &h.lse, &h.entropy, &h.d_logp].into_iter().chain(optional).collect()
            }
        }
    }

    fn run(self, ctx: &Ctx, params: &Params, grads: &mut Grads) {
        match self {
            Job::Linear { id, first, cols, x, dy } => {
                let t = params.layout.info(id);
                let (rows, ld, end) = (t.rows, t.cols, t.len());
                // Columns of a wider matrix are not all of it: what is beside them would keep its zeros to itself.
                let (dw, accumulate) = if cols == t.cols { grads.first_of(id) } else { (grads.of(id), true) };
                let dw = MatMut { data: dw.slice(first..end), ld };
                gemm::linear_backward_weight(ctx, x.view(), dy.view(), rows, cols, dw, accumulate);
            }
            Job::Norm(n) => {
                let dw = Some(grads.first_of(n.id));
                n.backward(ctx, params, None, dw);
            }
            Job::Grouped { id, offsets, x, dy } => {
                let t = params.layout.info(id);
                let (rows, cols) = (t.rows, t.cols);
                let (dw, accumulate) = grads.first_of(id);
                let (x, dy, offsets) = (x.view(), dy.view(), offsets.view());
                gemm_grouped::grouped_backward_weight(ctx, x, dy, offsets, rows, cols, dw, accumulate);
            }
            Job::Embedding { id, n, tokens, dy } => {
                let (dtable, accumulate) = grads.first_of_use(id, n);
                embedding::backward(ctx, tokens.view(), dy.view(), dtable, accumulate);
            }
            Job::Head(h) => {
                let d_weight = Some(grads.first_of_use(h.id, h.n));
                h.backward(ctx, params, None, d_weight);
            }
        }
    }
}

impl NormJob {
    /// One or both gradients of the norm; the weight's with whether it is added.
    fn backward(&self, ctx: &Ctx, params: &Params, input: Option<InputGradient<'_>>, dw: Option<(ViewMut<'_>, bool)>) {
        let b = rmsnorm::Backward {
            dy: self.dy.view(),
            x: self.x.view(),
            x_stride: self.x_stride,
            weight: params.f32(self.id),
            rstd: self.rstd.view(),
            input,
            weight_gradient: dw.map(|(dw, accumulate)| WeightGradient { dw, accumulate }),
        };
        rmsnorm::backward(ctx, b);
    }
}

impl HeadJob {
    /// One or both gradients of the head; the weight's with whether it is added.
    pub(crate) fn backward(
        &self,
        ctx: &Ctx,
        params: &Params,
        d_hidden: Option<ViewMut<'_>>,
        d_weight: Option<(ViewMut<'_>, bool)>,
    ) {
        let inputs = head_loss::Inputs {
            hidden: self.hidden.view(),
            weight: params.weight(self.id),
            targets: self.targets.view(),
            temperature: self.temperature,
            given: self.given.as_ref().map(|b| b.view()),
        };
        let gradients = head_loss::Gradients {
            d_logp: self.d_logp.view(),
            d_entropy: self.d_entropy.as_ref().map(|b| b.view()),
            d_given: self.d_given.as_ref().map(|b| b.view()),
            d_hidden,
            d_weight,
        };
        let (lse, entropy) = (self.lse.view(), self.entropy.view());
        head_loss::backward(ctx, inputs, head_loss::Backward { lse, entropy, gradients });
    }
}
