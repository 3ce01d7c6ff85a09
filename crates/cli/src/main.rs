//! The binary: one file per verb. This crate alone prints; libraries report through values and observers.

mod bench;
mod convert;
mod demo;
mod generate;
mod inspect;
mod interrupt;
mod logits;
mod memory;
mod open;
mod output;
mod pretrain;
mod progress;
mod tokenizer;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use hadal_kernels::{Ctx, Device, Isa};
use hadal_train::Build;
use output::Output;
use std::process::ExitCode;
use std::sync::{Once, OnceLock};

/// The release and the commit it was built from; a run keeps them.
const BUILD: Build = Build { version: env!("CARGO_PKG_VERSION"), commit: env!("HADAL_COMMIT") };

/// Exit code for arguments that cannot be read, as clap and most programs have it.
const WRONG_ARGUMENTS: u8 = 2;

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
    /// Worker threads `[default: all cores]`. More than there are cores wait for each other: `bench` refuses them, since it
    /// would measure that; other verbs take them with a notice.
    #[arg(long, allow_negative_numbers = true, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Where to compute: cpu, cuda or cuda:N, the GPU of that number `[default: cpu]`.
    #[arg(long, global = true, value_name = "DEV")]
    device: Option<String>,
    /// Seed of weights, data order and sampling.
    #[arg(long, allow_negative_numbers = true, global = true, value_name = "N")]
    seed: Option<u64>,
    /// What was opened.
    #[arg(skip)]
    opened: OnceLock<Device>,
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
    /// Train, use and inspect tokenizers.
    Tokenizer(tokenizer::TokenizerVerb),
    /// Measure how fast this machine computes: products, attention, other operations, whole steps.
    Bench(bench::Bench),
}

/// A verb's name, and which of --threads, --seed and --device it has a use for.
type Uses = (&'static str, bool, bool, bool);

impl Verb {
    fn uses(&self) -> Uses {
        match self {
            Self::Pretrain(_) => ("pretrain", true, true, true),
            Self::Generate(_) => ("generate", true, true, true),
            Self::Logits(_) => ("logits", true, false, true),
            Self::Inspect(_) => ("inspect", true, false, true),
            Self::Convert(_) => ("convert", true, false, false),
            Self::Tokenizer(v) => v.uses(),
            Self::Bench(v) => v.uses(),
        }
    }
}

impl Global {
    /// An option that the verb would ignore is an error.
    fn has_effect(&self, verb: &Verb) -> anyhow::Result<()> {
        let (name, threads, seed, device) = verb.uses();
        for (option, idle) in [
            ("--threads", self.threads.is_some() && !threads),
            ("--seed", self.seed.is_some() && !seed),
            ("--device", self.device.is_some() && !device),
        ] {
            anyhow::ensure!(!idle, "{option} has no effect on hadal {name}");
        }
        Ok(())
    }

    fn ctx(&self) -> anyhow::Result<Ctx> {
        let device = Device::named(self.device_name(), self.threads)?;
        refused_amx();
        self.crowded();
        Ok(self.opened.get_or_init(|| device).ctx())
    }

    /// What the user should know of the device once it was used.
    fn notice(&self) -> Option<String> {
        self.opened.get()?.as_cuda()?.notice()
    }

    /// As [`Global::ctx`], for inference: a token's numbers are the same whatever else is computed beside it. `less` is
    /// what takes less of a GPU's memory.
    fn inference(&self, less: &'static str) -> anyhow::Result<Ctx> {
        let ctx = self.ctx()?;
        if let Some(cuda) = ctx.device.as_cuda() {
            cuda.set_invariant(true);
            cuda.advise(less);
        }
        Ok(ctx)
    }

    fn device_name(&self) -> &str {
        self.device.as_deref().unwrap_or("cpu")
    }

    /// For what reads, converts and counts on the host alone. It multiplies no matrices, so that nobody misses AMX.
    fn host(&self) -> anyhow::Result<Ctx> {
        let ctx = Device::cpu(self.threads)?.ctx();
        self.crowded();
        Ok(ctx)
    }

    /// Says, once, that there are more threads than cores: that changes no result, and helps nobody.
    fn crowded(&self) {
        static SAID: Once = Once::new();
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        if let Some(threads) = self.threads.filter(|&n| n > cores) {
            SAID.call_once(|| {
                eprintln!("--threads {threads}: more than the {cores} cores of this machine, which they share")
            });
        }
    }
}

/// Says, once, that the kernel keeps AMX from this process.
fn refused_amx() {
    static SAID: Once = Once::new();
    if let Some(notice) = Isa::notice() {
        SAID.call_once(|| eprintln!("{notice}"));
    }
}

impl Cli {
    fn run(&self, out: &Output) -> anyhow::Result<ExitCode> {
        self.global.has_effect(&self.verb)?;
        match &self.verb {
            Verb::Pretrain(v) => return v.run(&self.global, out),
            Verb::Generate(v) => v.run(&self.global, out),
            Verb::Logits(v) => v.run(&self.global, out),
            Verb::Inspect(v) => v.run(&self.global, out),
            Verb::Convert(v) => v.run(&self.global, out),
            Verb::Tokenizer(v) => v.run(&self.global, out),
            Verb::Bench(v) => v.run(&self.global, out),
        }
        .map(|()| ExitCode::SUCCESS)
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() && e.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // A machine that reads stdout learns of wrong arguments too.
            let json = std::env::args_os().any(|a| a == "--json");
            Output::new(json, false).error(&one_line(&e.render().to_string()));
            return ExitCode::from(WRONG_ARGUMENTS);
        }
        Err(help) => help.exit(),
    };
    let out = Output::new(cli.global.json, matches!(cli.verb, Verb::Pretrain(_)));
    // A panic is a fault of ours, never a message for the user to decode.
    std::panic::set_hook(Box::new(move |info| match info.payload().downcast_ref::<String>() {
        Some(message) if hadal_kernels::cuda::is_failure() => out.error(message),
        _ => out.error(&format!("internal, please report it: {info}")),
    }));
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cli.run(&out)));
    let result = match ran {
        Ok(result) => result,
        // The hook has told it. What the user can do something about ends as any refusal does.
        Err(_) if hadal_kernels::cuda::is_failure() => return ExitCode::FAILURE,
        Err(fault) => std::panic::resume_unwind(fault),
    };
    if let Some(notice) = cli.global.notice() {
        eprintln!("{notice}");
    }
    result.unwrap_or_else(|e| {
        out.error(&format!("{e:#}"));
        ExitCode::FAILURE
    })
}

/// What the parser of arguments says, without the usage that it adds: `--help` has that.
fn one_line(text: &str) -> String {
    let ours = |line: &&str| !line.starts_with("Usage:") && !line.starts_with("For more information");
    let words: Vec<&str> = text.lines().take_while(ours).flat_map(str::split_whitespace).collect();
    words.join(" ").trim_start_matches("error: ").replace(" tip: ", "; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::any::TypeId;

    #[test]
    fn what_clap_says_is_one_line() {
        for (args, expected) in [
            (
                &["pretrain", "--outt", "x"][..],
                "unexpected argument '--outt' found; a similar argument exists: '--out'",
            ),
            (&["generate", "m"], "the following required arguments were not provided: <PROMPT>"),
            (&["pretrain", "--out"], "a value is required for '--out <DIR>' but none was supplied"),
            (&["inspect", "m", "--seq", "many"], "invalid value 'many' for '--seq <T>': invalid digit found in string"),
            (&["insp"], "unrecognized subcommand 'insp'; a similar subcommand exists: 'inspect'"),
        ] {
            let Err(e) = Cli::try_parse_from([&["hadal"], args].concat()) else { panic!("{args:?}") };
            assert_eq!(one_line(&e.render().to_string()), expected);
        }
    }

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    /// A number below 0 is taken for a wrong number, not for an option that nobody knows.
    #[test]
    fn numbers_may_be_negative_to_be_refused() {
        fn check(command: &clap::Command) -> usize {
            let numbers = [TypeId::of::<usize>(), TypeId::of::<u64>(), TypeId::of::<f32>(), TypeId::of::<f64>()];
            let all = command.get_arguments().filter(|a| numbers.iter().any(|n| a.get_value_parser().type_id() == *n));
            let all = all.inspect(|a| assert!(a.is_allow_negative_numbers_set(), "{} {a}", command.get_name()));
            all.count() + command.get_subcommands().map(check).sum::<usize>()
        }
        assert!(check(&Cli::command()) >= 20);
        for (args, expected) in [
            (
                &["bench", "gemm", "--threads", "-1"][..],
                "invalid value '-1' for '--threads <N>': invalid digit found in string",
            ),
            (
                &["pretrain", "--out", "x", "--steps", "-1"],
                "invalid value '-1' for '--steps <N>': invalid digit found in string",
            ),
        ] {
            let Err(e) = Cli::try_parse_from([&["hadal"], args].concat()) else { panic!("{args:?}") };
            assert_eq!(one_line(&e.render().to_string()), expected);
        }
    }

    /// What follows the options is broken by hand, and terminals are 100 columns wide or wrap it badly.
    #[test]
    fn examples_fit_a_terminal() {
        let mut command = Cli::command();
        let texts: Vec<String> =
            command.get_subcommands_mut().flat_map(|c| c.get_after_help().map(|h| h.to_string())).collect();
        assert!(texts.len() >= 4);
        texts.iter().flat_map(|t| t.lines()).for_each(|line| assert!(line.chars().count() <= 95, "{line}"));
    }
}
