//! `hadal bench`: how fast the parts and the whole are on this machine. One file a kind; what they share is here:
//! which cases there are, how long they run, what a result is.

mod attention;
mod by_op;
mod case;
mod gemm;
mod grouped_gemm;
mod inputs;
mod measure;
mod memory_ops;
mod peak;
mod peaks;
mod resident;
mod row;
mod tokens;
mod train;

use crate::output::Output;
use crate::{Global, Uses};
use case::Case;
use clap::{Args, Subcommand};
use hadal_kernels::Ctx;
use hadal_model::{Layout, ModelConfig, Scope};
use measure::Budget;
use peaks::Peaks;
use row::Sink;

/// Options of `bench`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal bench gemm --case mini/o_proj
  hadal bench grouped_gemm --seconds 1 --record
  hadal bench train --preset mini --batch 8 --seq 512 --dtype bf16 --steps 20 --json")]
pub struct Bench {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Subcommand)]
enum Kind {
    /// Matrix products: squares, every shape of `mini` and of `v2-lite`'s layers, few rows.
    Gemm(Kernels),
    /// Products over experts, beside one dense product of the same operations.
    #[command(name = "grouped_gemm")]
    GroupedGemm(Kernels),
    /// Latent attention in multi-head form, forward and backward.
    Attention(Kernels),
    /// Operations that memory bounds, beside a plain copy of as many bytes.
    #[command(name = "memory_ops")]
    MemoryOps(Kernels),
    /// Whole optimiser steps.
    Train(train::Train),
    /// Multiply-adds in registers alone: what no product can exceed.
    Peak(Kernels),
}

/// Options of every kind but `train`.
#[derive(Args)]
pub struct Kernels {
    /// Only the case of this name, or those whose names have this in them. Cases of the preset `nano` are for tests
    /// and run only if this has `nano` in it.
    #[arg(long, value_name = "SUBSTRING")]
    case: Option<String>,
    /// Timed runs of a case, of which the median counts.
    #[arg(long, allow_negative_numbers = true, default_value_t = 5, value_name = "N")]
    repeats: usize,
    /// More of them until they have taken so long.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.5, value_name = "S")]
    seconds: f64,
    /// Print the cases with their sizes and run none.
    #[arg(long)]
    list: bool,
    /// Append the results to `bench/record/<machine>/<date>.jsonl`.
    #[arg(long)]
    record: bool,
}

impl Bench {
    /// See [`Uses`].
    pub fn uses(&self) -> Uses {
        match &self.kind {
            Kind::Gemm(k) => ("bench gemm", !k.list, false, true),
            Kind::GroupedGemm(k) => ("bench grouped_gemm", !k.list, false, true),
            Kind::Attention(k) => ("bench attention", !k.list, false, true),
            Kind::MemoryOps(k) => ("bench memory_ops", !k.list, false, true),
            Kind::Peak(k) => ("bench peak", !k.list, false, true),
            Kind::Train(_) => ("bench train", true, true, true),
        }
    }

    /// Runs it.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        match &self.kind {
            Kind::Gemm(k) => k.run("gemm", gemm::cases, global, out),
            Kind::GroupedGemm(k) => k.run("grouped_gemm", grouped_gemm::cases, global, out),
            Kind::Attention(k) => k.run("attention", attention::cases, global, out),
            Kind::MemoryOps(k) => k.run("memory_ops", memory_ops::cases, global, out),
            Kind::Peak(k) => k.run("peak", peak::cases, global, out),
            Kind::Train(t) => t.run(&context(global)?, global, out),
        }
    }
}

/// The context of a measurement. Threads above the cores would wait for each other, and be measured doing so.
fn context(global: &Global) -> anyhow::Result<Ctx> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    if let Some(found) = global.threads.filter(|n| !(1..=cores).contains(n)) {
        anyhow::bail!("--threads {found}: expected at least 1, at most the {cores} cores of this machine");
    }
    global.ctx()
}

impl Kernels {
    fn run(
        &self,
        bench: &'static str,
        cases: impl FnOnce(&Ctx) -> Vec<Case>,
        global: &Global,
        out: &Output,
    ) -> anyhow::Result<()> {
        let ctx = &context(global)?;
        let budget = Budget::new(self.repeats, self.seconds, &ctx.device)?;
        let cases = self.select(bench, cases(ctx))?;
        if self.list {
            for c in &cases {
                out.text(&format!("{}\n", c.name));
                out.object(&c.listed(bench));
            }
            return Ok(());
        }
        let mut sink = Sink::new(out, self.record, &ctx.device)?;
        let mut peaks = Peaks::default();
        for case in cases {
            sink.put(case.measure(bench, ctx, &budget, &mut peaks))?;
            // Cases differ in what they need; a GPU's memory is not to be cut into pieces by those that are over.
            if ctx.device.as_cuda().is_some() {
                ctx.device.release();
            }
        }
        Ok(())
    }

    /// The cases that `--case` names.
    fn select(&self, bench: &str, cases: Vec<Case>) -> anyhow::Result<Vec<Case>> {
        let Some(wanted) = &self.case else {
            return Ok(cases.into_iter().filter(|c| !c.name.contains(TESTED)).collect());
        };
        anyhow::ensure!(
            !wanted.is_empty(),
            "--case \"\": expected part of the name of a case (hadal bench {bench} --list), found nothing"
        );
        let exact = cases.iter().any(|c| c.name == *wanted);
        let chosen = |c: &Case| {
            if exact { c.name == *wanted } else { c.name.contains(wanted) && shown(&c.name, wanted) }
        };
        let cases: Vec<Case> = cases.into_iter().filter(chosen).collect();
        anyhow::ensure!(
            !cases.is_empty(),
            "--case {wanted}: expected part of the name of a case (hadal bench {bench} --list), found none with it"
        );
        Ok(cases)
    }
}

/// The preset whose cases are small enough for tests.
const TESTED: &str = "nano";

fn shown(name: &str, wanted: &str) -> bool {
    !name.contains(TESTED) || wanted.contains(TESTED)
}

/// A preset with its table of tensors, without MTP.
fn preset(name: &str) -> (ModelConfig, Layout) {
    let mut config = ModelConfig::preset(name).expect("benches name presets that are there");
    config.num_nextn_predict_layers = 0;
    let layout = Layout::new(&config, Scope::whole(&config));
    (config, layout)
}
