//! What tests on a GPU share.

use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Ctx, Device};
use std::sync::Arc;

/// The first GPU, or a skip that is seen past the harness.
#[track_caller]
pub fn gpu() -> Option<(Ctx, Arc<Cuda>)> {
    if Cuda::count().unwrap() == 0 {
        use std::io::Write;
        let (thread, at) = (std::thread::current(), std::panic::Location::caller());
        let test = thread.name().filter(|n| *n != "main").map_or_else(|| at.to_string(), str::to_owned);
        writeln!(std::io::stderr(), "skipped: {test}: no NVIDIA GPU").expect("stderr can be written");
        return None;
    }
    let ctx = Device::cuda(0, Some(2)).unwrap().ctx();
    let cuda = ctx.device.as_cuda()?.clone();
    Some((ctx, cuda))
}
