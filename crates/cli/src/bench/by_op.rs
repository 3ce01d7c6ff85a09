//! A step's time by op.

use super::measure::median;
use hadal_kernels::{Ctx, Device, Op, Spent};
use std::collections::{BTreeMap, BTreeSet};

/// What is left of a step.
const OUTSIDE: &str = "outside ops";

/// Time by op of steps, one after the other.
pub struct ByOp {
    device: Device,
    /// Calls of an op that differ in sizes are told apart.
    sizes: bool,
    steps: Vec<BTreeMap<String, Spent>>,
}

impl ByOp {
    /// Of the steps that follow.
    pub fn new(ctx: &Ctx, sizes: bool) -> Self {
        let device = ctx.device.clone();
        device.take_profile();
        Self { device, sizes, steps: Vec::new() }
    }

    /// A step has ended that took so long.
    pub fn add(&mut self, seconds: f64) {
        let mut step: BTreeMap<String, Spent> = BTreeMap::new();
        let mut left = seconds;
        for (op, spent) in self.device.take_profile() {
            let entry = step.entry(self.name(&op)).or_default();
            entry.seconds += spent.seconds;
            entry.calls += spent.calls;
            left -= spent.seconds;
        }
        step.insert(OUTSIDE.into(), Spent { seconds: left.max(0.0), calls: 1 });
        self.steps.push(step);
    }

    fn name(&self, op: &Op) -> String {
        if self.sizes && !op.sizes.is_empty() { format!("{} {}", op.name, op.sizes) } else { op.name.into() }
    }

    /// The median of each op over all steps but the first, as the step's own time is taken; calls of the last step.
    pub fn medians(&self) -> BTreeMap<String, Spent> {
        let timed = &self.steps[1..];
        let ops: BTreeSet<&String> = timed.iter().flat_map(BTreeMap::keys).collect();
        let of = |step: &BTreeMap<String, Spent>, op: &str| step.get(op).copied().unwrap_or_default();
        let spent = |op: &String| Spent {
            seconds: median(&timed.iter().map(|s| of(s, op).seconds).collect::<Vec<_>>()),
            calls: timed.last().map_or(0, |s| of(s, op).calls),
        };
        ops.into_iter().map(|op| (op.clone(), spent(op))).collect()
    }
}
