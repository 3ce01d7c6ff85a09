//! Chores of the repository that need more than cargo: `cargo xtask gpu-bundle`, `cargo xtask gpu-test`.
//!
//! GPUs are seldom where the compiler is. The bundle is a folder with stripped binaries, the goldens and a script that
//! runs all of it on a machine that has a GPU, its driver, NVRTC and cuBLASLt, and no Rust.

mod bundle;

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: cargo xtask gpu-bundle [FOLDER]   collect what tests and benches need on a GPU machine
                          (default: target/gpu-bundle)
       cargo xtask gpu-test             the same, and run it here";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let default = root().join("target/gpu-bundle");
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["gpu-bundle"] => bundle::make(&default),
        ["gpu-bundle", folder] if !folder.starts_with('-') => bundle::make(Path::new(folder)),
        ["gpu-test"] => {
            bundle::make(&default)?;
            let status = Command::new(default.join(bundle::SCRIPT)).status()?;
            if !status.success() {
                bail!("the suite failed: {}", default.join("report.txt").display());
            }
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

/// The repository.
fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
