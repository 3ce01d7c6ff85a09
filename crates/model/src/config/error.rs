//! What can be wrong with a configuration. Every message is one line: where, which key, what was expected, what was
//! found.

use std::fmt::Display;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: expected a model's configuration that can be read: {why}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        why: std::io::Error,
    },
    /// The file is no JSON object.
    #[error("{path}:{line}:{column}: expected a JSON object: {why}")]
    Json {
        /// The file.
        path: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser said.
        why: String,
    },
    /// A key with a value that cannot be used.
    #[error("{origin}: {key}: expected {expected}, found {found}")]
    Value {
        /// The file or table.
        origin: String,
        /// The key, with its tables.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A key that must be there.
    #[error("{origin}: {key} is missing: expected {expected}")]
    Missing {
        /// The file or table.
        origin: String,
        /// The key, with its tables.
        key: String,
        /// What would be accepted.
        expected: String,
    },
    /// A key that nothing reads.
    #[error("{origin}: unknown key {key}: expected one of {expected}")]
    Unknown {
        /// The table.
        origin: String,
        /// The key, with its tables.
        key: String,
        /// The keys that are read.
        expected: String,
    },
    /// A key that changes nothing with these other keys.
    #[error("{origin}: {key} has no effect: {why}")]
    Ineffective {
        /// The table.
        origin: String,
        /// The key, with its tables.
        key: String,
        /// Which other key makes it so.
        why: String,
    },
}

/// Characters of what a parser says that are shown: it quotes the file, at any length.
const SAID: usize = 300;

/// What the parser said, less the line and column, which the message has already.
pub(super) fn without_position(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let position = format!(" at line {} column {}", e.line(), e.column());
    text.strip_suffix(&position).unwrap_or(&text).chars().take(SAID).collect()
}

impl ConfigError {
    pub(super) fn value(key: &str, expected: impl Display, found: impl Display) -> Self {
        let (key, expected, found) = (key.to_string(), expected.to_string(), found.to_string());
        Self::Value { origin: "model".into(), key, expected, found }
    }

    pub(super) fn missing(key: &str, expected: impl Display) -> Self {
        Self::Missing { origin: "model".into(), key: key.to_string(), expected: expected.to_string() }
    }

    pub(super) fn ineffective(key: &str, why: impl Display) -> Self {
        Self::Ineffective { origin: "model".into(), key: key.to_string(), why: why.to_string() }
    }

    /// The same error, found in `place`.
    pub(super) fn at(mut self, place: &str) -> Self {
        match &mut self {
            Self::Value { origin, .. }
            | Self::Missing { origin, .. }
            | Self::Unknown { origin, .. }
            | Self::Ineffective { origin, .. } => *origin = place.to_string(),
            Self::Read { .. } | Self::Json { .. } => {}
        }
        self
    }
}
