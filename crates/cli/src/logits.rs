//! `hadal logits`: what a model says about every token, in a file that any tool reads.

use crate::output::Output;
use crate::{Global, open};
use anyhow::Context;
use clap::Args;
use hadal_engine::{CacheOptions, Engine, logits_uncached};
use safetensors::tensor::{Dtype, TensorView};
use std::path::PathBuf;

/// Tokens that go through the cache at once.
const CHUNK: usize = 256;

/// Options of `logits`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal logits first-run --tokens 17,4,256 --out logits.safetensors
  hadal logits first-run --tokens 17,4,256 --out uncached.safetensors --dtype fp32 --no-cache")]
pub struct Logits {
    /// Model directory, or a run's (its newest checkpoint is taken).
    model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    tokens: Vec<u32>,
    /// File to write: tensor `logits`, f32 [T, V].
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
        let ctx = global.ctx()?;
        // Before the work, not after it.
        let parent = self.out.parent().filter(|p| !p.as_os_str().is_empty());
        if self.out.is_dir() || parent.is_some_and(|p| !p.is_dir()) {
            anyhow::bail!("{}: expected a file to write in a directory that is there", self.out.display());
        }
        let opened = open::model(&ctx, &self.model, hadal_train::precision(&self.dtype)?, out)?;
        let vocab = opened.model.config.vocab_size;
        let logits = if self.no_cache {
            logits_uncached(&ctx, &opened.model, &opened.params, &self.tokens)
        } else {
            let room = self.tokens.len().min(opened.model.config.max_position_embeddings);
            let mut engine = Engine::new(&ctx, opened.model, opened.params, CacheOptions::max_tokens(room));
            engine.logits(&ctx, &self.tokens, CHUNK)
        };
        let logits = logits.with_context(|| self.model.display().to_string())?;
        let bytes: Vec<u8> = logits.view().f32().iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, vec![self.tokens.len(), vocab], &bytes)?;
        let file = safetensors::serialize([("logits", view)], None)?;
        hadal_model::io::write_whole(&self.out, &file)?;
        out.text(&format!("logits [{}, {vocab}] f32 in {}\n", self.tokens.len(), self.out.display()));
        out.object(&serde_json::json!({ "out": self.out, "shape": [self.tokens.len(), vocab], "dtype": "f32" }));
        Ok(())
    }
}
