//! `hadal tokenizer`: training, using and looking at tokenizers, without a model.

use crate::output::Output;
use crate::{Global, Uses, open};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use hadal_data::Tokenizer;
use hadal_data::corpus::{self, Files, InvalidUtf8, Source, Survey, builtin};
use serde::Serialize;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Options of `tokenizer`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal tokenizer train --data books/ 'notes/**/*.md' --vocab-size 32000 --out my-tokenizer
  hadal tokenizer encode my-tokenizer 'Once upon a time'
  hadal tokenizer encode first-run --file story.txt | hadal tokenizer decode first-run
  hadal tokenizer inspect first-run --data book.txt code/")]
pub struct TokenizerVerb {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Train a byte-level BPE on text; of more than 64 MiB, on a sample.
    Train(Train),
    /// Print the token ids of a text.
    Encode(Encode),
    /// Print the text of token ids.
    Decode(Decode),
    /// Print what a tokenizer holds, and how many bytes of text its tokens stand for.
    Inspect(InspectTokenizer),
}

/// Text to read.
#[derive(Args)]
struct Text {
    /// Text: files, folders, globs; .jsonl and .ndjson hold a JSON object a line. Without it, the built-in corpus.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Option<Vec<PathBuf>>,
    /// The key that holds the text of a JSON line `[default: text]`.
    #[arg(long, value_name = "NAME", requires = "data")]
    field: Option<String>,
    /// What to leave out of folders and globs, as lines of a .gitignore.
    #[arg(long, value_name = "PATTERN", requires = "data")]
    ignore: Vec<String>,
    /// Bytes that are not UTF-8: error, replace (by U+FFFD) or skip (the document).
    #[arg(long, value_name = "POLICY", default_value = "error")]
    invalid_utf8: String,
}

#[derive(Args)]
struct Train {
    #[command(flatten)]
    text: Text,
    /// Token ids: 10 special tokens, 256 bytes, and merges.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    vocab_size: usize,
    /// Directory for tokenizer.json and tokenizer_config.json; files of these names are not replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Args)]
struct Encode {
    /// A model or run directory, or a tokenizer.json or a directory with one.
    #[arg(value_name = "MODEL_OR_TOKENIZER")]
    tokenizer: PathBuf,
    /// The text; without it and --file, stdin.
    #[arg(conflicts_with = "file")]
    text: Option<String>,
    /// A file with the text.
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,
}

#[derive(Args)]
struct Decode {
    /// A model or run directory, or a tokenizer.json or a directory with one.
    #[arg(value_name = "MODEL_OR_TOKENIZER")]
    tokenizer: PathBuf,
    /// Token ids; without any, those on stdin, apart by white space or commas.
    #[arg(value_name = "ID")]
    ids: Vec<String>,
}

#[derive(Args)]
struct InspectTokenizer {
    /// A model or run directory, or a tokenizer.json or a directory with one.
    #[arg(value_name = "MODEL_OR_TOKENIZER")]
    tokenizer: PathBuf,
    #[command(flatten)]
    text: Text,
}

/// Text that a tokenizer is trained on at most.
const TRAINING_TEXT: u64 = 64 << 20;
/// Text that `inspect` tokenises at most, a path.
const INSPECTED_TEXT: u64 = 16 << 20;
/// Longest tokens that `inspect` shows.
const LONGEST: usize = 10;

impl TokenizerVerb {
    /// Its name, and which of --threads and --seed it has a use for.
    pub fn uses(&self) -> Uses {
        match &self.verb {
            Verb::Train(v) => ("tokenizer train --data", true, v.text.data.is_none(), false),
            Verb::Encode(_) => ("tokenizer encode", false, false, false),
            Verb::Decode(_) => ("tokenizer decode", false, false, false),
            Verb::Inspect(v) => ("tokenizer inspect", v.text.data.is_some(), v.text.data.is_none(), false),
        }
    }

    /// Does it.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        match &self.verb {
            Verb::Train(v) => v.run(global, out),
            Verb::Encode(v) => v.run(out),
            Verb::Decode(v) => v.run(out),
            Verb::Inspect(v) => v.run(global, out),
        }
    }
}

/// The tokenizer of a model, a run, or alone.
fn load(path: &Path) -> anyhow::Result<Tokenizer> {
    if path.is_dir() && !path.join("tokenizer.json").exists() {
        return Ok(Tokenizer::load(open::resolve(path)?)?);
    }
    Ok(Tokenizer::load(path)?)
}

impl Text {
    /// The source that these paths are.
    fn source(&self, paths: &[PathBuf]) -> anyhow::Result<Source> {
        let invalid = match self.invalid_utf8.as_str() {
            "error" => InvalidUtf8::Error,
            "replace" => InvalidUtf8::Replace,
            "skip" => InvalidUtf8::Skip,
            other => bail!("--invalid-utf8 {other}: expected error, replace or skip"),
        };
        let (ignore, field) = (self.ignore.clone(), self.field.clone());
        Ok(Source::Files(Files { paths: paths.to_vec(), ignore, format: None, field, invalid }))
    }
}

/// Reads a source, and says what of it is left out.
fn survey(source: &Source, global: &Global, out: &Output) -> anyhow::Result<Survey> {
    let ctx = global.host()?;
    let survey = ctx.host().install(|| Survey::new(source))?;
    let skipped = survey.skipped().to_string();
    if !skipped.is_empty() {
        out.warn(&format!("{}: {skipped}", source.describe()));
    }
    Ok(survey)
}

impl Train {
    fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let path = self.out.join(name);
            if path.exists() {
                bail!("{}: expected a directory without a tokenizer, found one", path.display());
            }
        }
        let source = match &self.text.data {
            Some(paths) => self.text.source(paths)?,
            None => Source::Builtin { seed: global.seed.unwrap_or(0), bytes: builtin::DEFAULT_BYTES },
        };
        let survey = survey(&source, global, out)?;
        let text = corpus::sample(&[(&survey, None)], TRAINING_TEXT)?;
        let ctx = global.host()?;
        let trained = ctx.host().install(|| Tokenizer::train(&text, self.vocab_size)).context("--vocab-size")?;
        let (ids, bytes) = (trained.vocab_size(), text.iter().map(String::len).sum::<usize>());
        if ids < self.vocab_size {
            out.warn(&format!("the text supports {ids} of {} token ids", self.vocab_size));
        }
        trained.save(&self.out)?;
        out.object(&serde_json::json!({ "tokenizer": self.out, "vocab_size": ids, "text_bytes": bytes }));
        out.text(&format!("{}: {ids} token ids from {bytes} bytes of text\n", self.out.display()));
        Ok(())
    }
}

impl Encode {
    fn run(&self, out: &Output) -> anyhow::Result<()> {
        let tokenizer = load(&self.tokenizer)?;
        let text = match (&self.text, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
            (None, None) => stdin()?,
        };
        let ids = tokenizer.encode(&text);
        out.object(&serde_json::json!({ "ids": ids, "bytes": text.len() }));
        let line: Vec<String> = ids.iter().map(u32::to_string).collect();
        out.text(&(line.join(" ") + "\n"));
        Ok(())
    }
}

fn stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("stdin")?;
    Ok(text)
}

impl Decode {
    fn run(&self, out: &Output) -> anyhow::Result<()> {
        let tokenizer = load(&self.tokenizer)?;
        let given = if self.ids.is_empty() { stdin()? } else { self.ids.join(" ") };
        let size = tokenizer.vocab_size();
        let words = given.split(|c: char| c.is_whitespace() || c == ',').filter(|w| !w.is_empty());
        let id = |word: &str| match word.parse::<u32>() {
            Ok(id) if (id as usize) < size => Ok(id),
            _ => bail!("expected token ids from 0 to {}, found \"{word}\"", size - 1),
        };
        let ids = words.map(id).collect::<anyhow::Result<Vec<u32>>>()?;
        let text = tokenizer.decode(&ids, false);
        out.object(&serde_json::json!({ "text": text }));
        // To a pipe exactly the text, so that it is what was encoded; a prompt wants a line of its own.
        let end = if std::io::stdout().is_terminal() && !text.ends_with('\n') { "\n" } else { "" };
        out.text(&(text + end));
        Ok(std::io::stdout().flush()?)
    }
}

/// What `inspect` found.
#[derive(Serialize)]
struct Report {
    tokenizer: PathBuf,
    vocab_size: usize,
    merges: usize,
    fingerprint: String,
    special_tokens: Vec<Token>,
    longest_tokens: Vec<Token>,
    text: Vec<Measured>,
}

#[derive(Serialize)]
struct Token {
    id: u32,
    text: String,
}

/// How well a text is compressed.
#[derive(Serialize)]
struct Measured {
    text: String,
    bytes: u64,
    tokens: u64,
    bytes_per_token: f64,
}

impl InspectTokenizer {
    fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let tokenizer = load(&self.tokenizer)?;
        let text = match &self.text.data {
            Some(paths) => self.given(&tokenizer, paths, global, out)?,
            None => generated(&tokenizer, global.seed.unwrap_or(0)),
        };
        let token = |(id, text)| Token { id, text };
        let report = Report {
            tokenizer: self.tokenizer.clone(),
            vocab_size: tokenizer.vocab_size(),
            merges: tokenizer.merges(),
            fingerprint: format!("{:016x}", tokenizer.fingerprint()),
            special_tokens: tokenizer.special_tokens().into_iter().map(token).collect(),
            longest_tokens: tokenizer.longest_tokens(LONGEST).into_iter().map(token).collect(),
            text,
        };
        out.object(&report);
        out.text(&report.text());
        Ok(())
    }

    /// Each path is measured apart.
    fn given(
        &self,
        tokenizer: &Tokenizer,
        paths: &[PathBuf],
        global: &Global,
        out: &Output,
    ) -> anyhow::Result<Vec<Measured>> {
        let measure = |path: &PathBuf| {
            let source = self.text.source(std::slice::from_ref(path))?;
            let survey = survey(&source, global, out)?;
            let text = corpus::sample(&[(&survey, None)], INSPECTED_TEXT)?;
            Ok(Measured::new(tokenizer, source.describe(), &text))
        };
        paths.iter().map(measure).collect()
    }
}

/// The kinds of text in the built-in corpus, in the order in which they come first.
fn generated(tokenizer: &Tokenizer, seed: u64) -> Vec<Measured> {
    let mut kinds: Vec<(&str, Vec<String>)> = Vec::new();
    for (i, text) in (0..).zip(builtin::documents(seed, builtin::DEFAULT_BYTES)) {
        let kind = builtin::kind(seed, i);
        match kinds.iter_mut().find(|(name, _)| *name == kind) {
            Some((_, texts)) => texts.push(text),
            None => kinds.push((kind, vec![text])),
        }
    }
    kinds.sort_by_key(|(name, _)| *name);
    kinds.into_iter().map(|(name, texts)| Measured::new(tokenizer, format!("{name} (built-in)"), &texts)).collect()
}

impl Measured {
    fn new(tokenizer: &Tokenizer, name: String, texts: &[String]) -> Self {
        let bytes = texts.iter().map(|t| t.len() as u64).sum();
        let tokens = texts.iter().map(|t| tokenizer.encode(t).len() as u64).sum();
        Self { text: name, bytes, tokens, bytes_per_token: bytes as f64 / (tokens as f64).max(1.0) }
    }
}

impl Report {
    fn text(&self) -> String {
        let line = |name: &str, value: String| format!("{name:<20} {value}\n");
        let tokens =
            |all: &[Token]| all.iter().map(|t| format!("{} {:?}", t.id, t.text)).collect::<Vec<_>>().join(", ");
        let mut s = line("tokenizer", self.tokenizer.display().to_string());
        s += &line("token ids", self.vocab_size.to_string());
        s += &line("merges", self.merges.to_string());
        s += &line("fingerprint", self.fingerprint.clone());
        s += &line("special tokens", tokens(&self.special_tokens));
        s += &line("longest tokens", tokens(&self.longest_tokens));
        s += &format!("{:>15} {:>12} {:>12}  text\n", "bytes a token", "bytes", "tokens");
        for m in &self.text {
            s += &format!("{:>15.3} {:>12} {:>12}  {}\n", m.bytes_per_token, m.bytes, m.tokens, m.text);
        }
        s
    }
}
