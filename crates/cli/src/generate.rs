//! `hadal generate`: a prompt continued on the latent cache.

use crate::output::Output;
use crate::{Global, open};
use anyhow::Context;
use clap::Args;
use hadal_data::Tokenizer;
use hadal_engine::plan::Work;
use hadal_engine::{CacheOptions, Engine, Finish, Request};
use hadal_kernels::Ctx;
use hadal_model::{Model, ModelConfig, Params, Precision, account};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Options of `generate`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal generate first-run 'Once upon a time'
  hadal generate first-run/step-000400 '12 + 7 =' --temperature 0 --max-tokens 32
  hadal generate ./DeepSeek-V2-Lite 'The capital of France' --bos --json")]
pub struct Generate {
    /// Model directory, or a run's (its newest checkpoint is taken).
    model: PathBuf,
    /// Text to continue.
    prompt: String,
    /// Tokens to write at most `[default: 128, or what the model's positions leave]`.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    max_tokens: Option<usize>,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.8, value_name = "X")]
    temperature: f32,
    /// Draw from the smallest set of likeliest tokens with this probability.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Draw from the K likeliest tokens; 0 for all.
    #[arg(long, allow_negative_numbers = true, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Numbers to compute in: bf16 or fp32.
    #[arg(long, default_value = "bf16", value_name = "D")]
    dtype: String,
    /// Begin with the tokenizer's begin-of-text token.
    #[arg(long)]
    bos: bool,
}

/// What takes less of a GPU's memory.
const LESS: &str = "a shorter prompt, a smaller --max-tokens or --dtype bf16 needs less";
/// Tokens written unless said otherwise.
const MAX_TOKENS: usize = 128;

/// What a generation gave.
#[derive(Serialize)]
pub struct Generated {
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    finish: &'static str,
    tokens_per_s: f64,
    cache_bytes_per_token: usize,
}

/// How to draw.
#[derive(Clone, Copy)]
pub struct Sampling {
    pub max_tokens: usize,
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    /// The request that continues `prompt`.
    fn request(&self, prompt: Vec<u32>, config: &ModelConfig) -> Request {
        Request {
            id: 0,
            prompt,
            max_new_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            stop: config.eos_token_ids.clone(),
        }
    }
}

/// A model that continues texts.
pub struct Writer {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
    precision: Precision,
}

impl Writer {
    /// Opens a model with room for one sequence: `prompt` tokens, `tokens` with what is written.
    fn open(
        ctx: &Ctx,
        path: &Path,
        precision: Precision,
        [prompt, tokens]: [usize; 2],
        out: &Output,
    ) -> anyhow::Result<Self> {
        let room = |c: &ModelConfig| tokens.min(c.max_position_embeddings).max(1);
        let opened = open::model(ctx, path, precision, |c| Work::Write { prompt, tokens: room(c) }, out)?;
        let tokenizer = open::tokenizer(path, &opened.model.config)?;
        let room = room(&opened.model.config);
        Ok(Self::new(ctx, opened.model.into(), opened.params.into(), tokenizer.into(), room))
    }

    /// Writes with a model that is open already, sequences of at most `room` tokens.
    pub fn new(ctx: &Ctx, model: Arc<Model>, params: Arc<Params>, tokenizer: Arc<Tokenizer>, room: usize) -> Self {
        let precision = params.precision;
        Self { engine: Engine::new(ctx, model, params, CacheOptions::max_tokens(room)), tokenizer, precision }
    }

    /// Continues `prompt`; `each` sees text as it comes, the prompt first, once nothing can be wrong any more.
    pub fn write(
        &mut self,
        ctx: &Ctx,
        prompt: &str,
        ids: Vec<u32>,
        s: Sampling,
        mut each: impl FnMut(&str),
    ) -> anyhow::Result<Generated> {
        let request = s.request(ids, &self.engine.model().config);
        let (mut tokens, mut shown, mut finish) = (Vec::new(), 0, Finish::Length);
        self.engine.submit(request)?;
        each(prompt);
        let begin = Instant::now();
        let tokenizer = &self.tokenizer;
        self.engine.generate(ctx, [], |event| {
            finish = event.finished.unwrap_or(finish);
            if event.finished == Some(Finish::Stop) {
                return;
            }
            tokens.push(event.token);
            let text = tokenizer.decode(&tokens, true);
            // The bytes of a character may come in several tokens: wait for the rest.
            if !text.ends_with('\u{fffd}')
                && let Some(new) = text.get(shown..)
            {
                each(new);
                shown = text.len();
            }
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        let text = tokenizer.decode(&tokens, true);
        if let Some(rest) = text.get(shown..) {
            each(rest);
        }
        let config = &self.engine.model().config;
        Ok(Generated {
            prompt: prompt.to_string(),
            finish: if finish == Finish::Stop { "stop" } else { "length" },
            tokens_per_s: tokens.len() as f64 / seconds,
            cache_bytes_per_token: account::cache_bytes_per_token(config, self.precision.act()),
            text,
            tokens,
        })
    }
}

impl Generate {
    /// Streams the continuation.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let ctx = global.inference(LESS)?;
        let precision = open::precision(&self.dtype)?;
        let dir = open::resolve(&self.model)?;
        // Warnings come when the model is opened.
        let (config, _) = ModelConfig::from_hf(&dir.join("config.json"))?;
        let tokenizer = open::tokenizer(&dir, &config)?;
        let mut ids = tokenizer.encode(&self.prompt);
        if self.bos {
            let bos = tokenizer.bos();
            ids.insert(0, bos.ok_or_else(|| anyhow::anyhow!("--bos: this tokenizer has no begin-of-text token"))?);
        }
        // A prompt that leaves no position is refused by name, not given nothing.
        let left = config.max_position_embeddings.saturating_sub(ids.len()).max(1);
        let max_tokens = self.max_tokens.unwrap_or(MAX_TOKENS.min(left));
        let sampling = Sampling {
            max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: global.seed.unwrap_or(0),
        };
        // Before weights are read and a cache is made.
        sampling.request(ids.clone(), &config).validate(&config).with_context(|| self.model.display().to_string())?;
        let tokens = [ids.len(), ids.len().saturating_add(max_tokens)];
        let mut writer = Writer::open(&ctx, &dir, precision, tokens, out)?;
        let generated = writer.write(&ctx, &self.prompt, ids, sampling, |text| out.text(text));
        let generated = generated.with_context(|| self.model.display().to_string())?;
        out.text("\n");
        out.object(&generated);
        if !out.json() {
            let (n, rate) = (generated.tokens.len(), generated.tokens_per_s);
            eprintln!("[{n} tokens, {rate:.1} tokens/s, ended by {}]", generated.finish);
        }
        Ok(())
    }
}
