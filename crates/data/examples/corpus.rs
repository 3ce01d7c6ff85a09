//! Prints documents of the built-in corpus, for reading or for other tools:
//!
//! ```text
//! cargo run -p hadal-data --example corpus -- --kind English --count 3
//! cargo run -p hadal-data --example corpus -- --seed 1 > corpus.txt
//! ```
//!
//! `--kind` is one of English, Chinese, code, arithmetic, puzzles; by default all documents of the default size are
//! printed. `--problems N` prints unseen problems instead, as JSON lines.

use std::io::{BufWriter, Write};

use hadal_data::corpus::builtin;

fn main() -> std::io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1));
    let number = |name: &str| option(name).and_then(|value| value.parse().ok());
    let seed = number("--seed").unwrap_or(0);
    let count = number("--count").map_or(usize::MAX, |n| n as usize);
    let mut out = BufWriter::new(std::io::stdout().lock());
    if let Some(problems) = number("--problems") {
        for p in builtin::problems(seed, problems as usize) {
            let line =
                serde_json::json!({"kind": p.kind, "language": p.language, "prompt": p.prompt, "answer": p.answer});
            writeln!(out, "{line}")?;
        }
        return out.flush();
    }
    let documents = builtin::documents(seed, builtin::DEFAULT_BYTES);
    let wanted = |index: &usize| option("--kind").is_none_or(|kind| kind == builtin::kind(seed, *index as u64));
    for index in (0..documents.len()).filter(wanted).take(count) {
        writeln!(out, "{}\n", documents[index])?;
    }
    out.flush()
}
