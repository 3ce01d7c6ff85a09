//! Balancing without a loss (V3 report 2.1.2, arXiv 2408.15664): after a step the bias of an expert above the gate's
//! mean load falls by gamma, below it rises by gamma, at it stays. Load is compared with the mean in integers, without
//! rounding, and where it was counted, so that a step ends without the host having seen it.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// `bias[e]` -= gamma * sign(`load[e]` * E - sum of load): load i32 `[E]`, bias f32 `[E]`.
pub fn step(ctx: &Ctx, load: View<'_>, gamma: f32, bias: ViewMut<'_>) {
    let _timer = ctx.timer("bias_update", sizes![load, bias]);
    assert_eq!(load.len(), bias.len(), "bias_update: loads and biases of a gate");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::step(cuda, load, gamma, bias),
        Device::Cpu(_) => cpu::step(load.i32(), gamma, bias.f32()),
    }
}
