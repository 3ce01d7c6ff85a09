//! A model directory: config, weights and tokenizer, checked against each other.

use crate::memory;
use crate::output::Output;
use anyhow::Context;
use hadal_data::Tokenizer;
use hadal_engine::plan::Work;
use hadal_kernels::Ctx;
use hadal_model::{Checkpoint, Layout, Model, ModelConfig, Params, Precision, Scope, account};
use std::path::{Path, PathBuf};

/// A model ready for inference.
pub struct Opened {
    /// The model.
    pub model: Model,
    /// Its weights.
    pub params: Params,
}

/// Numbers to compute in, as `--dtype` names them.
pub fn precision(dtype: &str) -> anyhow::Result<Precision> {
    hadal_train::precision(dtype).map_err(|e| anyhow::anyhow!("--{e}"))
}

/// The directory that holds a model: `path` itself, or a run's newest checkpoint.
pub fn resolve(path: &Path) -> anyhow::Result<PathBuf> {
    if !path.exists() {
        anyhow::bail!("{}: expected a model directory (config.json and safetensors), found nothing", path.display());
    }
    if !path.is_dir() {
        anyhow::bail!("{}: expected a model directory (config.json and safetensors), found a file", path.display());
    }
    if path.join("config.json").exists() {
        return Ok(path.to_path_buf());
    }
    let latest = path.join("latest");
    if !latest.exists() {
        let what =
            "expected a model directory (config.json) or that of a run with a checkpoint (latest), found neither";
        anyhow::bail!("{}: {what}", path.display());
    }
    // A link to the checkpoint, or, where links need privileges, a file with its name.
    match std::fs::read_to_string(&latest) {
        Ok(name) => Ok(path.join(name.trim())),
        Err(_) => Ok(latest),
    }
}

/// Reads config.json and says what it found odd.
pub fn config(dir: &Path, out: &Output) -> anyhow::Result<ModelConfig> {
    let (config, warnings) = ModelConfig::from_hf(&dir.join("config.json"))?;
    warnings.iter().for_each(|w| out.warn(w));
    Ok(config)
}

/// Opens the model in `path` for inference, without MTP layers, if its weights and `work` with them fit the memory of
/// where it computes.
pub fn model(
    ctx: &Ctx,
    path: &Path,
    precision: Precision,
    work: impl FnOnce(&ModelConfig) -> Work,
    out: &Output,
) -> anyhow::Result<Opened> {
    let fits = |config: &ModelConfig| memory::inference(ctx, config, precision, work(config));
    opened(ctx, path, precision, Model::without_mtp, fits, out)
}

/// As [`model`], with the MTP layers that the files hold, and `room` bytes for what is computed.
pub fn with_mtp(
    ctx: &Ctx,
    path: &Path,
    precision: Precision,
    room: impl FnOnce(&ModelConfig) -> usize,
    out: &Output,
) -> anyhow::Result<Opened> {
    let fits = |config: &ModelConfig| {
        let weights = Params::inference_bytes(&Layout::new(config, Scope::whole(config)), precision);
        memory::fits_on(ctx, memory::WHAT, weights.saturating_add(room(config)))
    };
    opened(ctx, path, precision, Model::whole, fits, out)
}

fn opened(
    ctx: &Ctx,
    path: &Path,
    precision: Precision,
    part: fn(&Ctx, ModelConfig) -> Model,
    fits: impl FnOnce(&ModelConfig) -> anyhow::Result<()>,
    out: &Output,
) -> anyhow::Result<Opened> {
    let dir = resolve(path)?;
    let mut config = config(&dir, out)?;
    let checkpoint = Checkpoint::open(&dir)?;
    // Files hold MTP layers or not, whatever the field says.
    config.num_nextn_predict_layers = checkpoint.mtp_layers(&config);
    fits(&config).with_context(|| path.display().to_string())?;
    let model = part(ctx, config);
    let (params, warnings) = checkpoint.load_for_inference(ctx, &model.config, model.layout.clone(), precision)?;
    warnings.iter().for_each(|w| out.warn(w));
    Ok(Opened { model, params })
}

/// Bytes of the latent cache of `tokens` tokens.
pub fn cache_bytes(config: &ModelConfig, precision: Precision, tokens: usize) -> usize {
    account::cache_bytes_per_token(config, precision.act()).saturating_mul(tokens)
}

/// The tokenizer beside a model; it must not have ids that the model lacks.
pub fn tokenizer(path: &Path, config: &ModelConfig) -> anyhow::Result<Tokenizer> {
    let dir = resolve(path)?;
    let tokenizer = Tokenizer::load(&dir).context("this verb needs the model's tokenizer")?;
    let (found, expected) = (tokenizer.vocab_size(), config.vocab_size);
    if found > expected {
        anyhow::bail!(
            "{}: tokenizer and model disagree: expected at most vocab_size = {expected} ids, found {found}",
            dir.display()
        );
    }
    Ok(tokenizer)
}
