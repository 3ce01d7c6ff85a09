//! A block is four stages: attention | dispatch | MLP | combine (V3 report 3.2.1, figure 4). Each has a forward, a
//! backward for its input that leaves the weight gradients as jobs, and an explicit struct of what it saves. Stages
//! hold no state, so that the stages of one micro-batch can run between those of another.

pub mod attention;
pub mod combine;
pub mod dispatch;
pub mod mlp;

use crate::weight_grad::{Shared, WeightGrads};
use crate::{ParamId, Params};
use hadal_kernels::ops::rmsnorm;
use hadal_kernels::{Buf, Ctx, DType};
use std::sync::Arc;

/// A norm's saved input and statistics.
#[derive(Debug)]
pub struct Norm {
    id: ParamId,
    x: Shared,
    x_stride: usize,
    rstd: Shared,
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
        let dim = params.layout.info(id).cols;
        let mut y = ctx.zeros(x.dtype(), n * dim);
        let mut rstd = ctx.zeros(DType::F32, n);
        let a = rmsnorm::Forward {
            x: x.view(),
            x_stride,
            weight: params.f32(id),
            eps,
            y: y.view_mut(),
            rstd: rstd.view_mut(),
        };
        rmsnorm::forward(ctx, a);
        (Arc::new(y), Self { id, x: x.clone(), x_stride, rstd: Arc::new(rstd) })
    }

    /// dx (rows `x_stride` apart) (+)= gradient of the input; queues the weight's.
    pub fn backward(
        &self,
        ctx: &Ctx,
        params: &Params,
        dy: &Shared,
        dx: &mut Buf,
        accumulate: bool,
        jobs: &mut WeightGrads,
    ) {
        let b = rmsnorm::BackwardInput {
            dy: dy.view(),
            x: self.x.view(),
            x_stride: self.x_stride,
            weight: params.f32(self.id),
            rstd: self.rstd.view(),
            dx: dx.view_mut(),
            dx_stride: self.x_stride,
            accumulate,
        };
        rmsnorm::backward_input(ctx, b);
        jobs.norm(self.id, &self.x, self.x_stride, &self.rstd, dy);
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

/// y = x W^T in the activation dtype.
pub(crate) fn linear(ctx: &Ctx, params: &Params, id: ParamId, x: &Buf, n: usize) -> Buf {
    let w = params.weight(id);
    let mut y = ctx.zeros(x.dtype(), n * w.rows);
    hadal_kernels::ops::gemm::linear(ctx, x.view(), &w, y.view_mut());
    y
}

/// dx (+)= dy W.
pub(crate) fn linear_backward(ctx: &Ctx, params: &Params, id: ParamId, dy: &Buf, dx: &mut Buf, accumulate: bool) {
    hadal_kernels::ops::gemm::linear_backward_input(ctx, dy.view(), &params.weight(id), dx.view_mut(), accumulate);
}
