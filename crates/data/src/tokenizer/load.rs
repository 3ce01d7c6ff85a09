//! Reading a published tokenizer.

use std::path::Path;

use serde_json::Value;

use super::{Tokenizer, why_unusable};
use crate::DataError;

pub(super) fn load(path: &Path) -> Result<Tokenizer, DataError> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    let bytes = std::fs::read(&file).map_err(DataError::read(&file))?;
    let broken = |reason: String| DataError::Tokenizer { path: file.clone(), reason };
    let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
    if let Some(reason) = why_unusable(&inner) {
        return Err(broken(reason));
    }
    let config_path = file.with_file_name("tokenizer_config.json");
    let config = if config_path.exists() { read_object(&config_path)? } else { Value::Null };
    let mut ids = [None; 3];
    for (id, key) in ids.iter_mut().zip(["bos_token", "eos_token", "pad_token"]) {
        *id = token_id(&inner, &config_path, &config, key)?;
    }
    Ok(Tokenizer::new(inner, ids[0], ids[1], ids[2]))
}

/// Anything but an object would name no tokens, and the end of a document would be lost without a word.
fn read_object(path: &Path) -> Result<Value, DataError> {
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    let broken = |reason| DataError::Tokenizer { path: path.to_owned(), reason };
    let found = match serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()))? {
        object @ Value::Object(_) => return Ok(object),
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
    };
    Err(broken(format!("expected a JSON object, found {found}")))
}

/// The token is named by a string, by an object with `content`, or not at all.
fn token_id(inner: &tokenizers::Tokenizer, path: &Path, config: &Value, key: &str) -> Result<Option<u32>, DataError> {
    let name = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(name)) => name.as_str(),
        Some(other) => other.get("content").and_then(Value::as_str).unwrap_or_default(),
    };
    let missing = || DataError::Tokenizer {
        path: path.to_owned(),
        reason: format!("{key}: expected the spelling of a token of the vocabulary, found \"{name}\""),
    };
    inner.token_to_id(name).map(Some).ok_or_else(missing)
}
