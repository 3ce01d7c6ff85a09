//! What a run remembers of its data, so that it goes on with the same: `data/prepared.json` and the tokenizer beside it.

use super::Made;
use crate::TrainError;
use crate::pretrain::Run;
use hadal_data::pack::Shares;
use hadal_data::shards::Identity;
use hadal_data::{DataError, Tokenizer};
use hadal_files::Disk;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const FILE: &str = "prepared.json";
const VERSION: u32 = 1;

/// `prepared.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    version: u32,
    /// What decided what the tokens are.
    settings: Value,
    /// Fingerprint of the tokenizer, in hexadecimal.
    tokenizer: String,
    sources: Vec<KeptSource>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeptSource {
    name: String,
    /// Relative to this file's directory unless shards are shared between runs.
    directory: PathBuf,
    /// Fingerprint of documents and split, in hexadecimal.
    fingerprint: String,
    weight: Option<f64>,
}

fn settings(run: &Run) -> Value {
    let data = serde_json::to_value(&run.data).expect("settings have a JSON form");
    serde_json::json!({ "seed": run.config.seed, "vocab_size": run.model.vocab_size, "data": data })
}

fn bad(path: &Path, what: String) -> TrainError {
    TrainError::Io { path: path.display().to_string(), what }
}

/// The keys below `key` whose values differ, as a run file has them, each with both values.
fn differences(key: &str, saved: Option<&Value>, asked: Option<&Value>, to: &mut Vec<String>) {
    match (saved, asked) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            let inside = |name: &str| match (key, name) {
                ("", "seed") => "train.seed".into(),
                ("", "vocab_size") => "model.vocab_size".into(),
                ("", name) => name.to_string(),
                _ => format!("{key}.{name}"),
            };
            names.into_iter().for_each(|name| differences(&inside(name), a.get(name), b.get(name), to));
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if a.len() == b.len() && a.iter().all(Value::is_object) => {
            let both = a.iter().zip(b).enumerate();
            both.for_each(|(i, (a, b))| differences(&format!("{key}[{i}]"), Some(a), Some(b), to));
        }
        _ => {
            let show = |v: Option<&Value>| v.filter(|v| !v.is_null()).map_or("none".into(), Value::to_string);
            let (saved, asked) = (show(saved), show(asked));
            if saved != asked {
                to.push(format!("{key}: saved {saved}, asked {asked}"));
            }
        }
    }
}

/// What was prepared in `home`, if it was; for other settings than the run's it is an error.
pub(super) fn read(home: &Path, run: &Run) -> Result<Option<Kept>, TrainError> {
    let path = home.join(FILE);
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| TrainError::read(&path, &e))?,
    };
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(&path, e.to_string()))?;
    if value["version"] != VERSION {
        return Err(bad(&path, format!("expected version {VERSION}, found {}", value["version"])));
    }
    let kept: Kept = serde_json::from_value(value).map_err(|e| bad(&path, e.to_string()))?;
    let asked = settings(run);
    let mut differing = Vec::new();
    differences("", Some(&kept.settings), Some(&asked), &mut differing);
    if !differing.is_empty() {
        return Err(bad(&path, format!("the data of this run was made for other settings: {}", differing.join("; "))));
    }
    Ok(Some(kept))
}

impl Kept {
    /// Of a run whose data lies in `home`.
    pub fn new(home: &Path, run: &Run, tokenizer: &Tokenizer, made: &[Made], weights: &[Option<f64>]) -> Self {
        let source = |(m, weight): (&Made, &Option<f64>)| {
            let inside = m.directory.strip_prefix(home).map(Path::to_path_buf).ok();
            KeptSource {
                name: m.name.clone(),
                // The current directory may be another one when the run goes on.
                directory: inside.or(std::path::absolute(&m.directory).ok()).unwrap_or(m.directory.clone()),
                fingerprint: format!("{:016x}", m.identity.source),
                weight: *weight,
            }
        };
        Self {
            version: VERSION,
            settings: settings(run),
            tokenizer: format!("{:016x}", tokenizer.fingerprint()),
            sources: made.iter().zip(weights).map(source).collect(),
        }
    }

    /// Writes the tokenizer and, last, this.
    pub fn write(&self, disk: &Disk, home: &Path, tokenizer: &Tokenizer) -> Result<(), TrainError> {
        let write = |name: &str, bytes: &[u8]| disk.replace(&home.join(name), bytes).map_err(DataError::from);
        disk.create_dir(home).map_err(DataError::from)?;
        for (name, bytes) in tokenizer.files() {
            write(name, &bytes)?;
        }
        let text = serde_json::to_vec_pretty(self).expect("plain strings and numbers have a JSON form");
        Ok(write(FILE, &text)?)
    }

    /// The shares of the sources.
    pub fn shares(&self) -> Result<Shares, TrainError> {
        let weights: Vec<(&str, Option<f64>)> = self.sources.iter().map(|s| (s.name.as_str(), s.weight)).collect();
        Ok(Shares::new(&weights)?)
    }

    /// The tokenizer, which must be the one the tokens were made with, and where the tokens are.
    pub fn open(self, home: &Path, given: Option<&Path>) -> Result<(Tokenizer, Vec<Made>), TrainError> {
        let from = given.unwrap_or(home);
        let tokenizer = Tokenizer::load(from)?;
        let (expected, found) = (&self.tokenizer, format!("{:016x}", tokenizer.fingerprint()));
        if *expected != found {
            let what =
                format!("expected tokenizer {expected}, which the tokens of this run were made with, found {found}");
            return Err(bad(&from.join("tokenizer.json"), what));
        }
        let made = self.sources.into_iter().map(|s| {
            let source = u64::from_str_radix(&s.fingerprint, 16);
            let source = source.map_err(|e| bad(&home.join(FILE), format!("fingerprint {}: {e}", s.fingerprint)))?;
            let identity = Identity { tokenizer: tokenizer.fingerprint(), source };
            Ok(Made { name: s.name, directory: home.join(s.directory), identity })
        });
        let made = made.collect::<Result<_, TrainError>>()?;
        Ok((tokenizer, made))
    }
}
