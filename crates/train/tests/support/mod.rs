//! What tests on a GPU share.

use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Ctx, Device};
use std::sync::Arc;

/// The first GPU, or a skip that is seen past the harness.
#[track_caller]
pub fn gpu() -> Option<(Ctx, Arc<Cuda>)> {
    if Cuda::count().unwrap() == 0 {
        hadal_numerics::skipped("no NVIDIA GPU");
        return None;
    }
    let ctx = Device::cuda(0, Some(2)).unwrap().ctx();
    let cuda = ctx.device.as_cuda()?.clone();
    Some((ctx, cuda))
}
