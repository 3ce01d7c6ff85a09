//! `hadal logits`: what a model says about every token, in a file that any tool reads.

use crate::output::Output;
use crate::{Global, open};
use anyhow::Context;
use clap::Args;
use hadal_engine::plan::Work;
use hadal_engine::{CacheOptions, Engine, logits_uncached};
use hadal_model::ModelConfig;
use safetensors::tensor::{Dtype, TensorView};
use std::path::PathBuf;

/// Tokens that go through the cache at once.
const CHUNK: usize = 256;

/// What takes less of a GPU's memory.
const LESS: &str = "fewer --tokens or --dtype bf16 need less";

/// Options of `logits`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal logits first-run --tokens 17,4,256 --out logits.safetensors
  hadal logits first-run --tokens 17,4,256 --out uncached.safetensors --dtype fp32 --no-cache")]
pub struct Logits {
    /// Model directory, or a run's (its newest checkpoint is taken).
    model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, allow_negative_numbers = true, value_delimiter = ',', required = true, value_name = "IDS")]
    tokens: Vec<u64>,
    /// File to write: tensor `logits`, f32 `[T, V]`. Numbers that are not finite are written as they are.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Numbers to compute in: bf16 or fp32.
    #[arg(long, default_value = "bf16", value_name = "D")]
    dtype: String,
    /// Multi-head attention over the whole sequence instead of the absorbed form over the latent cache.
    #[arg(long)]
    no_cache: bool,
}

impl Logits {
    /// Writes the file.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let ctx = global.inference(LESS)?;
        // Before the work, not after it.
        let parent = self.out.parent().filter(|p| !p.as_os_str().is_empty());
        if self.out.is_dir() || parent.is_some_and(|p| !p.is_dir()) {
            anyhow::bail!("{}: expected a file to write in a directory that is there", self.out.display());
        }
        let precision = open::precision(&self.dtype)?;
        let tokens = self.tokens()?;
        let work = |c: &ModelConfig| {
            // More are refused.
            let tokens = tokens.len().min(c.max_position_embeddings);
            if self.no_cache { Work::Uncached { tokens } } else { Work::Logits { tokens, chunk: CHUNK } }
        };
        let opened = open::model(&ctx, &self.model, precision, work, out)?;
        let vocab = opened.model.config.vocab_size;
        let logits = if self.no_cache {
            logits_uncached(&ctx, &opened.model, &opened.params, &tokens)
        } else {
            let room = tokens.len().min(opened.model.config.max_position_embeddings);
            let mut engine = Engine::new(&ctx, opened.model, opened.params, CacheOptions::max_tokens(room));
            engine.logits(&ctx, &tokens, CHUNK)
        };
        let logits = logits.with_context(|| self.model.display().to_string())?;
        let bytes: Vec<u8> = logits.view().to_f32().iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![self.tokens.len(), vocab], &bytes)?;
        let file = safetensors::serialize([("logits", view)], None)?;
        hadal_files::Disk::new().replace(&self.out, &file)?;
        out.text(&format!("logits [{}, {vocab}] f32 in {}\n", self.tokens.len(), self.out.display()));
        out.object(&serde_json::json!({ "out": self.out, "shape": [self.tokens.len(), vocab], "dtype": "f32" }));
        Ok(())
    }

    /// The ids, of which the model's vocabulary may still be smaller.
    fn tokens(&self) -> anyhow::Result<Vec<u32>> {
        let id = |(i, &t): (usize, &u64)| {
            u32::try_from(t).map_err(|_| anyhow::anyhow!("token {t} at index {i}: expected an id below vocab_size"))
        };
        self.tokens.iter().enumerate().map(id).collect()
    }
}
