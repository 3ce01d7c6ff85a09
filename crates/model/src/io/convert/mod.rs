//! From one storage of a checkpoint into another, tensor by tensor: BF16, F16, F32 and FP8 in; BF16, F32 and FP8 out.
//! Nothing is held but a piece of a tensor for each worker, so that memory grows with the number of tensors and not with
//! their size: a fused tensor of all experts is read in the same pieces as a norm.
//!
//! Stretches of zeros are left out of the files rather than written: a sparse checkpoint stays sparse.

mod config;
mod out;
mod plan;
#[cfg(test)]
mod tests;
mod unit;

use super::save::{shard_name, vacant};
use super::{Checkpoint, IoError};
use crate::ModelConfig;
use hadal_files::{Disk, Lock, Staged};
use hadal_kernels::Ctx;
use hadal_numerics::block::ScaleFormat;
use plan::Plan;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use unit::Unit;

/// How the converted weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// All floats as BF16, correction biases as they were.
    Bf16,
    /// All floats as F32.
    F32,
    /// Matrices of attention and feed-forward layers as E4M3 with scales for blocks of 128 by 128, which are stored as
    /// F32 or F8_E8M0; all else as with [`Target::Bf16`].
    Fp8(ScaleFormat),
}

/// How to convert.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Of the output.
    pub target: Target,
    /// Bytes of tensors in one file; more makes shards with an index. A single larger tensor gets a file of its own,
    /// with its scales.
    pub shard_bytes: usize,
}

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Tensors, scales included.
    pub tensors: usize,
    /// Numbers in them, scales left out.
    pub parameters: usize,
    /// Bytes of tensors, holes included.
    pub bytes: usize,
    /// Safetensors files.
    pub files: usize,
    /// What was odd, one line each.
    pub warnings: Vec<String>,
}

/// Who watches a conversion; called from all workers.
pub trait ConvertObserver: Sync {
    /// Everything has been checked; so many bytes of tensors will be read.
    fn start(&self, total: u64);
    /// So many more of them are done.
    fn advance(&self, bytes: u64);
}

/// Writes the checkpoint in `source` as the new directory `dir`, which must not exist or be empty: weights under their
/// published names (fused experts one by one) in the dtypes of `options`, `config.json` with them, and the other files
/// of at most 64 MiB as they are. All tensors that the configuration demands must be there. The directory appears whole
/// or not at all.
pub fn convert(
    ctx: &Ctx,
    source: &Path,
    dir: &Path,
    options: ConvertOptions,
    observer: &dyn ConvertObserver,
) -> Result<Converted, IoError> {
    convert_on(&Disk::new(), ctx, source, dir, options, observer)
}

/// [`convert`], on a disk that may be told to fail.
fn convert_on(
    disk: &Disk,
    ctx: &Ctx,
    source: &Path,
    dir: &Path,
    options: ConvertOptions,
    observer: &dyn ConvertObserver,
) -> Result<Converted, IoError> {
    let config_path = source.join("config.json");
    let (mut model, mut warnings) = ModelConfig::from_hf(&config_path)?;
    let checkpoint = Checkpoint::open(source)?;
    model.num_nextn_predict_layers = checkpoint.mtp_layers(&model);
    let (plan, more) = Plan::new(&checkpoint, &model, options)?;
    warnings.extend(more);
    vacant(dir)?;
    // In this order: should something fail, the directory is removed before the lock is given up.
    let (lock, staged) = begin(disk, dir)?;
    let text = config::converted(&config_path, options.target)?;
    disk.write_new(&staged.path().join("config.json"), |out| out.write_all(text.as_bytes()))?;
    warnings.extend(config::copy_others(disk, source, staged.path())?);
    observer.start(plan.shards.iter().flatten().map(Unit::bytes_read).sum());
    for (i, units) in plan.shards.iter().enumerate() {
        let name = shard_name("model", i, plan.shards.len());
        write_shard(disk, ctx, &staged.path().join(name), units, observer)?;
    }
    if plan.shards.len() > 1 {
        let index = format!("{:#}\n", index(&plan));
        let path = staged.path().join("model.safetensors.index.json");
        disk.write_new(&path, |out| out.write_all(index.as_bytes()))?;
    }
    commit(staged, lock, dir)?;
    let (tensors, files) = (plan.tensors().count(), plan.shards.len());
    Ok(Converted { tensors, parameters: plan.parameters(), bytes: plan.bytes(), files, warnings })
}

/// Begins the directory, unless another process is converting into the same one: only who holds the lock in
/// `.DIR.partial` may clear it.
fn begin(disk: &Disk, dir: &Path) -> Result<(Lock, Staged), IoError> {
    let held = |holder| IoError::Held { path: dir.to_path_buf(), holder };
    let place = Staged::place(dir)?;
    disk.create_dir(&place)?;
    let old = Lock::take(&place)?.map_err(held)?;
    let staged = Staged::begin(disk, dir)?;
    match Lock::take(staged.path())? {
        Ok(lock) => {
            drop(old); // Of a directory that is gone, held until the new one was ours.
            Ok((lock, staged))
        }
        Err(holder) => {
            // Another process was faster, and what lies there now is its own.
            std::mem::forget(staged);
            Err(held(holder))
        }
    }
}

/// Gives the directory its name, and then takes the lock out of it: in the other order another process could clear it
/// on its way. Should the lock's file stay, it is hidden and nobody reads it.
fn commit(staged: Staged, lock: Lock, dir: &Path) -> Result<(), IoError> {
    // Windows renames no directory with an open file in it.
    let lock = (!cfg!(windows)).then_some(lock);
    staged.commit()?;
    let _ = std::fs::remove_file(dir.join(Lock::NAME));
    drop(lock);
    Ok(())
}

fn write_shard(
    disk: &Disk,
    ctx: &Ctx,
    path: &Path,
    units: &[Unit<'_>],
    observer: &dyn ConvertObserver,
) -> Result<(), IoError> {
    let (file, places) = out::Sparse::create(disk, path, units)?;
    let mut results: Vec<Result<(), IoError>> = units.iter().map(|_| Ok(())).collect();
    let cpu = ctx.host();
    // Units are independent, and what each writes has its place: any order gives the same file.
    cpu.chunks_mut(&mut results, 1, |i, result| result[0] = units[i].run(&file, places[i], observer));
    results.into_iter().try_for_each(|result| result)?;
    file.finish()
}

fn index(plan: &Plan<'_>) -> serde_json::Value {
    let n = plan.shards.len();
    let map: BTreeMap<String, String> =
        plan.tensors().map(|(i, t)| (t.name.clone(), shard_name("model", i, n))).collect();
    let metadata = json!({ "total_parameters": plan.parameters(), "total_size": plan.bytes() });
    json!({ "metadata": metadata, "weight_map": map })
}
