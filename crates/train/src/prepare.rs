//! From text to what a run reads: documents, their split, tokenizer, token streams.

use crate::TrainError;
use crate::pretrain::{Observer, Run};
use hadal_data::{DataError, Loader, TokenStream, Tokenizer, corpus};
use hadal_kernels::{Ctx, Device};
use hadal_model::ModelConfig;
use std::path::{Path, PathBuf};

/// Held-out share of the documents unless said otherwise.
pub(crate) const VALID_FRACTION: f64 = 0.05;

/// Held-out documents whose beginnings a finished run continues, and how much of each it is given.
const PROMPTS: usize = 5;
const PROMPT_CHARS: usize = 24;

/// What was made of the text.
pub(crate) struct Prepared {
    pub tokenizer: Tokenizer,
    pub train: Loader,
    pub held: TokenStream,
    pub byte_lengths: Vec<u32>,
    pub prompts: Vec<String>,
}

/// Reads, splits and tokenises the text.
pub(crate) fn prepare(ctx: &Ctx, run: &Run, observer: &mut dyn Observer) -> Result<Prepared, TrainError> {
    let seed = run.config.seed;
    let documents = match run.data.paths.as_deref() {
        Some([]) => {
            return Err(TrainError::Config { what: "data.paths = []: expected at least one text file".into() });
        }
        Some(paths) => {
            observer.phase("reading text");
            corpus::read_text(paths)?
        }
        None => {
            observer.phase("generating the built-in corpus");
            corpus::builtin::documents(seed, corpus::builtin::DEFAULT_BYTES)
        }
    };
    let lacking = |why| TrainError::Corpus { corpus: corpus_name(run.data.paths.as_deref()), why };
    let fraction = run.data.valid_fraction.unwrap_or(VALID_FRACTION);
    let split = hadal_data::split(documents.len(), fraction, seed).map_err(|e| match e {
        DataError::Fraction(x) => {
            TrainError::Config { what: format!("data.valid_fraction = {x}: expected a number above 0 and below 1") }
        }
        other => lacking(other),
    })?;
    let pick = |side: &[usize]| -> Vec<&str> { side.iter().map(|&i| documents[i].as_ref()).collect() };
    let (train, held) = (pick(&split.train), pick(&split.validation));
    let Device::Cpu(cpu) = &ctx.device;
    let prompts = beginnings(&held);
    let tokenizer = match &run.data.tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => {
            observer.phase("training a byte-level BPE tokenizer");
            let trained = cpu.install(|| Tokenizer::train(&train, run.model.vocab_size)).map_err(lacking)?;
            let (found, wanted) = (trained.vocab_size(), run.model.vocab_size);
            if found < wanted {
                observer.phase(&format!(
                    "the text supports {found} of {wanted} token ids; the rest of the vocabulary stays unused"
                ));
            }
            trained
        }
    };
    if let Some(path) = &run.data.tokenizer {
        check_tokenizer(path, &tokenizer, &run.model)?;
    }
    observer.phase("tokenising");
    let streams = cpu.install(|| Ok((TokenStream::new(&tokenizer, &train)?, TokenStream::new(&tokenizer, &held)?)));
    let (train, held) = streams.map_err(lacking)?;
    let train = Loader::new(train, run.config.seq, seed).map_err(lacking)?;
    let byte_lengths = tokenizer.token_byte_lengths();
    Ok(Prepared { tokenizer, train, held, byte_lengths, prompts })
}

/// The first words of documents spread over the held-out side.
fn beginnings(held: &[&str]) -> Vec<String> {
    let step = held.len().div_ceil(PROMPTS);
    held.iter().step_by(step).map(|d| d.trim_start().chars().take(PROMPT_CHARS).collect()).collect()
}

/// The text as messages name it.
fn corpus_name(paths: Option<&[PathBuf]>) -> String {
    match paths {
        None | Some([]) => "built-in corpus".into(),
        Some([one]) => one.display().to_string(),
        Some([first, rest @ ..]) => format!("{} and {} more", first.display(), rest.len()),
    }
}

/// A tokenizer may have fewer ids than the model (published vocabularies are padded), never more; and documents must
/// end.
fn check_tokenizer(path: &Path, tokenizer: &Tokenizer, model: &ModelConfig) -> Result<(), TrainError> {
    let bad = |what: String| Err(TrainError::Io { path: path.display().to_string(), what });
    let (found, expected) = (tokenizer.vocab_size(), model.vocab_size);
    if found > expected {
        return bad(format!(
            "tokenizer and model disagree: expected at most vocab_size = {expected} ids, found {found}"
        ));
    }
    if tokenizer.eos().is_none() {
        return bad(DataError::NoEos.to_string());
    }
    Ok(())
}

/// The model of a run learns which tokens begin and end a text from its tokenizer.
pub(crate) fn with_special_tokens(mut model: ModelConfig, tokenizer: &Tokenizer) -> ModelConfig {
    model.bos_token_id = tokenizer.bos();
    model.eos_token_ids = tokenizer.eos().into_iter().collect();
    model
}
