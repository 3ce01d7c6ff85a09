//! The binary: one file per verb. This crate alone prints; libraries report through values and observers.

mod convert;
mod generate;
mod inspect;
mod logits;
mod memory;
mod open;
mod output;
mod pretrain;

use clap::{Args, Parser, Subcommand};
use hadal_kernels::{Ctx, Device};
use hadal_train::Build;
use output::Output;
use std::process::ExitCode;

/// The release and the commit it was built from; a run keeps them.
const BUILD: Build = Build { version: env!("CARGO_PKG_VERSION"), commit: env!("HADAL_COMMIT") };

/// DeepSeek-V3 end to end: train, inspect and run models of this architecture.
#[derive(Parser)]
#[command(name = "hadal", version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("HADAL_COMMIT"), ")"))]
#[command(arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

/// Options of every verb.
#[derive(Args, Clone)]
pub struct Global {
    /// Print machine-readable JSON: one object a line, the last one the result.
    #[arg(long, global = true)]
    json: bool,
    /// Worker threads `[default: all cores]`.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Seed of weights, data order and sampling.
    #[arg(long, global = true, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Subcommand)]
enum Verb {
    /// Train a model on text, from nothing.
    Pretrain(Box<pretrain::Pretrain>),
    /// Continue a prompt.
    Generate(generate::Generate),
    /// Write the logits of given tokens to a file.
    Logits(logits::Logits),
    /// Count what a model costs: parameters, FLOPs, cache, training memory.
    Inspect(inspect::Inspect),
    /// Store a checkpoint's weights in another dtype: BF16, FP32 or FP8.
    Convert(convert::Convert),
}

impl Global {
    fn ctx(&self) -> anyhow::Result<Ctx> {
        Ok(Device::cpu(self.threads)?.ctx())
    }
}

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|e| {
        // A machine that reads stdout learns of wrong arguments too; help and version are no errors.
        if e.use_stderr() && std::env::args_os().any(|a| a == "--json") {
            let text = e.to_string();
            let first = text.lines().next().unwrap_or_default();
            Output::new(true, false).object(&serde_json::json!({ "error": first.trim_start_matches("error: ") }));
        }
        e.exit()
    });
    let out = Output::new(cli.global.json, matches!(cli.verb, Verb::Pretrain(_)));
    // A panic is a fault of ours, never a message for the user to decode.
    std::panic::set_hook(Box::new(move |info| out.error(&format!("internal, please report it: {info}"))));
    let result = match &cli.verb {
        Verb::Pretrain(v) => v.run(&cli.global, &out),
        Verb::Generate(v) => v.run(&cli.global, &out),
        Verb::Logits(v) => v.run(&cli.global, &out),
        Verb::Inspect(v) => v.run(&cli.global, &out),
        Verb::Convert(v) => v.run(&cli.global, &out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            out.error(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
