//! Where the text comes from.

use crate::TrainError;
use hadal_data::corpus::{Files, Format, InvalidUtf8, Source, builtin};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Held-out share of the documents unless said otherwise.
pub(crate) const VALID_FRACTION: f64 = 0.05;
/// Longest name of a source that can be given; a made one is half as long.
const MAX_NAME: usize = 64;

/// `[data]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// Files, folders, globs; without these and `sources` the built-in corpus.
    pub paths: Option<Vec<PathBuf>>,
    /// What to leave out of folders and globs, as lines of a .gitignore.
    pub ignore: Option<Vec<String>>,
    /// "text" or "jsonl"; without it by extension.
    pub format: Option<String>,
    /// The key that holds the text of a JSON line.
    pub field: Option<String>,
    /// "error", "replace" or "skip".
    pub invalid_utf8: Option<String>,
    /// A tokenizer.json or a directory with one; none trains one on the text.
    pub tokenizer: Option<PathBuf>,
    /// Share of the documents held out for validation.
    pub valid_fraction: Option<f64>,
    /// Directory of token shards to share between runs; without it they lie in the run's own.
    pub cache: Option<PathBuf>,
    /// Several sources, in the place of `paths`.
    pub sources: Option<Vec<SourceSettings>>,
}

/// `[[data.sources]]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SourceSettings {
    /// What messages and files call it; without it made from the first path.
    pub name: Option<String>,
    /// The generated corpus, in the place of `paths`.
    pub builtin: Option<bool>,
    /// Files, folders, globs.
    pub paths: Option<Vec<PathBuf>>,
    /// What to leave out of folders and globs, as lines of a .gitignore.
    pub ignore: Option<Vec<String>>,
    /// "text" or "jsonl"; without it by extension.
    pub format: Option<String>,
    /// The key that holds the text of a JSON line.
    pub field: Option<String>,
    /// "error", "replace" or "skip".
    pub invalid_utf8: Option<String>,
    /// Share of the samples, relative to the other sources'.
    pub weight: Option<f64>,
    /// Share of its documents held out for validation.
    pub valid_fraction: Option<f64>,
}

/// A source with all its values.
#[derive(Clone, Debug)]
pub(crate) struct NamedSource {
    pub name: String,
    pub source: Source,
    pub weight: Option<f64>,
    pub valid_fraction: f64,
}

fn bad<T>(what: String) -> Result<T, TrainError> {
    Err(TrainError::Config { what })
}

impl DataSettings {
    /// Every path, for whoever knows what it is relative to.
    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let sources = self.sources.iter_mut().flatten().flat_map(|s| s.paths.iter_mut().flatten());
        self.paths.iter_mut().flatten().chain(&mut self.tokenizer).chain(&mut self.cache).chain(sources)
    }

    /// With the defaults in the place of what is absent.
    pub(super) fn resolved(self) -> Self {
        Self { valid_fraction: Some(self.valid_fraction.unwrap_or(VALID_FRACTION)), ..self }
    }

    /// The sources; `seed` is that of the generated corpus.
    pub(crate) fn sources(&self, seed: u64) -> Result<Vec<NamedSource>, TrainError> {
        let alone = SourceSettings {
            paths: self.paths.clone(),
            ignore: self.ignore.clone(),
            format: self.format.clone(),
            field: self.field.clone(),
            invalid_utf8: self.invalid_utf8.clone(),
            ..SourceSettings::default()
        };
        let fraction = fraction("data", self.valid_fraction)?.unwrap_or(VALID_FRACTION);
        let Some(sources) = &self.sources else {
            let alone = SourceSettings { builtin: self.paths.is_none().then_some(true), ..alone };
            return Ok(vec![alone.resolve("data", seed, fraction)?]);
        };
        if alone != SourceSettings::default() {
            let key = if self.paths.is_some() { "paths" } else { "ignore, format, field, invalid_utf8" };
            return bad(format!("data.{key}: expected it in [[data.sources]], as these are given, found it in [data]"));
        }
        match sources.as_slice() {
            [] => return bad("data.sources = []: expected at least one source".into()),
            [one] if one.weight.is_some() => {
                return bad("data.sources[0].weight has no effect: there is no other source".into());
            }
            _ => {}
        }
        let all = sources.iter().enumerate().map(|(i, s)| s.resolve(&format!("data.sources[{i}]"), seed, fraction));
        unique(all.collect::<Result<_, _>>()?)
    }
}

impl SourceSettings {
    /// `key` is what messages call this table.
    fn resolve(&self, key: &str, seed: u64, fraction_of_all: f64) -> Result<NamedSource, TrainError> {
        let source = match (self.builtin.unwrap_or(false), self.paths.as_deref()) {
            (true, None) => self.generated(key, seed)?,
            (true, Some(_)) => return bad(format!("{key}: expected either builtin = true or paths, found both")),
            (false, None) => return bad(format!("{key}: expected paths or builtin = true, found neither")),
            (false, Some([])) => return bad(format!("{key}.paths = []: expected at least one text file")),
            (false, Some(paths)) => Source::Files(self.files(key, paths)?),
        };
        if let Some(w) = self.weight.filter(|w| !(w.is_finite() && *w > 0.0)) {
            return bad(format!("{key}.weight = {w}: expected a finite number above 0"));
        }
        let name = match &self.name {
            Some(name) => checked(key, name)?,
            None => default_name(self.paths.as_deref()),
        };
        let valid_fraction = fraction(key, self.valid_fraction)?.unwrap_or(fraction_of_all);
        Ok(NamedSource { name, source, weight: self.weight, valid_fraction })
    }

    fn generated(&self, key: &str, seed: u64) -> Result<Source, TrainError> {
        let given = [
            ("ignore", self.ignore.is_some()),
            ("format", self.format.is_some()),
            ("field", self.field.is_some()),
            ("invalid_utf8", self.invalid_utf8.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((name, _)) => bad(format!("{key}.{name} has no effect: the built-in corpus is not read from files")),
            None => Ok(Source::Builtin { seed, bytes: builtin::DEFAULT_BYTES }),
        }
    }

    fn files(&self, key: &str, paths: &[PathBuf]) -> Result<Files, TrainError> {
        let format = match self.format.as_deref() {
            None => None,
            Some("text") => Some(Format::Text),
            Some("jsonl") => Some(Format::Jsonl),
            Some(other) => return bad(format!("{key}.format = \"{other}\": expected \"text\" or \"jsonl\"")),
        };
        let invalid = match self.invalid_utf8.as_deref() {
            None | Some("error") => InvalidUtf8::Error,
            Some("replace") => InvalidUtf8::Replace,
            Some("skip") => InvalidUtf8::Skip,
            Some(other) => {
                return bad(format!("{key}.invalid_utf8 = \"{other}\": expected \"error\", \"replace\" or \"skip\""));
            }
        };
        let ignore = self.ignore.clone().unwrap_or_default();
        Ok(Files { paths: paths.to_vec(), ignore, format, field: self.field.clone(), invalid })
    }
}

fn fraction(key: &str, given: Option<f64>) -> Result<Option<f64>, TrainError> {
    match given {
        Some(x) if !(x > 0.0 && x < 1.0) => {
            bad(format!("{key}.valid_fraction = {x}: expected a number above 0 and below 1"))
        }
        other => Ok(other),
    }
}

/// Directories have this name.
fn usable(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

fn checked(key: &str, name: &str) -> Result<String, TrainError> {
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.chars().all(usable) {
        let expected = format!("1 to {MAX_NAME} letters, digits, \".\", \"_\" and \"-\", the first not \".\"");
        return bad(format!("{key}.name = \"{name}\": expected {expected}"));
    }
    Ok(name.to_string())
}

/// From the last part of the first path that is no pattern.
fn default_name(paths: Option<&[PathBuf]>) -> String {
    let Some([first, ..]) = paths else { return "builtin".into() };
    let plain = |p: &&Path| !p.as_os_str().is_empty() && !p.to_string_lossy().contains(['*', '?', '[', '{']);
    let stem = first.ancestors().find(plain).and_then(Path::file_stem).unwrap_or_default().to_string_lossy();
    let name: String = stem.chars().map(|c| if usable(c) { c } else { '-' }).take(MAX_NAME / 2).collect();
    let name = name.trim_start_matches(['.', '-']);
    if name.is_empty() { "text".into() } else { name.into() }
}

/// Names that meet are numbered.
fn unique(mut sources: Vec<NamedSource>) -> Result<Vec<NamedSource>, TrainError> {
    for i in 1..sources.len() {
        let taken = |name: &str, before: &[NamedSource]| before.iter().any(|s| s.name == name);
        let (before, rest) = sources.split_at_mut(i);
        let name = rest[0].name.clone();
        let mut n = 2;
        while taken(&rest[0].name, before) {
            rest[0].name = format!("{name}-{n}");
            n += 1;
        }
    }
    Ok(sources)
}
