//! Where the text comes from.

use crate::prepare::VALID_FRACTION;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[data]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// Text files; none takes the built-in corpus.
    pub paths: Option<Vec<PathBuf>>,
    /// A tokenizer.json or a directory with one; none trains one on the text.
    pub tokenizer: Option<PathBuf>,
    /// Share of the documents held out for validation.
    pub valid_fraction: Option<f64>,
}

impl DataSettings {
    /// Every path, for whoever knows what it is relative to.
    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.paths.iter_mut().flatten().chain(&mut self.tokenizer)
    }

    /// With the defaults in the place of what is absent.
    pub(super) fn resolved(self) -> Self {
        Self { valid_fraction: Some(self.valid_fraction.unwrap_or(VALID_FRACTION)), ..self }
    }
}
