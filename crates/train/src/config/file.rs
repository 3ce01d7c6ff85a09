//! A run by its keys: those of a file, and those that the command line sets above them. What is asked for twice, what
//! nobody reads and what has no effect is an error that names whoever asked.

use super::saved::{Build, SavedBuild};
use super::{DataSettings, Settings, TrainConfig};
use crate::TrainError;
use crate::pretrain::Run;
use hadal_model::config::ConfigError;
use hadal_model::{ModelConfig, preset_sequence};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// A run file: `[model]`, `[data]`, `[train]`, and `[hadal]` if hadal wrote it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// Who wrote it.
    pub(super) hadal: Option<SavedBuild>,
    /// Preset and overriding keys of the model.
    pub model: Option<Table>,
    /// Where the text is.
    #[serde(default)]
    pub data: DataSettings,
    /// How to train.
    #[serde(default)]
    pub train: Settings,
    /// The file as messages name it; empty without one.
    #[serde(skip)]
    name: String,
    /// Keys that were set above the file's, each with whoever asked, as messages name it.
    #[serde(skip)]
    set: Vec<(String, String)>,
}

fn config(what: String) -> TrainError {
    TrainError::Config { what }
}

impl RunFile {
    /// Reads a file. Paths in it are relative to its directory.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(|e| TrainError::read(path, &e))?;
        let said = |e: toml::de::Error| {
            // What the parser objects to begins after so many line ends.
            let line = 1 + e.span().map_or(0, |s| text.bytes().take(s.start).filter(|&b| b == b'\n').count());
            let by = writer(&text).map_or(String::new(), |by| format!(" (the file was written by hadal {by})"));
            config(format!("{}:{line}: {}{by}", path.display(), e.message().replace('\n', " ")))
        };
        // A table first: it has TOML's range of numbers, which is all that a saved run can hold.
        toml::from_str::<Table>(&text).map_err(said)?;
        let mut file: Self = toml::from_str(&text).map_err(said)?;
        file.name = path.display().to_string();
        let name = file.name.clone();
        file.absolute(path.parent().unwrap_or(Path::new("")), &name)?;
        Ok(file)
    }

    /// Sets one key (`train.lr`; `data.sources.0.weight`, counted from 0) above the file's for `asker` (`--lr`). Paths
    /// are relative to the current directory.
    pub fn set(&mut self, key: &str, value: Value, asker: &str) -> Result<(), TrainError> {
        let parts: Vec<&str> = key.split('.').collect();
        if parts.len() < 2 || parts.iter().any(|part| part.is_empty()) {
            return Err(config(format!("{asker}: expected a key of a run file, as train.steps, found \"{key}\"")));
        }
        if let Some((other, first)) = self.set.iter().find(|(k, _)| overlap(k, key)) {
            let of = if other == key { key.to_string() } else { format!("{other} and {key}") };
            return Err(config(format!("{asker} and {first}: expected {of} to be set once")));
        }
        // Alone first, so that a key nobody reads, or a value of another type, is blamed on this asker.
        let refused = |what: &str| config(format!("{asker}: {}", what.replace('\n', " ")));
        let mut alone: Self = alone(&parts, value).try_into().map_err(|e: toml::de::Error| refused(e.message()))?;
        if alone.hadal.is_some() {
            return Err(refused("[hadal] says which program wrote a file, and cannot be set"));
        }
        alone.absolute(Path::new(""), asker)?;
        let value = take(Value::Table(alone.table(asker)?), &parts)
            .ok_or_else(|| refused("expected a value that TOML can hold"))?;
        let mut all = Value::Table(self.table(&self.name)?);
        put(&mut all, "", &parts, value).map_err(|what| refused(&what))?;
        let Self { model, data, train, .. } = all.try_into().map_err(|e: toml::de::Error| refused(e.message()))?;
        (self.model, self.data, self.train) = (model, data, train);
        self.set.push((key.to_string(), asker.to_string()));
        Ok(())
    }

    fn table(&self, asker: &str) -> Result<Table, TrainError> {
        Table::try_from(self).map_err(|e| config(format!("{asker}: {}", e.to_string().trim())))
    }

    /// Makes every path absolute; `asker` is blamed for one that cannot be saved.
    fn absolute(&mut self, base: &Path, asker: &str) -> Result<(), TrainError> {
        for path in self.data.paths_mut().chain(&mut self.train.record_batches) {
            let bad = |why: String| config(format!("{asker}: path {}: {why}", path.display()));
            if path.as_os_str().is_empty() {
                return Err(bad("expected one, found an empty string".into()));
            }
            let whole = std::path::absolute(base.join(&*path)).map_err(|e| bad(e.to_string()))?;
            if whole.to_str().is_none() {
                return Err(bad("expected UTF-8, which a run file can hold".into()));
            }
            *path = whole;
        }
        Ok(())
    }

    /// Every value of the run.
    pub fn resolve(self, out: PathBuf, build: Build) -> Result<Run, TrainError> {
        let model = self.resolve_model()?;
        let mut settings = self.train.clone();
        let preset = self.model.as_ref().and_then(|table| table.get("preset")?.as_str());
        // A preset is trained on sequences of its own length, or of all the positions that a table leaves it.
        let seq = preset.and_then(preset_sequence).map(|n| n.min(model.max_position_embeddings));
        settings.seq = settings.seq.or(seq);
        if self.hadal.is_some() && !self.is_set("train.min_lr") && settings.never_decays() {
            // Nobody asked for it: the file is a resolved run's, and a key set above it took the phase away.
            settings.min_lr = None;
        }
        let config = TrainConfig::resolve(settings, &model).map_err(|e| {
            let what = e.to_string();
            let what = if what.starts_with("train.") { what } else { format!("train.{what}") };
            let key = what["train.".len()..].split(|c: char| !(c.is_alphanumeric() || c == '_')).next();
            self.blame("train.", key, what.clone())
        })?;
        Ok(Run { model, config, data: self.data.resolved(), out, resume: false, override_saved: false, build })
    }

    /// The model alone, by its table.
    pub fn resolve_model(&self) -> Result<ModelConfig, TrainError> {
        let Some(table) = &self.model else {
            return Err(self.blame("", None, "expected a [model] table, found none".into()));
        };
        let read = || {
            if let Some(key) = ["bos_token_id", "eos_token_ids"].into_iter().find(|key| table.contains_key(*key)) {
                let why = "the tokenizer says which tokens these are".into();
                return Err(ConfigError::Ineffective { origin: "[model]".into(), key: key.into(), why });
            }
            // Read back as it will be saved: fields without a use have the values that they will have after a resume.
            ModelConfig::from_toml_table(&super::saved::model(&ModelConfig::from_toml_table(table)?))
        };
        read().map_err(|e| self.blame("model.", key_of(&e), e.to_string()))
    }

    fn is_set(&self, key: &str) -> bool {
        self.set.iter().any(|(set, _)| set == key)
    }

    /// The error, with whoever set the key, or the file.
    fn blame(&self, table: &str, key: Option<&str>, what: String) -> TrainError {
        let key = key.map(|key| format!("{table}{key}"));
        let asker = key.and_then(|key| self.set.iter().find(|(set, _)| overlap(set, &key)));
        let asker = asker.map_or(&self.name, |(_, asker)| asker);
        config(if asker.is_empty() { what } else { format!("{asker}: {what}") })
    }
}

/// The release that wrote a file, as far as the file is TOML.
fn writer(text: &str) -> Option<String> {
    let table: Table = text.parse().ok()?;
    Some(table.get("hadal")?.get("version")?.as_str()?.to_string())
}

/// The key that an error of a model's configuration is about.
fn key_of(e: &ConfigError) -> Option<&str> {
    match e {
        ConfigError::Value { key, .. }
        | ConfigError::Missing { key, .. }
        | ConfigError::Unknown { key, .. }
        | ConfigError::Ineffective { key, .. } => Some(key),
        ConfigError::Read { .. } | ConfigError::Json { .. } => None,
    }
}

/// True if the keys are the same, or one is a table with the other in it.
fn overlap(a: &str, b: &str) -> bool {
    let within = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    within(a, b) || within(b, a)
}

/// The number of an item of a list, as a part of a key.
fn index(part: &str) -> Option<usize> {
    // As it is printed, so that an item has one name.
    part.parse().ok().filter(|i: &usize| i.to_string() == part)
}

/// The value at its key with nothing beside it. A list has one item, whichever its number is.
fn alone(key: &[&str], value: Value) -> Value {
    key.iter().rev().fold(value, |inner, part| match index(part) {
        Some(_) => Value::Array(vec![inner]),
        None => Value::Table(Table::from_iter([((*part).to_string(), inner)])),
    })
}

/// Writes a value into nested tables, and lists that have the item already. `whole` is the key of `at`.
fn put(at: &mut Value, whole: &str, key: &[&str], value: Value) -> Result<(), String> {
    let Some((part, rest)) = key.split_first() else {
        *at = value;
        return Ok(());
    };
    let below = if whole.is_empty() { (*part).to_string() } else { format!("{whole}.{part}") };
    let next = match (at, index(part)) {
        (Value::Table(t), None) => t.entry(*part).or_insert_with(|| Value::Table(Table::new())),
        (Value::Array(list), Some(i)) => {
            let found = list.len();
            list.get_mut(i).ok_or_else(|| {
                format!("{whole}: expected a list with an item {i}, found {found} items, numbered from 0")
            })?
        }
        (Value::Table(t), Some(i)) if t.is_empty() => {
            return Err(format!("{whole}: expected a list with an item {i}, found none"));
        }
        (other, Some(_)) => return Err(format!("{whole}: expected a list, found a {}", other.type_str())),
        (other, None) => return Err(format!("{whole}: expected a table, found a {}", other.type_str())),
    };
    put(next, &below, rest, value)
}

/// Takes out the value that [`alone`] put there.
fn take(value: Value, key: &[&str]) -> Option<Value> {
    let Some((part, rest)) = key.split_first() else { return Some(value) };
    match value {
        Value::Table(mut table) => take(table.remove(*part)?, rest),
        Value::Array(list) => take(list.into_iter().next()?, rest),
        _ => None,
    }
}
