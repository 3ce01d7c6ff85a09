//! `hadal convert`: a checkpoint stored in another dtype, streamed from files to files.

use crate::inspect::scaled;
use crate::output::Output;
use crate::progress::Bytes;
use crate::{Global, open};
use clap::Args;
use hadal_model::{ConvertObserver, ConvertOptions, Target};
use hadal_numerics::block::ScaleFormat;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Options of `convert`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal convert DeepSeek-V3 DeepSeek-V3-bf16 --dtype bf16
  hadal convert first-run first-run-fp8 --dtype fp8
  hadal convert model model-fp8 --dtype fp8 --scale-fmt ue8m0 --shard-size 500MB

Reads BF16, F16, F32 and FP8 with weight_scale_inv, in one file or shards, experts one by one
or fused. FP8 are the matrices of attention, dense layers and experts, in blocks of 128 x 128;
the rest becomes BF16. Memory does not grow with the size of the weights. DST appears whole or
not at all.")]
pub struct Convert {
    /// Model directory, or a run's (its newest checkpoint is taken).
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// New directory.
    #[arg(value_name = "DST")]
    out: PathBuf,
    /// What weights are stored as: bf16, fp32 or fp8.
    #[arg(long, value_name = "D")]
    dtype: String,
    /// How FP8 scales are stored: fp32, or ue8m0 (powers of two in a byte) `[default: fp32]`.
    #[arg(long, value_name = "F")]
    scale_fmt: Option<String>,
    /// Most bytes of weights in a file: a number with or without KB, MB, GB, KiB, MiB, GiB.
    #[arg(long, default_value = "5GB", value_name = "SIZE")]
    shard_size: String,
}

/// The answer.
#[derive(Serialize)]
struct Report {
    out: String,
    dtype: String,
    tensors: usize,
    parameters: usize,
    bytes: usize,
    files: usize,
    seconds: f64,
}

impl Convert {
    /// Converts.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let options = ConvertOptions { target: self.target()?, shard_bytes: bytes(&self.shard_size)? };
        let ctx = global.host()?;
        let source = open::resolve(&self.source)?;
        let begin = Instant::now();
        let progress = Progress { out, total: OnceLock::new(), done: Mutex::default() };
        let done = hadal_model::convert(&ctx, &source, &self.out, options, &progress);
        drop(progress);
        let done = done?;
        done.warnings.iter().for_each(|w| out.warn(w));
        let seconds = begin.elapsed().as_secs_f64();
        let (path, size) = (self.out.display().to_string(), scaled(done.bytes as f64, "B"));
        let rate = scaled(done.bytes as f64 / seconds, "B");
        out.text(&format!(
            "{path}: {} tensors, {size} in {} {}, {seconds:.1} s ({rate}/s)\n",
            done.tensors,
            done.files,
            if done.files == 1 { "file" } else { "files" },
        ));
        out.object(&Report {
            out: path,
            dtype: self.dtype.clone(),
            tensors: done.tensors,
            parameters: done.parameters,
            bytes: done.bytes,
            files: done.files,
            seconds,
        });
        Ok(())
    }

    fn target(&self) -> anyhow::Result<Target> {
        let scales = match self.scale_fmt.as_deref() {
            None | Some("fp32") => ScaleFormat::F32,
            Some("ue8m0") => ScaleFormat::Ue8m0,
            Some(other) => anyhow::bail!("--scale-fmt {other}: expected fp32 or ue8m0"),
        };
        let target = match self.dtype.as_str() {
            "fp8" => return Ok(Target::Fp8(scales)),
            "bf16" => Target::Bf16,
            "fp32" => Target::F32,
            other => anyhow::bail!("--dtype {other}: expected bf16, fp32 or fp8"),
        };
        match &self.scale_fmt {
            None => Ok(target),
            Some(format) => anyhow::bail!("--scale-fmt {format} has no effect with --dtype {}", self.dtype),
        }
    }
}

/// "5GB" as a number of bytes.
fn bytes(text: &str) -> anyhow::Result<usize> {
    let units = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
    ];
    let split = |(unit, size): &(&str, usize)| Some((text.strip_suffix(unit)?, *size));
    let (number, size) = units.iter().find_map(split).unwrap_or((text, 1));
    match number.trim_end().parse::<usize>().ok().and_then(|n| n.checked_mul(size)) {
        Some(n) if n > 0 => Ok(n),
        _ => anyhow::bail!(
            "--shard-size {text}: expected a whole number above 0 with or without KB, MB, GB, KiB, MiB, GiB"
        ),
    }
}

/// Counts what all workers have done.
struct Progress<'a> {
    out: &'a Output,
    total: OnceLock<u64>,
    done: Mutex<(u64, Bytes)>,
}

impl ConvertObserver for Progress<'_> {
    fn start(&self, total: u64) {
        self.total.get_or_init(|| total);
        self.advance(0);
    }

    fn advance(&self, bytes: u64) {
        let mut state = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, shown) = &mut *state;
        *done += bytes;
        shown.show("converting", *done, *self.total.get().unwrap_or(done), self.out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_shards() {
        for (text, n) in [("5GB", 5_000_000_000), ("1 MiB", 1 << 20), ("77", 77), ("8B", 8), ("3KB", 3000)] {
            assert_eq!(bytes(text).unwrap(), n);
        }
        for text in ["", "GB", "0", "-1GB", "1.5GB", "5gb", "99999999999999999999", "18446744073709551615KB"] {
            let e = bytes(text).unwrap_err().to_string();
            assert!(e.starts_with(&format!("--shard-size {text}: expected ")), "{e}");
        }
    }
}
