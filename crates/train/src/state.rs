//! Everything that a run needs to go on as if it had never stopped, beside the weights that others read.
//!
//! A checkpoint `step-NNNNNN/` holds the Hugging Face files, and under `state/` the moments `m` and `v`, in BF16 runs the
//! FP32 masters, each by published name and global shape, and `state.json`: counters, and size and checksum of every
//! other file. Under `ema/` lies, where one is kept, the average of the weights as a checkpoint of its own. Random
//! numbers and data are functions of the seed and a number, so that their state is the seed and the next number.

use crate::TrainError;
use crate::config::saved::Build;
use crate::step::Trainer;
use hadal_files::{Disk, Staged, Written, checksum};
use hadal_kernels::{Buf, Ctx, DType};
use hadal_model::io::{Manifest, SaveOptions, read_arena, write_arena, write_extra, write_model};
use hadal_model::{Layout, ModelConfig, Params, Precision};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What this version writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// Within a checkpoint's directory.
const STATE: &str = "state";
const FILE: &str = "state.json";
const EMA: &str = "ema";

/// Counters of a run after a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps finished.
    pub step: u64,
    /// Number of the next training sample.
    pub next_sample: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Validation at this step, where there was one: bits per byte.
    pub valid_bits_per_byte: Option<f64>,
}

/// `state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    format: u32,
    hadal: String,
    commit: String,
    /// Settings that make a run this run and no other, by key.
    fixed: BTreeMap<String, String>,
    /// Of the text, tokenised and split.
    data: String,
    /// Updates that AdamW has made.
    updates: u64,
    ema: bool,
    progress: Progress,
    files: BTreeMap<String, Stamp>,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    xxh3: String,
}

impl From<Written> for Stamp {
    fn from(w: Written) -> Self {
        Self { bytes: w.bytes, xxh3: format!("{:016x}", w.xxh3) }
    }
}

/// What does not change over a run, for whoever writes its checkpoints.
pub(crate) struct Writer {
    pub disk: Disk,
    pub out: PathBuf,
    pub config: ModelConfig,
    pub layout: Arc<Layout>,
    pub precision: Precision,
    pub fixed: BTreeMap<String, String>,
    pub data: String,
    pub build: Build,
    /// Tokenizer files: name, bytes.
    pub extra: Vec<(String, Vec<u8>)>,
    pub shard_bytes: usize,
}

/// The arenas at a step.
pub(crate) struct Arenas<'a> {
    pub master: &'a [f32],
    pub m: &'a [f32],
    pub v: &'a [f32],
    pub ema: Option<&'a [f32]>,
}

/// A checkpoint's name within a run.
pub(crate) fn name(step: u64) -> String {
    format!("step-{step:06}")
}

impl Writer {
    /// Writes `step-NNNNNN`, whole or not at all.
    pub fn write(&self, arenas: &Arenas<'_>, progress: &Progress, updates: u64) -> Result<PathBuf, TrainError> {
        let dir = self.out.join(name(progress.step));
        let staged = Staged::begin(&self.disk, &dir)?;
        let mut files = self.model(staged.path(), arenas.master, self.precision.act())?;
        let mut state = Manifest::new();
        let at = staged.path().join(STATE);
        self.disk.create_dir(&at)?;
        let mut arena = |stem: &str, data| -> Result<(), TrainError> {
            state.extend(write_arena(&self.disk, &at, stem, &self.layout, data, self.shard_bytes)?);
            Ok(())
        };
        arena("m", arenas.m)?;
        arena("v", arenas.v)?;
        if self.precision == Precision::Bf16 {
            arena("master", arenas.master)?;
        }
        files.extend(within(STATE, state));
        if let Some(ema) = arenas.ema {
            let at = staged.path().join(EMA);
            self.disk.create_dir(&at)?;
            files.extend(within(EMA, self.model(&at, ema, DType::F32)?));
            self.disk.sync_dir(&at)?;
        }
        let saved = Saved {
            format: FORMAT,
            hadal: self.build.version.into(),
            commit: self.build.commit.into(),
            fixed: self.fixed.clone(),
            data: self.data.clone(),
            updates,
            ema: arenas.ema.is_some(),
            progress: progress.clone(),
            files: files.into_iter().map(|(name, w)| (name, w.into())).collect(),
        };
        let text = serde_json::to_string_pretty(&saved).map_err(|e| TrainError::write(&at.join(FILE), &e.into()))?;
        write_extra(&self.disk, &at, &[(FILE, format!("{text}\n").as_bytes())])?;
        self.disk.sync_dir(&at)?;
        staged.commit()?;
        Ok(dir)
    }

    /// A model with its tokenizer.
    fn model(&self, dir: &Path, weights: &[f32], dtype: DType) -> Result<Manifest, TrainError> {
        let options = SaveOptions { dtype, shard_bytes: self.shard_bytes };
        let mut files = write_model(&self.disk, dir, &self.config, &self.layout, weights, options)?;
        let extra: Vec<(&str, &[u8])> = self.extra.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        files.extend(write_extra(&self.disk, dir, &extra)?);
        Ok(files)
    }
}

fn within(dir: &'static str, files: Manifest) -> impl Iterator<Item = (String, Written)> {
    files.into_iter().map(move |(name, written)| (format!("{dir}/{name}"), written))
}

/// Checkpoints of the run in `out`, by step: directories `step-N` with a state. What is not whole has no such name.
pub(crate) fn checkpoints(out: &Path) -> Result<BTreeMap<u64, PathBuf>, TrainError> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(out).map_err(|e| TrainError::read(out, &e))? {
        let path = entry.map_err(|e| TrainError::read(out, &e))?.path();
        let found_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = found_name.strip_prefix("step-").and_then(|n| n.parse().ok());
        if let Some(step) = step.filter(|&step| name(step) == found_name && path.join(STATE).join(FILE).is_file()) {
            found.insert(step, path);
        }
    }
    Ok(found)
}

/// A checkpoint to go on from: its description, read and checked; its arenas are read by [`State::params`]
/// and [`State::restore`].
#[derive(Debug)]
pub(crate) struct State {
    dir: PathBuf,
    saved: Saved,
}

impl State {
    /// Reads `state.json` of a checkpoint.
    pub fn open(dir: &Path) -> Result<Self, TrainError> {
        let path = dir.join(STATE).join(FILE);
        let bad = |what: String| TrainError::Io { path: path.display().to_string(), what };
        let text = std::fs::read_to_string(&path).map_err(|e| TrainError::read(&path, &e))?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| bad(format!("expected JSON of a run's state, found {e}")))?;
        match json["format"].as_u64() {
            Some(f) if f == u64::from(FORMAT) => {}
            Some(f) => {
                let by = json["hadal"].as_str().unwrap_or("an unknown version");
                let expected = format!("expected a checkpoint of format {FORMAT}, found {f}");
                return Err(bad(format!(
                    "{expected}, written by hadal {by}: resume it with that version or a newer one"
                )));
            }
            None => return Err(bad("expected a run's state with its format, found none".into())),
        }
        let saved = serde_json::from_value(json).map_err(|e| bad(format!("expected a run's state, found {e}")))?;
        Ok(Self { dir: dir.to_path_buf(), saved })
    }

    /// The checkpoint's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its counters.
    pub fn progress(&self) -> &Progress {
        &self.saved.progress
    }

    /// An error unless the run asked for is the one that this is a checkpoint of: whatever became of the files beside.
    pub fn check(&self, fixed: &BTreeMap<String, String>, data: &str) -> Result<(), TrainError> {
        let bad = |what: String| {
            let path = self.dir.join(STATE).join(FILE);
            Err(TrainError::Io { path: path.display().to_string(), what })
        };
        let none = "none".to_string();
        let keys: BTreeSet<&String> = self.saved.fixed.keys().chain(fixed.keys()).collect();
        let value = |of: &BTreeMap<String, String>, key: &String| of.get(key).unwrap_or(&none).clone();
        let told = |key: &&String| {
            let (then, now) = (value(&self.saved.fixed, key), value(fixed, key));
            (then != now).then(|| format!("{key}: saved {then}, asked {now}"))
        };
        let differences: Vec<String> = keys.iter().filter_map(told).collect();
        if !differences.is_empty() {
            let all = differences.join("; ");
            return bad(format!("expected the run that this is a checkpoint of, found another: {all}"));
        }
        if self.saved.data != data {
            let then = &self.saved.data;
            return bad(format!("expected the text that the run was trained on ({then}), found another ({data})"));
        }
        Ok(())
    }

    /// Compares every file with its checksum.
    fn verify(&self) -> Result<(), TrainError> {
        for (name, stamp) in &self.saved.files {
            let path = self.dir.join(name);
            let found = Stamp::from(checksum(&path)?);
            if found != *stamp {
                let (expected, found) = (show(stamp), show(&found));
                let hint = "the file is damaged; without this directory the run resumes from the checkpoint before it";
                let what = format!("expected {expected}, found {found}: {hint}");
                return Err(TrainError::Io { path: path.display().to_string(), what });
            }
        }
        Ok(())
    }

    /// The weights as they were, to the bit; all files of the checkpoint are checked first.
    pub fn params(&self, ctx: &Ctx, layout: &Arc<Layout>, precision: Precision) -> Result<Params, TrainError> {
        self.verify()?;
        let state = self.dir.join(STATE);
        let (dir, stem) = match precision {
            Precision::Fp32 => (self.dir.as_path(), "model"),
            Precision::Bf16 => (state.as_path(), "master"),
        };
        Ok(Params::of_masters(ctx, layout.clone(), precision, arena(ctx, dir, stem, layout)?))
    }

    /// Moments and average as they were, into a trainer of the weights.
    pub fn restore(&self, ctx: &Ctx, layout: &Layout, ema_decay: f32, trainer: &mut Trainer) -> Result<(), TrainError> {
        let state = self.dir.join(STATE);
        let read = |stem| arena(ctx, &state, stem, layout);
        trainer.optimizer_mut().restore(&read("m")?, &read("v")?, self.saved.updates);
        if self.saved.ema {
            let average = arena(ctx, &self.dir.join(EMA), "model", layout)?;
            trainer.keep_average(ema_decay, Some(ctx.here(average)));
        }
        Ok(())
    }
}

/// An f32 arena of a layout, in host memory.
fn arena(ctx: &Ctx, dir: &Path, stem: &str, layout: &Layout) -> Result<Buf, TrainError> {
    let mut arena = ctx.on_host().zeros(DType::F32, layout.len);
    read_arena(ctx, dir, stem, layout, arena.view_mut().f32())?;
    Ok(arena)
}

fn show(stamp: &Stamp) -> String {
    format!("{} bytes of checksum {}", stamp.bytes, stamp.xxh3)
}
