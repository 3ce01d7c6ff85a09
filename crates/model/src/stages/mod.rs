//! A block is four stages: attention | dispatch | MLP | combine (V3 report 3.2.1, figure 4). Each has a forward, a
//! backward for its input that leaves the weight gradients as jobs, and an explicit struct of what it saves. Stages
//! hold no state, so that the stages of one micro-batch can run between those of another. What is not saved but computed
//! again is the model's [`crate::Recompute`]; memory that backward needs no longer is dropped before more is taken.

pub mod attention;
pub mod combine;
pub mod dispatch;
pub mod mlp;

use crate::weight_grad::{NormJob, Shared, WeightGrads};
use crate::{ParamId, Params};
use hadal_kernels::ops::rmsnorm::{self, InputGradient};
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// A norm's saved input and statistics.
#[derive(Debug)]
pub struct Norm {
    id: ParamId,
    x: Shared,
    x_stride: usize,
    rstd: Shared,
    eps: f32,
}

impl Norm {
    /// RMSNorm of the first `dim` columns of x `[n, x_stride]`.
    pub fn forward(
        ctx: &Ctx,
        params: &Params,
        id: ParamId,
        (x, x_stride): (&Shared, usize),
        n: usize,
        eps: f32,
    ) -> (Shared, Self) {
        let mut rstd = ctx.empty(DType::F32, n);
        let y = normalise(ctx, params, id, (x, x_stride), eps, &mut rstd);
        (Arc::new(y), Self { id, x: x.clone(), x_stride, rstd: Arc::new(rstd), eps })
    }

    /// What `forward` returned, computed again.
    pub(crate) fn again(&self, ctx: &Ctx, params: &Params) -> Shared {
        let mut rstd = ctx.empty(DType::F32, self.rstd.len());
        Arc::new(normalise(ctx, params, self.id, (&self.x, self.x_stride), self.eps, &mut rstd))
    }

    /// The input.
    pub(crate) fn x(&self) -> &Shared {
        &self.x
    }

    /// dx (rows `x_stride` apart) (+)= gradient of the input; the weight's goes to `jobs`.
    pub fn backward(
        &self,
        ctx: &Ctx,
        params: &Params,
        dy: &Shared,
        dx: &mut Buf,
        accumulate: bool,
        jobs: &mut WeightGrads<'_>,
    ) {
        let (x, rstd, dy) = (self.x.clone(), self.rstd.clone(), dy.clone());
        let job = NormJob { id: self.id, x, x_stride: self.x_stride, rstd, dy };
        jobs.norm(ctx, params, job, InputGradient { dx: dx.view_mut(), dx_stride: self.x_stride, accumulate });
    }

    /// Bytes beside the input, which its producer counts.
    pub fn bytes(&self) -> usize {
        self.rstd.bytes()
    }

    /// Bytes with the input, where its producer does not keep it: a block keeps what enters it, not what leaves it.
    pub(crate) fn bytes_with_input(&self) -> usize {
        self.x.bytes() + self.bytes()
    }
}

/// RMSNorm of one row for each element of rstd, which it fills.
fn normalise(ctx: &Ctx, params: &Params, id: ParamId, (x, x_stride): (&Buf, usize), eps: f32, rstd: &mut Buf) -> Buf {
    let mut y = ctx.empty(x.dtype(), rstd.len() * params.layout.info(id).cols);
    let (weight, x) = (params.f32(id), x.view());
    rmsnorm::forward(ctx, rmsnorm::Forward { x, x_stride, weight, eps, y: y.view_mut(), rstd: rstd.view_mut() });
    y
}

/// y = x W^T in the activation dtype.
pub(crate) fn linear(ctx: &Ctx, params: &Params, id: ParamId, x: &Buf, n: usize) -> Buf {
    let w = params.weight(id);
    let mut y = ctx.empty(x.dtype(), n * w.rows);
    hadal_kernels::ops::gemm::linear(ctx, x.view(), &w, y.view_mut());
    y
}

/// dx (+)= dy W.
pub(crate) fn linear_backward(ctx: &Ctx, params: &Params, id: ParamId, dy: &Buf, dx: &mut Buf, accumulate: bool) {
    hadal_kernels::ops::gemm::linear_backward_input(ctx, dy.view(), &params.weight(id), dx.view_mut(), accumulate);
}
