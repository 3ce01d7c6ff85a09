//! Reading a published tokenizer.

use std::path::Path;

use serde_json::Value;

use super::check::check;
use super::{Tokenizer, why_unusable};
use crate::DataError;
use crate::error::printable;

/// Largest file that is read; the largest published ones have about 35 MB. A value in memory takes some twenty times as
/// much at the worst.
const MAX_BYTES: u64 = 1 << 26;

pub(super) fn load(path: &Path) -> Result<Tokenizer, DataError> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    let broken = |reason: String| DataError::Tokenizer { path: file.clone(), reason };
    let json = read_json(&file)?;
    check(&json).map_err(broken)?;
    let added = added_tokens(&json);
    let mut inner: tokenizers::Tokenizer =
        serde_json::from_value(json).map_err(|e| broken(printable(&e.to_string())))?;
    // Left in files by programs that used them; they would cut a text short or lengthen it.
    inner.with_truncation(None).map_err(|e| broken(printable(&e.to_string())))?.with_padding(None);
    if let Some(reason) = why_unusable(&inner) {
        return Err(broken(reason));
    }
    // The crate numbers added tokens itself.
    for (content, id) in added {
        let found = inner.token_to_id(&content);
        if found != Some(id) {
            let found = found.map_or("none".to_string(), |id| id.to_string());
            let (content, place) = (printable(&content), "the id that follows from its place and the vocabulary");
            return Err(broken(format!("added token \"{content}\": expected {place}, {found}, found {id}")));
        }
    }
    let config_path = file.with_file_name("tokenizer_config.json");
    let config = if config_path.exists() { read_object(&config_path)? } else { Value::Null };
    let mut ids = [None; 3];
    for (id, key) in ids.iter_mut().zip(["bos_token", "eos_token", "pad_token"]) {
        *id = token_id(&inner, &config_path, &config, key)?;
    }
    Ok(Tokenizer::new(inner, ids[0], ids[1], ids[2]))
}

/// Spelling and id of the added tokens of a checked file.
fn added_tokens(json: &Value) -> Vec<(String, u32)> {
    let tokens = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let token = |t: &Value| Some((t["content"].as_str()?.to_owned(), u32::try_from(t["id"].as_u64()?).ok()?));
    tokens.iter().filter_map(token).collect()
}

fn read_json(path: &Path) -> Result<Value, DataError> {
    let broken = |reason| DataError::Tokenizer { path: path.to_owned(), reason };
    let size = std::fs::metadata(path).map_err(DataError::read(path))?.len();
    if size > MAX_BYTES {
        return Err(broken(format!("expected at most {MAX_BYTES} bytes, found {size}")));
    }
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    serde_json::from_slice(&bytes).map_err(|e| broken(printable(&e.to_string())))
}

/// Anything but an object would name no tokens, and the end of a document would be lost without a word.
fn read_object(path: &Path) -> Result<Value, DataError> {
    let found = match read_json(path)? {
        object @ Value::Object(_) => return Ok(object),
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
    };
    let reason = format!("expected a JSON object, found {found}");
    Err(DataError::Tokenizer { path: path.to_owned(), reason })
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
        reason: format!("{key}: expected the spelling of a token of the vocabulary, found \"{}\"", printable(name)),
    };
    inner.token_to_id(name).map(Some).ok_or_else(missing)
}
