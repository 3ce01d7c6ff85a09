//! stdout for people or for machines, and one-line errors. A reader that goes away (a closed pipe) ends the program
//! quietly.

use serde::Serialize;
use std::io::Write;

/// Where results go.
#[derive(Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    /// JSON objects a line, or text.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// True if machines read.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Text for people; nothing in JSON mode.
    pub fn text(&self, text: &str) {
        if !self.json {
            put(text);
        }
    }

    /// An object for machines; nothing in text mode.
    pub fn object(&self, value: &impl Serialize) {
        if self.json {
            match serde_json::to_string(value) {
                Ok(line) => put(&format!("{line}\n")),
                Err(e) => eprintln!("error: a result could not be written as JSON: {e}"),
            }
        }
    }

    /// A remark beside the result.
    pub fn warn(&self, what: &str) {
        eprintln!("warning: {what}");
    }

    /// The end of a failed run: one line, whatever paths and libraries put into it.
    pub fn error(&self, what: &str) {
        let line = what.replace(char::is_control, " ");
        self.object(&serde_json::json!({ "error": line }));
        eprintln!("error: {line}");
    }
}

fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}
