//! `bench peak`: every loop over registers that the device may use.

use super::case::{Against, Case, Ready, Unit};
use super::peaks;
use hadal_kernels::{Ctx, peak};
use serde_json::json;

/// One for each loop.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    let cpu = ctx.host();
    peak::kernels(cpu.isa()).into_iter().map(|k| case(ctx, k)).collect()
}

fn case(ctx: &Ctx, kernel: peak::Kernel) -> Case {
    Case {
        name: kernel.name(),
        sizes: json!({}),
        unit: Unit::Gflops,
        work: peaks::flops(ctx, &kernel),
        against: Against::Nothing,
        setup: Box::new(move |ctx| Ready { ours: peaks::work(ctx, kernel), rival: None }),
    }
}
