//! The fixed model beside which files are loaded, and where they lie.

use crate::safetensors::{join, split};
use hadal_kernels::{Ctx, DType, Device};
use hadal_model::{
    Checkpoint, IoError, Layout, Model, ModelConfig, Params, Precision, SaveOptions, Scope, save_checkpoint,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// Dense layer, MoE layer, MTP layer, every tensor there is, in as few bytes as possible.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 4,
        hidden_size: 2,
        intermediate_size: 3,
        moe_intermediate_size: 2,
        num_hidden_layers: 2,
        first_k_dense_replace: 1,
        num_attention_heads: 1,
        q_lora_rank: Some(2),
        kv_lora_rank: 2,
        qk_nope_head_dim: 2,
        qk_rope_head_dim: 2,
        v_head_dim: 2,
        n_routed_experts: 2,
        n_shared_experts: 1,
        num_experts_per_tok: 1,
        n_group: 1,
        topk_group: 1,
        num_nextn_predict_layers: 1,
        bos_token_id: None,
        eos_token_ids: vec![1],
        ..ModelConfig::preset("nano").expect("a preset of the crate")
    }
}

/// Rows and columns of a block of FP8 weights: the fixed model's matrices have several, and ragged edges.
pub const BLOCK: [usize; 2] = [2, 1];

/// The `config.json` of the fixed model with weights in FP8.
pub fn quantized() -> Vec<u8> {
    let mut file = tiny().to_hf_json(DType::Bf16);
    file["quantization_config"] =
        json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": BLOCK});
    serde_json::to_vec(&file).expect("a configuration has a JSON form")
}

/// What one process keeps from input to input.
pub struct World {
    /// Files of the current input.
    pub dir: TempDir,
    ctx: Ctx,
}

impl World {
    /// One thread, a directory of its own below `TMPDIR`.
    pub fn new() -> Self {
        let device = Device::cpu(Some(1)).expect("one thread can be had");
        Self { dir: tempfile::tempdir().expect("TMPDIR can be written"), ctx: device.ctx() }
    }

    /// Writes a file of the current input.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).expect("TMPDIR can be written");
    }

    /// Opens and loads the directory as the command line does, for inference and for training.
    pub fn load(&self, config: &ModelConfig) {
        if let Err(e) = self.try_load(config) {
            crate::one_line(&e);
        }
    }

    /// As `load`, with the error that stopped it.
    pub fn try_load(&self, config: &ModelConfig) -> Result<(), IoError> {
        let checkpoint = Checkpoint::open(self.dir.path())?;
        let mut config = config.clone();
        config.num_nextn_predict_layers = checkpoint.mtp_layers(&config);
        let model = Model::without_mtp(&self.ctx, config);
        let bytes = Params::inference_bytes(&model.layout, Precision::Bf16);
        let inference =
            checkpoint.load_for_inference(&self.ctx, &model.config, model.layout.clone(), Precision::Bf16)?;
        assert!(inference.0.bytes() <= bytes, "{} bytes held, {bytes} counted", inference.0.bytes());
        let layout = Arc::new(Layout::new(&model.config, Scope::whole(&model.config)));
        let (params, warnings) = checkpoint.load(&self.ctx, &model.config, layout, Precision::Fp32)?;
        assert!(params.master.view().f32().iter().all(|x| x.is_finite()), "what is loaded is finite");
        inference.1.iter().chain(&warnings).for_each(|w| crate::one_line(w));
        Ok(())
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// Weights that no two tensors share, all finite in every dtype.
pub fn weights(config: &ModelConfig) -> Params {
    let ctx = Device::cpu(Some(1)).expect("one thread can be had").ctx();
    let layout = Arc::new(Layout::new(config, Scope::whole(config)));
    let mut params = Params::zeros(&ctx, layout, Precision::Fp32);
    params.master.view_mut().f32().iter_mut().enumerate().for_each(|(i, x)| *x = (i % 97) as f32 / 64.0 - 0.75);
    params
}

/// A checkpoint of the fixed model in `dir/whole`, in files of at most `shard_bytes`.
pub fn checkpoint(dir: &Path, dtype: DType, shard_bytes: usize) -> PathBuf {
    let path = dir.join("whole");
    let config = tiny();
    save_checkpoint(&path, &config, &weights(&config), SaveOptions { dtype, shard_bytes }, &[])
        .expect("TMPDIR can be written");
    path
}

/// Bytes of a shard: the fixed model has a few of them.
const SHARD: usize = 400;

/// Shards of the fixed model in `dir`, beside them one cut short, one that is none, and one whose tensors are integers.
/// The index that names them is left in `dir` too.
pub fn shards(dir: &Path) {
    let whole = checkpoint(dir, DType::F32, SHARD);
    for entry in std::fs::read_dir(&whole).expect("it was just written") {
        let entry = entry.expect("it was just written");
        std::fs::copy(entry.path(), dir.join(entry.file_name())).expect("TMPDIR can be written");
    }
    let first = std::fs::read_dir(dir).expect("TMPDIR can be read").map(|e| e.expect("TMPDIR can be read").path());
    let first = first.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).min().expect("there are shards");
    let bytes = std::fs::read(first).expect("it was just written");
    let (header, data) = split(&bytes).expect("a shard has a header");
    let integers = join(String::from_utf8_lossy(header).replace("\"F32\"", "\"I32\"").as_bytes(), data);
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).expect("TMPDIR can be written");
    write("short.safetensors", &bytes[..bytes.len() - 3]);
    write("none.safetensors", b"no safetensors file");
    write("integers.safetensors", &integers);
}
