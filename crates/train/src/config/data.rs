//! Where the text comes from.

use serde::Deserialize;
use std::path::PathBuf;

/// `[data]`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// Text files; none takes the built-in corpus.
    pub paths: Option<Vec<PathBuf>>,
    /// A tokenizer.json or a directory with one; none trains one on the text.
    pub tokenizer: Option<PathBuf>,
    /// Share of the documents held out for validation.
    pub valid_fraction: Option<f64>,
}
