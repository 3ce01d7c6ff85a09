//! What a `tokenizer.json` must be before the `tokenizers` crate sees it. The crate trusts its files: merges that spell
//! no token make it panic, tokens that take the space beside them can overlap, ids it does not like it replaces, and
//! many of its parts lose text. What passes here is byte-level BPE in which any text has ids and every id its text.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use crate::error::printable;

/// Ids may have gaps: one for each token and these. Tables by id are allocated for all of them.
const GAPS: u64 = 1 << 12;
/// Longest pattern of a pre-tokenizer, bytes. The published ones have a few hundred.
const MAX_PATTERN: usize = 1 << 12;

/// Normalizers that give one text for one text and cannot fail.
const NORMALIZERS: &[&str] = &["NFC", "NFD", "NFKC", "NFKD", "Lowercase"];
/// Pre-tokenizers that lose nothing but what `behavior` says.
const SPLITS: &[&str] = &["Split", "Digits", "Punctuation"];
/// What pre-tokenizers may do with a match: all but `Removed`, which loses it.
const BEHAVIORS: &[&str] = &["Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"];
/// Post-processors; what they would add is not asked for.
const PROCESSORS: &[&str] = &["ByteLevel", "TemplateProcessing"];

type Check = Result<(), String>;

/// Says what is wrong with a file, if anything is: the key, what is expected, what is found.
pub(super) fn check(file: &Value) -> Check {
    if !file.is_object() {
        return wrong("the file", "a JSON object", file);
    }
    let tokens = vocab(&file["model"]["vocab"])?;
    model(&file["model"], &tokens)?;
    added(&file["added_tokens"], tokens.len() as u64)?;
    each(&file["normalizer"], "normalizer", "normalizers", NORMALIZERS).map(drop)?;
    pre_tokenizer(&file["pre_tokenizer"])?;
    let processors = each(&file["post_processor"], "post_processor", "processors", PROCESSORS)?;
    processors.into_iter().try_for_each(template)?;
    match file["decoder"]["type"].as_str() {
        Some("ByteLevel") => Ok(()),
        _ => wrong("decoder.type", "\"ByteLevel\"", &file["decoder"]["type"]),
    }
}

fn wrong<T>(key: &str, expected: &str, found: &Value) -> Result<T, String> {
    Err(format!("{key}: expected {expected}, found {}", show(found)))
}

/// A value in a message: short, on one line.
fn show(v: &Value) -> String {
    match v {
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(o) => format!("an object of {}", o.len()),
        Value::String(s) => format!("\"{}\"", printable(s)),
        other => other.to_string(),
    }
}

fn object<'a>(v: &'a Value, key: &str) -> Result<&'a Map<String, Value>, String> {
    v.as_object().map_or_else(|| wrong(key, "an object", v), Ok)
}

/// The tokens by spelling. No two may share an id: which of them a text is decoded to would be chance.
fn vocab(v: &Value) -> Result<HashMap<&str, u64>, String> {
    let tokens = object(v, "model.vocab")?;
    let mut ids = HashSet::with_capacity(tokens.len());
    let mut out = HashMap::with_capacity(tokens.len());
    for (token, id) in tokens {
        let key = || format!("model.vocab.\"{}\"", printable(token));
        let Some(n) = id.as_u64() else { return wrong(&key(), "an id", id) };
        bounded(n, tokens.len() as u64).map_err(|why| format!("{}: {why}", key()))?;
        if !ids.insert(n) {
            return Err(format!("{}: expected an id of its own, found {n}, which another token has", key()));
        }
        out.insert(token.as_str(), n);
    }
    Ok(out)
}

fn bounded(id: u64, tokens: u64) -> Check {
    let most = 2 * tokens + GAPS;
    if id < most { Ok(()) } else { Err(format!("expected ids below {most}, found {id}")) }
}

fn model(v: &Value, tokens: &HashMap<&str, u64>) -> Check {
    let model = object(v, "model")?;
    // Files of the first writers have no type.
    if model.get("type").is_some_and(|t| t != "BPE") {
        return wrong("model.type", "\"BPE\"", &v["type"]);
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if !v[key].is_null() && v[key] != "" {
            return wrong(&format!("model.{key}"), "none in a byte-level model", &v[key]);
        }
    }
    if !v["dropout"].is_null() && v["dropout"].as_f64() != Some(0.0) {
        return wrong("model.dropout", "null or 0", &v["dropout"]);
    }
    let Some(merges) = v["merges"].as_array() else { return wrong("model.merges", "a list", &v["merges"]) };
    let mut both = String::new();
    for (i, merge) in merges.iter().enumerate() {
        let key = || format!("model.merges[{i}]");
        let Some((a, b)) = pair(merge) else { return wrong(&key(), "two tokens", merge) };
        both.clear();
        both.push_str(a);
        both.push_str(b);
        if let Some(missing) = [a, b, both.as_str()].into_iter().find(|t| !tokens.contains_key(t)) {
            let expected = "tokens that the vocabulary has, themselves and together";
            return Err(format!("{}: expected {expected}, found \"{}\"", key(), printable(missing)));
        }
    }
    Ok(())
}

/// A list of two, or as older files have it, one string with a space between.
fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(s) => s.split_once(' ').filter(|(_, b)| !b.contains(' ')),
        Value::Array(a) if a.len() == 2 => Some((a[0].as_str()?, a[1].as_str()?)),
        _ => None,
    }
}

fn added(v: &Value, tokens: u64) -> Check {
    let Some(added) = v.as_array() else {
        return if v.is_null() { Ok(()) } else { wrong("added_tokens", "a list", v) };
    };
    let tokens = tokens + added.len() as u64;
    for (i, token) in added.iter().enumerate() {
        let key = |part: &str| format!("added_tokens[{i}].{part}");
        if token["content"].as_str().is_none_or(str::is_empty) {
            return wrong(&key("content"), "a token", &token["content"]);
        }
        let Some(id) = token["id"].as_u64() else { return wrong(&key("id"), "an id", &token["id"]) };
        bounded(id, tokens).map_err(|why| format!("{}: {why}", key("id")))?;
        for side in ["lstrip", "rstrip"] {
            if token[side] == true {
                return wrong(&key(side), "false (the space beside a token is text)", &token[side]);
            }
        }
    }
    Ok(())
}

/// The parts of a component: none, one, or a flat sequence, each of an allowed type.
fn each<'a>(v: &'a Value, key: &str, list: &str, allowed: &[&str]) -> Result<Vec<&'a Value>, String> {
    let parts = match v {
        Value::Null => return Ok(Vec::new()),
        _ if v["type"] == "Sequence" => match v[list].as_array() {
            Some(parts) => parts.iter().collect(),
            None => return wrong(&format!("{key}.{list}"), "a list", &v[list]),
        },
        one => vec![one],
    };
    for part in &parts {
        if !part["type"].as_str().is_some_and(|t| allowed.contains(&t)) {
            return wrong(&format!("{key}.type"), &format!("one of {}", allowed.join(", ")), &part["type"]);
        }
    }
    Ok(parts)
}

/// Splits that keep the text, then its bytes: without them a character would have no id.
fn pre_tokenizer(v: &Value) -> Check {
    let allowed = [SPLITS, &["ByteLevel"]].concat();
    let parts = each(v, "pre_tokenizer", "pretokenizers", &allowed)?;
    let bytes = parts.iter().filter(|p| p["type"] == "ByteLevel").count();
    let last = parts.last().map_or(&Value::Null, |p| &p["type"]);
    if bytes != 1 || last != "ByteLevel" {
        return wrong("pre_tokenizer", "one \"ByteLevel\", in the last place", last);
    }
    for part in parts {
        let behavior = &part["behavior"];
        if !behavior.is_null() && !behavior.as_str().is_some_and(|b| BEHAVIORS.contains(&b)) {
            return wrong("pre_tokenizer.behavior", &format!("one of {}", BEHAVIORS.join(", ")), behavior);
        }
        let pattern = part["pattern"].as_object().and_then(|p| p.values().next()).and_then(Value::as_str);
        if let Some(n) = pattern.map(str::len).filter(|&n| n > MAX_PATTERN) {
            return Err(format!("pre_tokenizer.pattern: expected at most {MAX_PATTERN} bytes, found {n}"));
        }
    }
    Ok(())
}

/// A template may name tokens to add, but the text once and nothing twice.
fn template(part: &Value) -> Check {
    if part["type"] != "TemplateProcessing" {
        return Ok(());
    }
    let pieces = part["single"].as_array().map_or(&[][..], Vec::as_slice);
    let texts: Vec<_> = pieces.iter().filter_map(|p| p.get("Sequence")).map(|s| &s["id"]).collect();
    if texts.len() == 1 && texts[0] == "A" {
        return Ok(());
    }
    wrong("post_processor.single", "pieces with the sequence \"A\" once", &part["single"])
}
