//! `bench peak`: every loop over registers that the device may use; of a GPU a large product and a large copy.

use super::case::{Against, Case, Ready, Unit};
use super::peaks;
use hadal_kernels::{Ctx, DType, peak};
use serde_json::json;

/// One for each loop.
pub fn cases(ctx: &Ctx) -> Vec<Case> {
    if ctx.device.as_cuda().is_some() {
        return vec![product("bf16", DType::Bf16), product("f32", DType::F32), copy()];
    }
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

fn product(name: &str, dtype: DType) -> Case {
    let p = peaks::product(dtype);
    Case {
        name: format!("gemm {name} {}x{}x{}", p.m, p.n, p.k),
        sizes: json!({}),
        unit: Unit::Gflops,
        work: p.flops(),
        against: Against::Nothing,
        setup: Box::new(move |ctx| Ready { ours: p.work(ctx, 1), rival: None }),
    }
}

fn copy() -> Case {
    let bytes = peaks::COPIED_ON_GPU;
    Case {
        name: format!("copy {} MiB", bytes >> 20),
        sizes: json!({}),
        unit: Unit::Gbytes,
        work: bytes as f64,
        against: Against::Nothing,
        setup: Box::new(move |ctx| Ready { ours: peaks::copy(ctx, bytes), rival: None }),
    }
}
