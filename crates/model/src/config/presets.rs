//! Models by name. The published ones carry the values of their config.json; nano, mini and 1b are ours.

use super::{ConfigError, Family, ModelConfig, MtpHidden, Rope, Yarn};
use hadal_kernels::ops::router::Scoring;

/// The names [`ModelConfig::preset`] knows, smallest first.
pub const PRESETS: &[&str] = &["nano", "mini", "1b", "v2-lite", "moonlight-16b", "v3"];

impl ModelConfig {
    /// The preset called `name`.
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        match name {
            "nano" => Ok(nano()),
            "mini" => Ok(mini()),
            "1b" => Ok(one_b()),
            "v2-lite" => Ok(v2_lite()),
            "moonlight-16b" => Ok(moonlight_16b()),
            "v3" => Ok(v3()),
            _ => Err(ConfigError::value("preset", PRESETS.join(", "), format!("{name:?}"))),
        }
    }
}

/// Tokens a sequence that the preset called `name` is trained on unless told otherwise: for the published ones the
/// length of their pre-training (V2 and V3 reports), before any stretching.
pub fn preset_sequence(name: &str) -> Option<usize> {
    match name {
        "nano" => Some(256),
        "mini" => Some(512),
        "1b" => Some(2048),
        "v2-lite" | "moonlight-16b" | "v3" => Some(4096),
        _ => None,
    }
}

fn yarn(mscale: f64) -> Option<Yarn> {
    Some(Yarn {
        factor: 40.0,
        original_max_position_embeddings: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(mscale),
        mscale_all_dim: Some(mscale),
        attention_factor: None,
        truncate: true,
    })
}

/// DeepSeek-V3, R1 and R1-Zero. Published files say initializer_range 0.02; V3 was trained from 0.006 (report 4.2),
/// which is what a preset is for.
fn v3() -> ModelConfig {
    ModelConfig {
        family: Family::V3,
        vocab_size: 129280,
        hidden_size: 7168,
        intermediate_size: 18432,
        moe_intermediate_size: 2048,
        num_hidden_layers: 61,
        first_k_dense_replace: 3,
        num_attention_heads: 128,
        q_lora_rank: Some(1536),
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        n_routed_experts: 256,
        n_shared_experts: 1,
        num_experts_per_tok: 8,
        n_group: 8,
        topk_group: 4,
        scoring: Scoring::Sigmoid,
        group_limited: true,
        correction_bias: true,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        rope: Rope { theta: 10000.0, interleaved: true, yarn: yarn(1.0) },
        max_position_embeddings: 163840,
        rms_norm_eps: 1e-6,
        initializer_range: 0.006,
        num_nextn_predict_layers: 1,
        mtp_hidden: MtpHidden::PostNorm,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
    }
}

/// What our own presets share with V3: its gate, unstretched RoPE and HF's initial deviation.
fn small() -> ModelConfig {
    let rope = Rope { theta: 10000.0, interleaved: true, yarn: None };
    ModelConfig { rope, initializer_range: 0.02, first_k_dense_replace: 1, n_shared_experts: 1, ..v3() }
}

/// Trains in minutes on a laptop: every part of V3, MTP included.
fn nano() -> ModelConfig {
    ModelConfig {
        vocab_size: 4096,
        hidden_size: 256,
        intermediate_size: 704,
        moe_intermediate_size: 128,
        num_hidden_layers: 6,
        num_attention_heads: 4,
        q_lora_rank: Some(96),
        kv_lora_rank: 64,
        qk_nope_head_dim: 32,
        qk_rope_head_dim: 16,
        v_head_dim: 32,
        n_routed_experts: 16,
        num_experts_per_tok: 4,
        n_group: 4,
        topk_group: 2,
        max_position_embeddings: 1024,
        ..small()
    }
}

/// The smaller shape of the training-speed comparison; without MTP, which the rival does not train.
fn mini() -> ModelConfig {
    ModelConfig {
        vocab_size: 8192,
        hidden_size: 512,
        intermediate_size: 1408,
        moe_intermediate_size: 256,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        q_lora_rank: Some(192),
        kv_lora_rank: 128,
        qk_nope_head_dim: 64,
        qk_rope_head_dim: 32,
        v_head_dim: 64,
        n_routed_experts: 32,
        num_experts_per_tok: 4,
        n_group: 4,
        topk_group: 2,
        max_position_embeddings: 1024,
        num_nextn_predict_layers: 0,
        ..small()
    }
}

/// The larger shape of the training-speed comparison; without MTP, as `mini`.
fn one_b() -> ModelConfig {
    ModelConfig {
        vocab_size: 32768,
        hidden_size: 1024,
        intermediate_size: 2816,
        moe_intermediate_size: 512,
        num_hidden_layers: 12,
        num_attention_heads: 16,
        q_lora_rank: Some(384),
        kv_lora_rank: 256,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        n_routed_experts: 64,
        num_experts_per_tok: 6,
        n_group: 8,
        topk_group: 4,
        max_position_embeddings: 4096,
        num_nextn_predict_layers: 0,
        ..small()
    }
}

/// DeepSeek-V2-Lite.
fn v2_lite() -> ModelConfig {
    ModelConfig {
        family: Family::V2,
        vocab_size: 102400,
        hidden_size: 2048,
        intermediate_size: 10944,
        moe_intermediate_size: 1408,
        num_hidden_layers: 27,
        first_k_dense_replace: 1,
        num_attention_heads: 16,
        q_lora_rank: None,
        n_routed_experts: 64,
        n_shared_experts: 2,
        num_experts_per_tok: 6,
        n_group: 1,
        topk_group: 1,
        scoring: Scoring::Softmax,
        group_limited: false,
        correction_bias: false,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
        rope: Rope { theta: 10000.0, interleaved: true, yarn: yarn(0.707) },
        initializer_range: 0.02,
        num_nextn_predict_layers: 0,
        bos_token_id: Some(100000),
        eos_token_ids: vec![100001],
        ..v3()
    }
}

/// Moonlight-16B-A3B: V3's gate on V2-Lite's frame.
fn moonlight_16b() -> ModelConfig {
    ModelConfig {
        family: Family::V3,
        vocab_size: 163840,
        intermediate_size: 11264,
        scoring: Scoring::Sigmoid,
        group_limited: true,
        correction_bias: true,
        norm_topk_prob: true,
        routed_scaling_factor: 2.446,
        rope: Rope { theta: 50000.0, interleaved: true, yarn: None },
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        bos_token_id: Some(163584),
        eos_token_ids: vec![163585],
        ..v2_lite()
    }
}
