//! A step's time by op.

use super::measure::median;
use hadal_kernels::{Ctx, Device};
use std::collections::BTreeMap;

/// What is left of a step.
const OUTSIDE: &str = "outside ops";

/// Seconds by op of steps, one after the other.
pub struct ByOp {
    device: Device,
    steps: Vec<BTreeMap<&'static str, f64>>,
}

impl ByOp {
    /// Of the steps that follow.
    pub fn new(ctx: &Ctx) -> Self {
        let device = ctx.device.clone();
        device.take_profile();
        Self { device, steps: Vec::new() }
    }

    /// A step has ended that took so long.
    pub fn add(&mut self, seconds: f64) {
        let mut step = self.device.take_profile();
        let in_ops: f64 = step.values().sum();
        step.insert(OUTSIDE, (seconds - in_ops).max(0.0));
        self.steps.push(step);
    }

    /// The median of each op over all steps but the first, as the step's own time is taken.
    pub fn medians(&self) -> BTreeMap<&'static str, f64> {
        let timed = if self.steps.len() > 1 { &self.steps[1..] } else { &self.steps[..] };
        let ops = timed.iter().flat_map(BTreeMap::keys).copied();
        let of = |op| timed.iter().map(|s| s.get(op).copied().unwrap_or(0.0)).collect::<Vec<_>>();
        ops.map(|op| (op, median(&of(op)))).collect()
    }
}
