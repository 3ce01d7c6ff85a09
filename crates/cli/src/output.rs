//! stdout for people or for machines, and one-line errors. A reader that goes away (a closed pipe) ends the program
//! quietly, with the exit code that shells give such an end; a run goes on, since its weights are worth more than what
//! it prints.

use serde::Serialize;
use std::io::{ErrorKind, Write};

/// 128 + SIGPIPE.
const PIPE_CLOSED: i32 = 141;

/// Where results go.
#[derive(Clone, Copy)]
pub struct Output {
    json: bool,
    outlives_reader: bool,
}

impl Output {
    /// JSON objects a line, or text. Whether the work goes on when nobody reads any more.
    pub fn new(json: bool, outlives_reader: bool) -> Self {
        Self { json, outlives_reader }
    }

    /// True if machines read.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Text for people; nothing in JSON mode.
    pub fn text(&self, text: &str) {
        if !self.json {
            self.put(text);
        }
    }

    /// An object for machines; nothing in text mode.
    pub fn object(&self, value: &impl Serialize) {
        if self.json {
            match serde_json::to_string(value) {
                Ok(line) => self.put(&format!("{line}\n")),
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
        eprintln!("error: {line}");
        if self.json {
            // The error has been told; that stdout does not take it changes nothing.
            let _ = write(&format!("{}\n", serde_json::json!({ "error": line })));
        }
    }

    fn put(&self, text: &str) {
        match write(text) {
            Ok(()) => {}
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                eprintln!("error: stdout: cannot write: {e}");
                std::process::exit(1);
            }
            Err(_) if self.outlives_reader => {}
            Err(_) => std::process::exit(PIPE_CLOSED),
        }
    }
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}
