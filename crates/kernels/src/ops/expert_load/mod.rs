//! How many tokens chose each expert, added up over micro-batches where the offsets are, so that nobody waits for them.
//! Integers: the sum is exact and has no order.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// `counts[e]` += `offsets[e + 1]` - `offsets[e]`: counts i32 `[E]`, offsets i32 `[E + 1]` of [`super::moe_permute::plan`].
pub fn add(ctx: &Ctx, offsets: View<'_>, counts: ViewMut<'_>) {
    let _timer = ctx.timer("expert_load", sizes![offsets, counts]);
    assert_eq!(offsets.len(), counts.len() + 1, "expert_load: offsets of {} experts", counts.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::add(cuda, offsets, counts),
        Device::Cpu(_) => cpu::add(offsets.i32(), counts.i32()),
    }
}
