//! What a finished run shows of its model: text that it writes, problems that it solves, what its cache takes, how its
//! experts share the work, what its MTP layer is good for. People read it, `--json` has the same numbers.
//!
//! On the built-in corpus beginnings and problems come from where no corpus reaches; on other text they are the
//! beginnings of held-out documents, and there are no problems.

mod arithmetic;
mod drafts;
mod ending;
mod experts;
mod greedy;
pub mod progress;
mod samples;
mod text;

use crate::open;
use crate::output::Output;
use anyhow::Context;
use arithmetic::Arithmetic;
use drafts::Acceptance;
use ending::Ending;
use experts::Experts;
use greedy::{Asked, greedy};
use hadal_data::Tokenizer;
use hadal_data::corpus::builtin::{self, Problem};
use hadal_kernels::Ctx;
use hadal_model::{Model, Params, Sequence, account};
use hadal_train::{Outcome, Run, examine};
use samples::{Sample, samples};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub use text::quoted;

/// Problems scored.
const PROBLEMS: usize = 60;
/// Most tokens of a problem's working.
const WORKING: usize = 160;
/// Openings of each kind continued greedily come from so many seeds, two from each.
const OPENING_SEEDS: u64 = 4;
/// Tokens of each that are given: short enough to stop within a sentence, after which a text might end.
const OPENING: usize = 12;
/// Held-out windows continued greedily where there are no openings.
const WINDOWS: usize = 12;
/// Most tokens written after each.
const WRITTEN: usize = 64;

/// What was found.
#[derive(Serialize)]
struct Report {
    samples: Vec<Sample>,
    /// Only for the built-in corpus.
    arithmetic: Option<Arithmetic>,
    cache: Cache,
    /// None without experts.
    experts: Option<Experts>,
    /// None without MTP layers.
    acceptance: Option<Acceptance>,
}

/// The result's JSON object.
#[derive(Serialize)]
struct Finished {
    #[serde(flatten)]
    ending: Ending,
    #[serde(flatten)]
    report: Option<Report>,
}

/// Bytes that a token takes.
#[derive(Serialize)]
struct Cache {
    latent_bytes_per_token: usize,
    mha_bytes_per_token: usize,
    ratio: f64,
}

/// A finished run's model, MTP layers included, as inference holds it.
struct Trained {
    model: Arc<Model>,
    params: Arc<Params>,
    tokenizer: Arc<Tokenizer>,
    /// Most tokens of a sequence: no more than it was trained on.
    room: usize,
    seed: u64,
}

/// A text that is continued greedily: what it is, the problem if it is one, and its tokens.
struct Prompt {
    kind: &'static str,
    problem: Option<Problem>,
    ids: Vec<u32>,
}

/// The end of a finished run that took `clock` (its time, and tokens a second of its steps): the report if it is
/// `wanted`, and what to try next.
pub fn end(
    ctx: &Ctx,
    run: &Run,
    outcome: &Outcome,
    clock: (Duration, f64),
    wanted: bool,
    out: &Output,
) -> anyhow::Result<()> {
    let begin = Instant::now();
    let report = wanted.then(|| report(ctx, run, outcome, out)).transpose().with_context(|| {
        let dir = outcome.checkpoint.display();
        format!("{dir}: the checkpoint is written, but the report on it failed")
    })?;
    let ending = Ending::new(run, outcome, clock, begin.elapsed());
    out.text(&ending.text());
    out.object(&Finished { ending, report });
    Ok(())
}

/// Examines the last checkpoint of a run and prints what it finds as it goes.
fn report(ctx: &Ctx, run: &Run, outcome: &Outcome, out: &Output) -> anyhow::Result<Report> {
    let trained = Trained::open(ctx, run, outcome, out)?;
    let built_in = run.data.paths.is_none();
    let samples = samples(ctx, &trained, &beginnings(built_in, run.config.seed, outcome), out)?;

    let prompts = trained.prompts(built_in, outcome);
    print(out, built_in.then(|| Arithmetic::heading(PROBLEMS)));
    let written = trained.write(ctx, &prompts)?;
    let arithmetic = built_in.then(|| trained.score(&prompts, &written));
    print(out, arithmetic.as_ref().map(Arithmetic::text));
    let cache = Cache::of(&trained);
    out.text(&cache.text(&trained));

    let (c, batch) = (&trained.model.config, run.config.micro_batch);
    let held: Vec<Sequence> = outcome.held.iter().map(|window| greedy::sequence(&window[..1], &window[1..])).collect();
    let read = examine(ctx, &trained.model, &trained.params, &held, batch);
    let experts = Experts::of(c, read.tokens, &read.load);
    print(out, experts.as_ref().map(Experts::text).or(Some("\nNo layer has experts.\n".into())));
    let acceptance = (c.num_nextn_predict_layers > 0).then(|| {
        let own = |(p, w): (&Prompt, &Vec<u32>)| greedy::sequence(&p.ids, w);
        let own: Vec<Sequence> = prompts.iter().zip(&written).map(own).collect();
        let guesses = examine(ctx, &trained.model, &trained.params, &own, batch).drafts;
        Acceptance::of(prompts.iter().map(|p| p.kind).zip(guesses), &read.drafts)
    });
    let none = "\nThe model has no MTP layer, so nothing guesses a second token.\n";
    print(out, acceptance.as_ref().map(Acceptance::text).or(Some(none.into())));
    Ok(Report { samples, arithmetic, cache, experts, acceptance })
}

fn print(out: &Output, text: Option<String>) {
    out.text(&text.unwrap_or_default());
}

/// What the samples begin with: openings and a worked problem, or the beginnings of held-out documents.
fn beginnings(built_in: bool, seed: u64, outcome: &Outcome) -> Vec<(&'static str, String)> {
    if !built_in {
        return outcome.prompts.iter().map(|p| ("held out", p.clone())).collect();
    }
    let mut all = builtin::openings(seed);
    all.extend(builtin::problems(seed, 1).into_iter().map(|p| ("worked problem", p.prompt)));
    all
}

impl Trained {
    fn open(ctx: &Ctx, run: &Run, outcome: &Outcome, out: &Output) -> anyhow::Result<Self> {
        let room = run.config.seq.min(run.model.max_position_embeddings);
        let sequences = PROBLEMS + 6 * OPENING_SEEDS as usize;
        let (precision, dir) = (run.config.precision, &outcome.checkpoint);
        // Longer than any of them gets.
        let each = room.min(2 * WORKING);
        let cache = |c: &_| open::cache_bytes(c, precision, sequences * each);
        let opened = open::with_mtp(ctx, dir, precision, cache, out)?;
        let tokenizer = open::tokenizer(dir, &opened.model.config)?;
        let (model, params, tokenizer) = (Arc::new(opened.model), Arc::new(opened.params), Arc::new(tokenizer));
        Ok(Self { model, params, tokenizer, room, seed: run.config.seed })
    }

    /// The beginning of `text` that takes at most half the room, and its tokens.
    fn fitting(&self, text: &str) -> (String, Vec<u32>) {
        let mut ids = self.tokenizer.encode(text);
        let most = (self.room / 2).max(1);
        if ids.len() <= most {
            return (text.to_string(), ids);
        }
        ids.truncate(most);
        (self.tokenizer.decode(&ids, true), ids)
    }

    /// What is continued greedily.
    fn prompts(&self, built_in: bool, outcome: &Outcome) -> Vec<Prompt> {
        if !built_in {
            let most = (self.room / 4).max(1);
            let windows = outcome.held.iter().take(WINDOWS);
            let ids = windows.map(|w| w[..most.min(w.len())].to_vec());
            return ids.map(|ids| Prompt { kind: "greedy text", problem: None, ids }).collect();
        }
        let problems = builtin::problems(self.seed, PROBLEMS).into_iter().map(|p| {
            let ids = self.tokenizer.encode(&p.prompt);
            Prompt { kind: "problems", ids, problem: Some(p) }
        });
        let openings = (0..OPENING_SEEDS).flat_map(|k| builtin::openings(self.seed.wrapping_add(k)));
        let begun = |text: &str| self.fitting(text).1.into_iter().take(OPENING).collect();
        let openings = openings.map(|(kind, text)| Prompt { kind, problem: None, ids: begun(&text) });
        problems.chain(openings).collect()
    }

    /// Tokens that the model writes after each prompt, all at once; none after one that fills the room.
    fn write(&self, ctx: &Ctx, prompts: &[Prompt]) -> anyhow::Result<Vec<Vec<u32>>> {
        let most = |p: &Prompt| if p.problem.is_some() { WORKING } else { WRITTEN };
        let free = |p: &Prompt| self.room.saturating_sub(p.ids.len()).min(most(p));
        let room = |p: &Prompt| !p.ids.is_empty() && free(p) > 0;
        let asked: Vec<usize> = (0..prompts.len()).filter(|&i| room(&prompts[i])).collect();
        let requests: Vec<Asked> =
            asked.iter().map(|&i| Asked { prompt: prompts[i].ids.clone(), max_tokens: free(&prompts[i]) }).collect();
        let done = |i: usize, written: &[u32]| {
            let problem = prompts[asked[i]].problem.is_some();
            problem && arithmetic::worked(&self.tokenizer.decode(written, true)).is_some()
        };
        let mut written = vec![Vec::new(); prompts.len()];
        let answers = greedy(ctx, &self.model, &self.params, &requests, done)?;
        asked.into_iter().zip(answers).for_each(|(i, tokens)| written[i] = tokens);
        Ok(written)
    }

    fn score(&self, prompts: &[Prompt], written: &[Vec<u32>]) -> Arithmetic {
        let answers = prompts.iter().zip(written).filter_map(|(p, tokens)| {
            let text = (!tokens.is_empty()).then(|| self.tokenizer.decode(tokens, true));
            Some((p.problem.as_ref()?, text))
        });
        Arithmetic::score(answers)
    }
}

impl Cache {
    fn of(trained: &Trained) -> Self {
        let (c, dtype) = (&trained.model.config, trained.params.precision.act());
        let latent = account::cache_bytes_per_token(c, dtype);
        let mha = account::mha_cache_bytes_per_token(c, dtype);
        Self { latent_bytes_per_token: latent, mha_bytes_per_token: mha, ratio: mha as f64 / latent as f64 }
    }

    fn text(&self, trained: &Trained) -> String {
        let heads = trained.model.config.num_attention_heads;
        format!(
            "\nLatent cache: {} bytes a token; keys and values of the same {heads} heads would take {}, {:.1} times as \
             much\n",
            self.latent_bytes_per_token, self.mha_bytes_per_token, self.ratio
        )
    }
}
