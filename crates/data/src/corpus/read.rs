//! The documents of one file.

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use super::cut::Cutter;
use super::lines::Lines;
use super::{Files, Format, InvalidUtf8};
use crate::DataError;

/// A longer line of text is cut into pieces that count as lines, so that a file without line ends needs no memory of
/// its size.
const TEXT_LINE: usize = 4 << 20;
/// A longer line of JSON is refused.
const JSON_LINE: usize = 256 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How to read a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reading {
    format: Format,
    field: String,
    invalid: InvalidUtf8,
}

/// What was met in a file, beside its documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// XXH3 of the file.
    pub hash: u64,
    /// Documents given.
    pub documents: u64,
    /// Their bytes.
    pub text_bytes: u64,
    /// Places where U+FFFD stands for bytes that are not UTF-8.
    pub replaced: u64,
    /// Documents left out for such bytes.
    pub dropped: u64,
}

/// Takes documents.
type Sink<'a> = &'a mut dyn FnMut(&str) -> Result<(), DataError>;

/// A line after the policy on invalid bytes.
enum Line<'a> {
    Good(Cow<'a, str>),
    Bad,
}

impl Reading {
    /// How `files` want `path` read.
    pub fn new(files: &Files, path: &Path) -> Self {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let by_name = if ["jsonl", "ndjson"].contains(&extension.as_str()) { Format::Jsonl } else { Format::Text };
        let field = files.field.clone().unwrap_or_else(|| "text".into());
        Self { format: files.format.unwrap_or(by_name), field, invalid: files.invalid }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// Whatever changes what the file's documents are.
    pub fn fingerprint(&self) -> String {
        match self.format {
            Format::Text => format!("text {:?}", self.invalid),
            Format::Jsonl => format!("jsonl {:?} {:?}", self.field, self.invalid),
        }
    }

    /// Gives the documents of `path` to `f`, one at a time, in order.
    pub fn documents(&self, path: &Path, f: Sink) -> Result<Tally, DataError> {
        let mut tally = Tally::default();
        let mut lines = Lines::open(path).map_err(DataError::read(path))?;
        match self.format {
            Format::Text => self.text(path, &mut lines, &mut tally, f)?,
            Format::Jsonl => self.jsonl(path, &mut lines, &mut tally, f)?,
        }
        tally.hash = lines.hash();
        Ok(tally)
    }

    fn text(&self, path: &Path, lines: &mut Lines, tally: &mut Tally, f: Sink) -> Result<(), DataError> {
        let mut cutter = Cutter::default();
        while let Some((raw, at)) = next(lines, TEXT_LINE, path)? {
            let piece = match self.decode(path, raw, at.offset, tally)? {
                Line::Good(line) => cutter.line(Some(&line), line.len()),
                Line::Bad => cutter.line(None, raw.len()),
            };
            if let Some(piece) = piece {
                give(piece.text(), piece.spoilt, tally, f)?;
            }
        }
        cutter.finish().try_for_each(|piece| give(piece.text(), piece.spoilt, tally, f))
    }

    fn jsonl(&self, path: &Path, lines: &mut Lines, tally: &mut Tally, f: Sink) -> Result<(), DataError> {
        while let Some((raw, at)) = next(lines, JSON_LINE, path)? {
            let bad = |reason| DataError::Line { path: path.to_owned(), line: at.number, reason };
            if raw.len() >= JSON_LINE {
                return Err(bad(format!("expected at most {JSON_LINE} bytes, found more")));
            }
            match self.decode(path, raw, at.offset, tally)? {
                Line::Bad => tally.dropped += 1,
                Line::Good(line) if line.trim().is_empty() => {}
                Line::Good(line) => give(&field(&line, &self.field).map_err(bad)?, false, tally, f)?,
            }
        }
        Ok(())
    }

    fn decode<'a>(&self, path: &Path, raw: &'a [u8], offset: u64, tally: &mut Tally) -> Result<Line<'a>, DataError> {
        let e = match std::str::from_utf8(raw) {
            Ok(text) => return Ok(Line::Good(Cow::Borrowed(text))),
            Err(e) => e,
        };
        match self.invalid {
            InvalidUtf8::Error => {
                let at = e.valid_up_to();
                Err(DataError::NotUtf8 { path: path.to_owned(), offset: offset + at as u64, byte: raw[at] })
            }
            InvalidUtf8::Replace => {
                tally.replaced += raw.utf8_chunks().filter(|c| !c.invalid().is_empty()).count() as u64;
                Ok(Line::Good(String::from_utf8_lossy(raw)))
            }
            InvalidUtf8::Skip => Ok(Line::Bad),
        }
    }
}

/// Where a line is.
struct At {
    offset: u64,
    number: u64,
}

/// The next line, without a byte order mark at the beginning of the file.
fn next<'a>(lines: &'a mut Lines, most: usize, path: &Path) -> Result<Option<(&'a [u8], At)>, DataError> {
    if !lines.next(most).map_err(DataError::read(path))? {
        return Ok(None);
    }
    let mut at = At { offset: lines.offset, number: lines.number };
    let mut line = lines.line();
    if at.offset == 0
        && let Some(rest) = line.strip_prefix(BYTE_ORDER_MARK)
    {
        line = rest;
        at.offset += BYTE_ORDER_MARK.len() as u64;
    }
    Ok(Some((line, at)))
}

/// Counts a document and gives it on; one that is nothing but white space is none.
fn give(text: &str, spoilt: bool, tally: &mut Tally, f: Sink) -> Result<(), DataError> {
    if spoilt {
        tally.dropped += 1;
        return Ok(());
    }
    if text.trim().is_empty() {
        return Ok(());
    }
    tally.documents += 1;
    tally.text_bytes += text.len() as u64;
    f(text)
}

/// The text of a JSON line.
fn field(line: &str, key: &str) -> Result<String, String> {
    let value = serde_json::from_str(line).map_err(|e| broken(&e))?;
    let Value::Object(mut object) = value else {
        return Err(format!("expected a JSON object, found {}", kind(&value)));
    };
    match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("expected a string in field \"{key}\", found {}", kind(&other))),
        None => Err(format!("expected a field \"{key}\", found {}", names(&object))),
    }
}

/// The line of the file is known; the parser's own is always the first.
fn broken(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    format!("expected a JSON object, found broken JSON at column {}: {what}", e.column())
}

/// What a JSON value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A few of an object's keys.
fn names(object: &serde_json::Map<String, Value>) -> String {
    const SHOWN: usize = 5;
    let quoted: Vec<String> = object.keys().take(SHOWN).map(|k| format!("\"{k}\"")).collect();
    match object.len() {
        0 => "no fields".into(),
        n if n > SHOWN => format!("{} and {} more", quoted.join(", "), n - SHOWN),
        _ => quoted.join(", "),
    }
}
