//! `hadal inspect`: what a model is and what it costs, without loading its weights.

use crate::output::Output;
use crate::{Global, open};
use clap::Args;
use hadal_kernels::cuda::Cuda;
use hadal_kernels::{DType, DeviceError};
use hadal_model::account::{self, Activations, Flops, Parameters, Passes, TrainingMemory};
use hadal_model::{Checkpoint, Layout, ModelConfig, PRESETS, Quantization, Recompute, Scope};
use hadal_train::plan::{self, StepSize};
use hadal_train::{Settings, TrainConfig};
use serde::Serialize;
use std::path::Path;

/// Options of `inspect`.
#[derive(Args)]
#[command(after_help = "Examples:
  hadal inspect v3
  hadal inspect first-run --json
  hadal inspect mini --batch 8 --seq 512
  hadal inspect 1b --batch 8 --seq 2048 --recompute all")]
pub struct Inspect {
    /// Model directory, or a preset: nano, mini, 1b, v2-lite, moonlight-16b, v3.
    #[arg(value_name = "MODEL|PRESET")]
    model: String,
    /// Sequences in flight, for the training memory.
    #[arg(long, allow_negative_numbers = true, default_value_t = 8, value_name = "B")]
    batch: usize,
    /// Tokens a sequence, for FLOPs and training memory `[default: 4096, or all the model's positions]`.
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    seq: Option<usize>,
    /// Numbers to compute in: bf16 or fp32.
    #[arg(long, default_value = "bf16", value_name = "D")]
    dtype: String,
    /// What backward computes again instead of keeping: none, paper or all.
    #[arg(long, default_value = "paper", value_name = "R")]
    recompute: String,
}

/// Rows in flight are counted in i32.
const MAX_TOKENS: usize = i32::MAX as usize;

/// The answer.
#[derive(Serialize)]
struct Report {
    model: String,
    family: String,
    /// How weights are stored, where not as plain numbers.
    storage: Option<String>,
    parameters: usize,
    parameters_active: usize,
    parameters_active_without_embedding: usize,
    correction_biases: usize,
    mtp_layers: usize,
    mtp_parameters: usize,
    seq: usize,
    flops_per_token_forward: f64,
    flops_per_token_training: f64,
    cache_bytes_per_token: usize,
    mha_cache_bytes_per_token: usize,
    training_memory: Memory,
    /// On a GPU, if --device names one.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory: Option<GpuReport>,
}

/// Bytes by part of a step on a GPU.
#[derive(Serialize)]
struct GpuReport {
    gpu: String,
    weights: usize,
    gradients: usize,
    moments: usize,
    step: usize,
    total: usize,
    bytes_per_parameter: f64,
}

/// Bytes by part.
#[derive(Serialize)]
struct Memory {
    batch: usize,
    seq: usize,
    dtype: String,
    recompute: String,
    masters: usize,
    compute_weights: usize,
    gradients: usize,
    moments: usize,
    saved_activations: usize,
    working_set: usize,
    process: usize,
    total: usize,
}

impl Inspect {
    /// Prints the report.
    pub fn run(&self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let (config, quantization) = self.config(out)?;
        let mut report = self.report(global, &config, quantization)?;
        report.gpu_memory = self.gpu_memory(global, &config)?;
        out.object(&report);
        out.text(&report.text());
        Ok(())
    }

    fn config(&self, out: &Output) -> anyhow::Result<(ModelConfig, Option<Quantization>)> {
        let path = Path::new(&self.model);
        if PRESETS.contains(&self.model.as_str()) {
            return Ok((ModelConfig::preset(&self.model)?, None));
        }
        if !path.exists() {
            anyhow::bail!("{}: expected a model directory or one of {}", self.model, PRESETS.join(", "));
        }
        let dir = open::resolve(path)?;
        let mut config = open::config(&dir, out)?;
        // Where there are weights, their MTP layers count, not the field.
        let weights = ["model.safetensors", "model.safetensors.index.json"];
        if weights.iter().any(|name| dir.join(name).exists()) {
            config.num_nextn_predict_layers = Checkpoint::open(&dir)?.mtp_layers(&config);
        }
        Ok((config, Quantization::from_hf(&dir.join("config.json"))?))
    }

    fn recompute(&self) -> anyhow::Result<Recompute> {
        self.recompute.parse().map_err(|e| anyhow::anyhow!("--{e}"))
    }

    /// What a step takes on the GPU that --device names; where there is none, on an H200.
    fn gpu_memory(&self, global: &Global, config: &ModelConfig) -> anyhow::Result<Option<GpuReport>> {
        if global.device_name() == "cpu" {
            return Ok(None);
        }
        // Without a GPU there is still something to say, but not about one of a number.
        let gpus = Cuda::count().map_err(|why| DeviceError::Gpu { asked: global.device_name().into(), why })?;
        let absent = gpus == 0 && global.device_name() == "cuda";
        let ctx = if absent { global.host()? } else { global.ctx()? };
        let size = StepSize {
            config: config.clone(),
            precision: open::precision(&self.dtype)?,
            recompute: self.recompute()?,
            micro_batches: 1,
            sequences: self.batch,
            tokens: self.seq.unwrap_or(config.max_position_embeddings.min(4096)),
            objective: TrainConfig::resolve(Settings::default(), config)?.objective,
            average: false,
        };
        let gpu = ctx.device.as_cuda();
        let parameters = Parameters::of(config);
        let m = plan::gpu_memory(gpu.map(|cuda| &**cuda), ctx.host(), &size);
        let name = gpu.map_or("an NVIDIA H200 (there is no GPU here)".to_string(), |cuda| cuda.name().to_string());
        Ok(Some(GpuReport {
            gpu: name,
            weights: m.weights,
            gradients: m.gradients,
            moments: m.moments,
            step: m.step,
            total: m.total,
            bytes_per_parameter: (m.weights + m.gradients + m.moments) as f64
                / (parameters.total + parameters.biases + parameters.mtp) as f64,
        }))
    }

    fn report(&self, global: &Global, c: &ModelConfig, quantization: Option<Quantization>) -> anyhow::Result<Report> {
        let precision = open::precision(&self.dtype)?;
        let seq = self.seq.unwrap_or(c.max_position_embeddings.min(4096));
        let (batch, positions) = (self.batch, c.max_position_embeddings);
        if seq == 0 || seq > positions {
            anyhow::bail!("--seq {seq}: expected 1 to max_position_embeddings = {positions}");
        }
        if batch == 0 || batch > MAX_TOKENS / seq {
            anyhow::bail!("--batch {batch}: expected 1 to {}, at most {MAX_TOKENS} tokens in flight", MAX_TOKENS / seq);
        }
        let p = Parameters::of(c);
        let layout = Layout::new(c, Scope::whole(c));
        let recompute = self.recompute()?;
        let workers = global.host()?.host().workers();
        let passes = Passes { precision, recompute, sequences: self.batch, tokens: seq, workers };
        let m = TrainingMemory::of(&layout, precision, DType::F32, Activations::of(c, passes));
        Ok(Report {
            model: self.model.clone(),
            family: format!("{:?}", c.family),
            storage: quantization.map(|q| q.to_string()),
            parameters: p.total,
            parameters_active: p.active,
            parameters_active_without_embedding: p.active_without_embedding,
            correction_biases: p.biases,
            mtp_layers: c.num_nextn_predict_layers,
            mtp_parameters: p.mtp + p.mtp_biases,
            seq,
            flops_per_token_forward: Flops::forward(c, (seq as f64 + 1.0) / 2.0).total(),
            flops_per_token_training: Flops::training(c, seq).total(),
            // Caches are BF16 whatever a model trains in.
            cache_bytes_per_token: account::cache_bytes_per_token(c, DType::Bf16),
            mha_cache_bytes_per_token: account::mha_cache_bytes_per_token(c, DType::Bf16),
            training_memory: Memory {
                batch: self.batch,
                seq,
                dtype: self.dtype.clone(),
                recompute: self.recompute.clone(),
                masters: m.masters,
                compute_weights: m.compute,
                gradients: m.gradients,
                moments: m.moments,
                saved_activations: m.activations.saved,
                working_set: m.activations.working,
                process: m.process,
                total: m.total(),
            },
            gpu_memory: None,
        })
    }
}

/// 1234567 as "1.23 M".
pub fn scaled(x: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P"];
    let (mut x, mut i) = (x, 0);
    while x >= 1000.0 && i + 1 < prefixes.len() {
        x /= 1000.0;
        i += 1;
    }
    let digits = if i == 0 { 0 } else { 2 };
    format!("{x:.digits$} {}{unit}", prefixes[i])
}

impl Report {
    fn text(&self) -> String {
        let line = |name: &str, value: String| format!("{name:<43} {value}\n");
        let bytes = |n: usize| scaled(n as f64, "B");
        let m = &self.training_memory;
        let mut s = line("model", format!("{} (family {})", self.model, self.family));
        if let Some(storage) = &self.storage {
            s += &line("weights are stored as", storage.clone());
        }
        s += &line("parameters", format!("{} ({})", self.parameters, scaled(self.parameters as f64, "")));
        s += &line("  active for a token", self.parameters_active.to_string());
        s += &line("  active, embedding lookup left out", self.parameters_active_without_embedding.to_string());
        s += &line("  correction biases, counted apart", self.correction_biases.to_string());
        s += &line(
            "  MTP layers' own, biases included",
            format!("{} in {} layers", self.mtp_parameters, self.mtp_layers),
        );
        s += &line(&format!("FLOPs a token, forward, T = {}", self.seq), scaled(self.flops_per_token_forward, "FLOP"));
        s += &line("FLOPs a token, forward and backward", scaled(self.flops_per_token_training, "FLOP"));
        let ratio = self.mha_cache_bytes_per_token as f64 / self.cache_bytes_per_token as f64;
        s += &line("latent cache a token, BF16", format!("{} B", self.cache_bytes_per_token));
        s += &line(
            "  plain multi-head attention instead",
            format!("{} B ({ratio:.1} x)", self.mha_cache_bytes_per_token),
        );
        let what = format!("training memory, {} x {} tokens, {}", m.batch, m.seq, m.dtype);
        s += &line(&what, format!("{} at most, recompute = {}", bytes(m.total), m.recompute));
        for (name, n) in [
            ("  FP32 masters", m.masters),
            ("  compute weights", m.compute_weights),
            ("  FP32 gradients", m.gradients),
            ("  AdamW moments", m.moments),
            ("  activations saved for backward", m.saved_activations),
            ("  what backward works on, at its fullest", m.working_set),
            ("  the process itself, about", m.process),
        ] {
            s += &line(name, bytes(n));
        }
        if let Some(g) = &self.gpu_memory {
            s += &line(&format!("memory on {}", g.gpu), format!("{} at most", bytes(g.total)));
            s += &line("  a parameter", format!("{:.1} B", g.bytes_per_parameter));
            for (name, n) in [
                ("  FP32 masters and compute weights", g.weights),
                ("  FP32 gradients", g.gradients),
                ("  AdamW moments", g.moments),
                ("  a step beside them, at its fullest", g.step),
            ] {
                s += &line(name, bytes(n));
            }
        }
        s
    }
}
