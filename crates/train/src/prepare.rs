//! From text to what a run reads: the sources, their split, the tokenizer, and the tokens, which are made once and lie
//! on disk. A run that goes on reads what was made for it, whatever has become of the text since.

mod kept;
#[cfg(test)]
mod tests;

use crate::TrainError;
use crate::config::data::NamedSource;
use crate::pretrain::{Observer, Run};
use hadal_data::corpus::{self, Skipped, Source, Survey};
use hadal_data::pack::{Part, Shares, Sides};
use hadal_data::shards::{self, Identity, Job, Stored};
use hadal_data::{DataError, Loader, TokenStream, Tokenizer};
use hadal_files::{Disk, Lock};
use hadal_kernels::Ctx;
use hadal_model::ModelConfig;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Where the data of a run lies in its directory.
const HOME: &str = "data";
/// Held-out documents whose beginnings a finished run continues.
const PROMPTS: usize = 5;
/// Text that a tokenizer is trained on at most; of more, a sample is taken.
const TOKENIZER_TEXT: u64 = 64 << 20;

/// What was made of the text.
pub(crate) struct Prepared {
    pub tokenizer: Tokenizer,
    pub train: Loader,
    pub held: TokenStream,
    pub byte_lengths: Vec<u32>,
    pub prompts: Vec<String>,
    /// Tokens to train on, and held out.
    pub tokens: (u64, u64),
    /// Bytes of text a token stands for, on the training side.
    pub bytes_per_token: f64,
    /// Hash of all tokens: the documents of every source, their split and the tokenizer, in hexadecimal. It says whether
    /// a text is what it was, wherever it lies.
    pub fingerprint: String,
}

/// A source that has been read.
struct Ready {
    named: NamedSource,
    survey: Survey,
    sides: Sides,
}

/// A source whose tokens lie in a directory.
struct Made {
    name: String,
    directory: PathBuf,
    identity: Identity,
}

/// Opens what an earlier start of the same run has prepared, or reads, splits and tokenises the text. `given` is the
/// tokenizer of a run that goes on, in the place of that in the settings.
pub(crate) fn prepare(
    disk: &Disk,
    ctx: &Ctx,
    run: &Run,
    given: Option<&Path>,
    observer: &mut dyn Observer,
) -> Result<Prepared, TrainError> {
    let home = run.out.join(HOME);
    if let Some(kept) = kept::read(&home, run)? {
        observer.phase("opening the tokens of this run");
        let shares = kept.shares()?;
        let (tokenizer, made) = kept.open(&home, given)?;
        restore(ctx, disk, run, &made, &tokenizer, observer)?;
        return open(ctx, run, tokenizer, made, shares);
    }
    let new = !home.exists();
    let prepared = first(disk, ctx, run, given, observer);
    if prepared.is_err() && new && !run.resume {
        // In a directory that was there and empty, the same command is to find nothing again. What led here is the
        // error to report.
        let _ = disk.remove_dir(&home);
    }
    prepared
}

/// Makes everything of the text as it is now.
fn first(
    disk: &Disk,
    ctx: &Ctx,
    run: &Run,
    given: Option<&Path>,
    observer: &mut dyn Observer,
) -> Result<Prepared, TrainError> {
    let home = run.out.join(HOME);
    let sources = run.data.sources(run.config.seed)?;
    let weights: Vec<(&str, Option<f64>)> = sources.iter().map(|s| (s.name.as_str(), s.weight)).collect();
    let shares = Shares::new(&weights)?;
    let weights: Vec<Option<f64>> = sources.iter().map(|s| s.weight).collect();
    let ready = survey(ctx, run.config.seed, (0..).zip(sources), observer)?;
    let tokenizer = tokenizer(ctx, run, given.or(run.data.tokenizer.as_deref()), &ready, observer)?;
    let made = tokenise(ctx, disk, run, &ready, &tokenizer, observer)?;
    let kept = kept::Kept::new(&home, run, &tokenizer, &made, &weights);
    let prepared = open(ctx, run, tokenizer, made, shares).map_err(|e| lacking(&ready, e))?;
    kept.write(disk, &home, &prepared.tokenizer)?;
    Ok(prepared)
}

/// Makes tokens that are gone again, of text that must be what it was.
fn restore(
    ctx: &Ctx,
    disk: &Disk,
    run: &Run,
    made: &[Made],
    tokenizer: &Tokenizer,
    observer: &mut dyn Observer,
) -> Result<(), TrainError> {
    let gone: Vec<&Made> = made.iter().filter(|m| !Stored::is_whole(&m.directory)).collect();
    if gone.is_empty() {
        return Ok(());
    }
    let sources = (0..).zip(run.data.sources(run.config.seed)?);
    let sources = sources.filter(|(_, source)| gone.iter().any(|m| m.name == source.name));
    let ready = survey(ctx, run.config.seed, sources, observer)?;
    for (Ready { named, survey, sides }, m) in ready.iter().zip(gone) {
        let found = Identity::new(survey, sides, tokenizer);
        if found != m.identity {
            let what = format!(
                "{}: the tokens that this run was made of are gone, and the text is another than they were made of: \
                 expected fingerprint {:016x}, found {:016x}",
                named.source.describe(),
                m.identity.source,
                found.source
            );
            return Err(TrainError::Io { path: m.directory.display().to_string(), what });
        }
    }
    tokenise(ctx, disk, run, &ready, tokenizer, observer).map(|_| ())
}

/// An error once the observer asked for an end.
fn go_on(observer: &dyn Observer) -> Result<(), TrainError> {
    if observer.stop() { Err(TrainError::Stopped) } else { Ok(()) }
}

/// Text that reads well and does not suffice, with the name of whose text it is.
fn lacking(ready: &[Ready], e: TrainError) -> TrainError {
    match (e, ready) {
        (TrainError::Data(why @ DataError::TooShort { .. }), [one]) => {
            TrainError::Corpus { corpus: one.named.source.describe(), why }
        }
        (other, _) => other,
    }
}

/// Reads each source, given with its place in the list, once.
fn survey(
    ctx: &Ctx,
    seed: u64,
    sources: impl Iterator<Item = (u64, NamedSource)>,
    observer: &mut dyn Observer,
) -> Result<Vec<Ready>, TrainError> {
    let cpu = ctx.host();
    let mut ready = Vec::new();
    for (number, named) in sources {
        observer.phase(match named.source {
            Source::Files(_) => "reading text",
            Source::Builtin { .. } => "generating the built-in corpus",
        });
        go_on(observer)?;
        let survey = cpu.install(|| Survey::new(&named.source))?;
        if survey.skipped() != Skipped::default() {
            observer.phase(&format!("{}: {}", named.source.describe(), survey.skipped()));
        }
        let sides = Sides::new(survey.documents(), named.valid_fraction, seed, number)
            .map_err(|why| TrainError::Corpus { corpus: named.source.describe(), why })?;
        ready.push(Ready { named, survey, sides });
    }
    Ok(ready)
}

/// Loads the tokenizer, or trains one on the training side.
fn tokenizer(
    ctx: &Ctx,
    run: &Run,
    given: Option<&Path>,
    ready: &[Ready],
    observer: &mut dyn Observer,
) -> Result<Tokenizer, TrainError> {
    if let Some(path) = given {
        let tokenizer = Tokenizer::load(path)?;
        check_tokenizer(path, &tokenizer, &run.model)?;
        return Ok(tokenizer);
    }
    observer.phase("training a byte-level BPE tokenizer");
    let cpu = ctx.host();
    let surveys: Vec<(&Survey, Option<&Sides>)> = ready.iter().map(|r| (&r.survey, Some(&r.sides))).collect();
    go_on(observer)?;
    let text = corpus::sample(&surveys, TOKENIZER_TEXT)?;
    let trained = cpu.install(|| Tokenizer::train(&text, run.model.vocab_size))?;
    let (found, wanted) = (trained.vocab_size(), run.model.vocab_size);
    if found < wanted {
        observer.phase(&format!(
            "the text supports {found} of {wanted} token ids; the rest of the vocabulary stays unused"
        ));
    }
    Ok(trained)
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

/// Makes the tokens of every source that has none yet. Where all have, nothing is written: the directory may be shared,
/// read-only or in use.
fn tokenise(
    ctx: &Ctx,
    disk: &Disk,
    run: &Run,
    ready: &[Ready],
    tokenizer: &Tokenizer,
    observer: &mut dyn Observer,
) -> Result<Vec<Made>, TrainError> {
    let root = run.data.cache.clone().unwrap_or_else(|| run.out.join(HOME));
    let place = |Ready { named, survey, sides }: &Ready| {
        let identity = Identity::new(survey, sides, tokenizer);
        Made { name: named.name.clone(), directory: root.join(identity.directory(&named.name)), identity }
    };
    let made: Vec<Made> = ready.iter().map(place).collect();
    let lock = if made.iter().all(|m| Stored::is_whole(&m.directory)) { None } else { Some(claim(disk, &root)?) };
    for (Ready { named, survey, sides }, m) in ready.iter().zip(&made) {
        // Asked under the lock: whoever had it before may have made some.
        if Stored::is_whole(&m.directory) {
            observer.phase(&format!("{} is tokenised already", named.name));
            continue;
        }
        let job = Job { name: &named.name, survey, sides, tokenizer, identity: m.identity };
        make(ctx, disk, &root, &job, observer)?;
    }
    drop(lock);
    Ok(made)
}

/// Locks a directory of tokens against other writers and removes what killed ones left.
fn claim(disk: &Disk, root: &Path) -> Result<Lock, TrainError> {
    disk.create_dir(root).map_err(DataError::from)?;
    let lock = Lock::take(root).map_err(DataError::from)?;
    let lock = lock.map_err(|pid| DataError::Locked { path: root.join(Lock::NAME), pid })?;
    shards::sweep(disk, root)?;
    Ok(lock)
}

/// Makes the tokens of one source.
fn make(ctx: &Ctx, disk: &Disk, root: &Path, job: &Job<'_>, observer: &mut dyn Observer) -> Result<(), TrainError> {
    let cpu = ctx.host();
    let pool = |f: &mut (dyn FnMut() + Send)| cpu.install(f);
    let (what, total) = (format!("tokenising {}", job.name), job.survey.text_bytes());
    observer.phase(&what);
    go_on(observer)?;
    let mut progress = |done| {
        observer.progress(&what, done, total);
        if observer.stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    shards::tokenise(disk, root, job, &pool, &mut progress).map_err(|e| match e {
        DataError::Stopped => TrainError::Stopped,
        other => other.into(),
    })
}

/// Maps and checks the tokens.
fn open(ctx: &Ctx, run: &Run, tokenizer: Tokenizer, made: Vec<Made>, shares: Shares) -> Result<Prepared, TrainError> {
    let cpu = ctx.host();
    let vocab_size = tokenizer.vocab_size();
    let identities: Vec<Identity> = made.iter().map(|m| m.identity).collect();
    let fingerprint = format!("{:016x}", Identity::of_all(&identities));
    let stored = cpu.install(|| {
        made.iter().map(|m| Stored::open(&m.directory, m.identity, vocab_size)).collect::<Result<Vec<_>, _>>()
    })?;
    // A window has its inputs and one more token.
    let windows = run.config.eval_tokens.div_ceil(run.config.seq) as u64;
    let most = windows.saturating_mul(run.config.seq as u64).saturating_add(1);
    let sides: Vec<_> = stored.iter().map(|s| &s.valid).collect();
    let held = TokenStream::beginnings(&sides, most)?;
    let sum = |f: fn(&Stored) -> u64| stored.iter().map(f).sum::<u64>();
    let tokens = (sum(|s| s.train.tokens()), sum(|s| s.valid.tokens()));
    let bytes_per_token = sum(|s| s.train.bytes()) as f64 / tokens.0 as f64;
    let prompts = prompts(&stored);
    let parts = made.into_iter().zip(stored).map(|(m, s)| Part { name: m.name, tokens: s.train }).collect();
    let train = Loader::new(parts, shares, run.config.seq, run.config.seed)?;
    let byte_lengths = tokenizer.token_byte_lengths();
    Ok(Prepared { tokenizer, train, held, byte_lengths, prompts, tokens, bytes_per_token, fingerprint })
}

/// Beginnings of held-out documents, the sources in turn.
fn prompts(stored: &[Stored]) -> Vec<String> {
    let nth = |i: usize| stored.iter().filter_map(move |s| s.beginnings.get(i));
    (0..PROMPTS).flat_map(nth).take(PROMPTS).cloned().collect()
}

/// The model of a run learns which tokens begin and end a text from its tokenizer.
pub(crate) fn with_special_tokens(mut model: ModelConfig, tokenizer: &Tokenizer) -> ModelConfig {
    model.bos_token_id = tokenizer.bos();
    model.eos_token_ids = tokenizer.eos().into_iter().collect();
    model
}
