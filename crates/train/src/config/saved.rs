//! The resolved run as `run.toml` beside its checkpoints: what it was, and whether what is asked for now is the same.

use super::{RunFile, Settings, TrainConfig};
use crate::TrainError;
use crate::pretrain::Run;
use hadal_model::{ModelConfig, Precision};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use toml::{Table, Value};

/// The file's name in the run directory.
pub const RUN_FILE: &str = "run.toml";

/// Which program a run is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Build {
    /// The release.
    pub version: &'static str,
    /// The commit it was built from, `-dirty` behind it if the sources differed; "unknown" without git.
    pub commit: &'static str,
}

/// `[hadal]`: the build that wrote a file.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedBuild {
    version: String,
    commit: String,
}

impl From<Build> for SavedBuild {
    fn from(b: Build) -> Self {
        Self { version: b.version.into(), commit: b.commit.into() }
    }
}

/// Keys of `[train]` that a run may change on its way. What is left out would make another run of it: weights and data
/// are functions of the seed, of dtype and seq; the moments were gathered with beta1 and beta2; save_initial wants a step
/// that is gone.
pub(super) const MAY_CHANGE: [&str; 21] = [
    "steps",
    "batch",
    "micro_batch",
    "lr",
    "min_lr",
    "warmup",
    "constant",
    "eps",
    "weight_decay",
    "clip",
    "mtp_lambda",
    "balance_alpha",
    "bias_gamma",
    "ema_decay",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "save_beside",
    "recompute",
];

/// The `[model]` table of a run: what the tokenizer decides is not in it.
pub(super) fn model(model: &ModelConfig) -> Table {
    let mut table = model.to_toml_table();
    table.remove("bos_token_id");
    table.remove("eos_token_ids");
    table
}

impl TrainConfig {
    /// Every key that has an effect, so that resolving gives these values again.
    fn settings(&self, model: &ModelConfig) -> Settings {
        let Self { batch, micro_batch, seq, precision, seed, schedule, adamw, objective, .. } = self;
        let s = schedule;
        let (moe, decays) = (model.has_experts(), s.warmup + s.constant < s.steps);
        Settings {
            steps: Some(s.steps),
            batch: Some(*batch),
            micro_batch: Some(*micro_batch),
            seq: Some(*seq),
            dtype: Some(if *precision == Precision::Bf16 { "bf16" } else { "fp32" }.into()),
            recompute: Some(self.recompute.name().into()),
            seed: Some(*seed),
            lr: Some(s.peak),
            min_lr: decays.then_some(s.floor),
            warmup: Some(s.warmup),
            constant: Some(s.constant),
            beta1: Some(adamw.beta1),
            beta2: Some(adamw.beta2),
            eps: Some(adamw.eps),
            weight_decay: Some(adamw.weight_decay),
            clip: Some(adamw.clip),
            mtp_lambda: (model.num_nextn_predict_layers > 0).then_some(objective.mtp_lambda),
            balance_alpha: moe.then_some(objective.balance_alpha),
            bias_gamma: (moe && model.correction_bias).then_some(objective.bias_gamma),
            ema_decay: Some(self.ema_decay),
            eval_every: Some(self.eval_every),
            eval_tokens: Some(self.eval_tokens),
            checkpoint_every: Some(self.checkpoint_every),
            keep_last: Some(self.keep_last),
            keep_best: Some(self.keep_best),
            save_beside: Some(self.save_beside),
            save_initial: Some(self.save_initial),
            record_batches: self.record_batches.clone(),
        }
    }
}

/// A run's keys in their tables.
fn table(run: &Run) -> Table {
    let serialized = |t: Result<Table, toml::ser::Error>| Value::Table(t.expect("resolved: every value fits TOML"));
    [
        ("hadal", serialized(Table::try_from(SavedBuild::from(run.build)))),
        ("model", Value::Table(model(&run.model))),
        ("data", serialized(Table::try_from(&run.data))),
        ("train", serialized(Table::try_from(run.config.settings(&run.model)))),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .into_iter()
    .collect()
}

/// The resolved run as TOML: [`RunFile::read`] and [`RunFile::resolve`] give the same run again.
pub fn write(run: &Run) -> String {
    let head = "# All settings of the run beside this file, as they were resolved.\n\
                # `hadal pretrain --resume` goes on with it; `hadal pretrain --config` begins another like it.\n\n";
    head.to_string() + &toml::to_string(&table(run)).expect("resolved: every value fits TOML")
}

/// Compares the saved run at `path` with the one asked for. Gives lines to show: another build, and with
/// [`Run::override_saved`] what changes. Any other difference is an error that names them all.
pub fn check(path: &Path, run: &Run) -> Result<Vec<String>, TrainError> {
    let file = RunFile::read(path)?;
    let Some(by) = file.hadal.clone() else {
        let what = "expected the settings of a run, with a table [hadal]; found a run file without it";
        return Err(TrainError::Io { path: path.display().to_string(), what: what.into() });
    };
    let saved = file.resolve(run.out.clone(), run.build)?;
    let differences = differences(&saved, run);
    let refused = |what: String| Err(TrainError::Io { path: path.display().to_string(), what });
    let list = |d: &[&Difference]| d.iter().map(|d| d.told()).collect::<Vec<_>>().join("; ");
    let (may, never): (Vec<&Difference>, Vec<&Difference>) =
        differences.iter().partition(|d| d.may_change(&saved, run));
    if !never.is_empty() && run.override_saved {
        return refused(format!("not within a run, even with --override: {}", list(&never)));
    }
    if !differences.is_empty() && !run.override_saved {
        let (n, all) = (differences.len(), list(&differences.iter().collect::<Vec<_>>()));
        let settings = if n == 1 { "setting" } else { "settings" };
        let hint = match (may.is_empty(), never.is_empty()) {
            (false, true) => "--override allows it".to_string(),
            (true, _) => "a run cannot change it; take another --out".to_string(),
            (false, false) => {
                let keys: Vec<&str> = never.iter().map(|d| d.key.as_str()).collect();
                format!("--override allows all but {}", keys.join(", "))
            }
        };
        return refused(format!("the run has {n} other {settings}: {all} ({hint})"));
    }
    let now = SavedBuild::from(run.build);
    let built = (by != now).then(|| {
        let [then, now] = [by, now].map(|b| format!("{} ({})", b.version, b.commit));
        format!("the run was made by hadal {then} so far; this is {now}: numbers may differ in their last bits")
    });
    Ok(built.into_iter().chain(may.iter().map(|d| d.change())).collect())
}

/// Keys that make a run this run and no other, with their values: what no override changes, and what the state of a
/// checkpoint means nothing without.
pub(crate) fn fixed(run: &Run) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    flatten("", &Value::Table(table(run)), &mut keys);
    let own = |key: &str| match key.split_once('.') {
        Some(("model", _)) => true,
        Some(("train", key)) => !MAY_CHANGE.contains(&key) && !["save_initial", "record_batches"].contains(&key),
        // Of the text there is a fingerprint.
        _ => false,
    };
    let average = ("train.ema_decay".to_string(), if run.config.ema_decay > 0.0 { "above 0" } else { "0" }.to_string());
    keys.into_iter().filter(|(key, _)| own(key)).map(|(key, v)| (key, v.to_string())).chain([average]).collect()
}

/// A key with two values.
struct Difference {
    key: String,
    saved: Option<Value>,
    asked: Option<Value>,
}

fn show(v: &Option<Value>) -> String {
    v.as_ref().map_or("none".into(), |v| v.to_string())
}

impl Difference {
    fn told(&self) -> String {
        format!("{}: saved {}, asked {}", self.key, show(&self.saved), show(&self.asked))
    }

    fn change(&self) -> String {
        format!("{}: {} -> {}", self.key, show(&self.saved), show(&self.asked))
    }

    fn may_change(&self, saved: &Run, asked: &Run) -> bool {
        let Some(key) = self.key.strip_prefix("train.") else { return false };
        match key {
            // The average of the steps that are gone was not kept.
            "ema_decay" => saved.config.ema_decay > 0.0 && asked.config.ema_decay > 0.0,
            // A recording begins with the first step, and may be given up.
            "record_batches" => asked.config.record_batches.is_none(),
            _ => MAY_CHANGE.contains(&key),
        }
    }
}

fn differences(saved: &Run, asked: &Run) -> Vec<Difference> {
    let [mut saved, mut asked] = [saved, asked].map(|run| {
        let mut keys = BTreeMap::new();
        flatten("", &Value::Table(table(run)), &mut keys);
        keys
    });
    let keys: BTreeSet<String> = saved.keys().chain(asked.keys()).cloned().collect();
    let both = keys.into_iter().map(|key| Difference { saved: saved.remove(&key), asked: asked.remove(&key), key });
    both.filter(|d| d.saved != d.asked).collect()
}

/// Every value by its whole key.
fn flatten(key: &str, value: &Value, to: &mut BTreeMap<String, Value>) {
    match value {
        Value::Table(t) => {
            let name = |k: &str| if key.is_empty() { k.to_string() } else { format!("{key}.{k}") };
            t.iter().for_each(|(k, v)| flatten(&name(k), v, to));
        }
        _ => {
            to.insert(key.to_string(), value.clone());
        }
    }
}
