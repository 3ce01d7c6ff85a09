//! What a model is. One definition drives V2 and V3 families; it is read from a Hugging Face `config.json` (`hf`), from
//! our own TOML (`toml`) or taken from a preset (`presets`), and always checked (`validate`).

mod error;
mod hf;
mod hf_write;
mod keys;
mod presets;
mod quantization;
#[cfg(test)]
mod tests;
mod toml;
mod toml_write;
mod validate;

pub use error::ConfigError;
pub use presets::{PRESETS, preset_sequence};
pub use quantization::Quantization;
pub(crate) use quantization::read_object;

use hadal_kernels::ops::router::{self, GroupScore, Scoring};

/// Which published family a model belongs to: names in files and what absent keys mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// deepseek_v2: softmax gate.
    V2,
    /// deepseek_v3: sigmoid gate with correction bias, MTP.
    V3,
}

/// Which hidden state the MTP layers read (spec of published weights is open; transformers reads the normed one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtpHidden {
    /// After the final norm.
    PostNorm,
    /// Before it.
    PreNorm,
}

/// YaRN's numbers (arXiv 2309.00071; V3 report 4.3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// s: how far the context is stretched.
    pub factor: f64,
    /// Context length of pre-training.
    pub original_max_position_embeddings: usize,
    /// Rotations above which a frequency stays.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by s.
    pub beta_slow: f64,
    /// Temperature key of cos and sin.
    pub mscale: Option<f64>,
    /// Temperature key of the softmax scale.
    pub mscale_all_dim: Option<f64>,
    /// Replaces the factor on cos and sin.
    pub attention_factor: Option<f64>,
    /// Round the ramp's ends to whole frequencies.
    pub truncate: bool,
}

/// Rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base.
    pub theta: f64,
    /// Pairs are (2i, 2i + 1).
    pub interleaved: bool,
    /// Stretched context; None for plain RoPE.
    pub yarn: Option<Yarn>,
}

/// A model's shape and meaning. Fields carry the names of config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// V2 or V3.
    pub family: Family,
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// Width of the dense layers' SwiGLU.
    pub intermediate_size: usize,
    /// F: width of one expert.
    pub moe_intermediate_size: usize,
    /// Layers without MTP.
    pub num_hidden_layers: usize,
    /// The first layers that are dense.
    pub first_k_dense_replace: usize,
    /// H.
    pub num_attention_heads: usize,
    /// Rank of the query latent; None: one q_proj.
    pub q_lora_rank: Option<usize>,
    /// C.
    pub kv_lora_rank: usize,
    /// P.
    pub qk_nope_head_dim: usize,
    /// R.
    pub qk_rope_head_dim: usize,
    /// W.
    pub v_head_dim: usize,
    /// E.
    pub n_routed_experts: usize,
    /// Shared experts, one SwiGLU of n_shared_experts * moe_intermediate_size; 0 for none.
    pub n_shared_experts: usize,
    /// K.
    pub num_experts_per_tok: usize,
    /// Groups of experts.
    pub n_group: usize,
    /// Groups a token may use.
    pub topk_group: usize,
    /// Sigmoid (V3) or softmax (V2).
    pub scoring: Scoring,
    /// Group-limited selection; false is V2's plain `greedy`.
    pub group_limited: bool,
    /// The gate has a correction bias (noaux_tc).
    pub correction_bias: bool,
    /// Chosen scores are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the routing weights.
    pub routed_scaling_factor: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// eps of the norms of the residual stream; the two latent norms always use 1e-6.
    pub rms_norm_eps: f64,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// MTP depth D.
    pub num_nextn_predict_layers: usize,
    /// What MTP reads.
    pub mtp_hidden: MtpHidden,
    /// First token of a text, if any.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// eps of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (as transformers and DeepSeek's code have it).
pub const LATENT_NORM_EPS: f32 = 1e-6;

impl ModelConfig {
    /// Width of a query or key head: P + R.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Elements one token occupies in one layer's cache: C + R.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// True if layer `i` has experts; MTP layers (i >= num_hidden_layers) always have.
    pub fn is_moe(&self, i: usize) -> bool {
        i >= self.first_k_dense_replace
    }

    /// True if any layer has experts, MTP layers included.
    pub fn has_experts(&self) -> bool {
        self.num_nextn_predict_layers > 0 || self.first_k_dense_replace < self.num_hidden_layers
    }

    /// Width of the shared experts' SwiGLU.
    pub fn shared_width(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }

    /// The gate.
    pub fn router(&self) -> router::Config {
        let limited = self.group_limited;
        router::Config {
            experts: self.n_routed_experts,
            top_k: self.num_experts_per_tok,
            scoring: self.scoring,
            n_group: if limited { self.n_group } else { 1 },
            topk_group: if limited { self.topk_group } else { 1 },
            group_score: if self.family == Family::V3 { GroupScore::TopTwo } else { GroupScore::Max },
            norm_topk_prob: self.norm_topk_prob,
            scale: self.routed_scaling_factor as f32,
        }
    }

    /// Radians per position of each of the R/2 pairs, YaRN applied.
    pub fn inv_freq(&self) -> Vec<f32> {
        let r = self.qk_rope_head_dim;
        let base: Vec<f64> = (0..r / 2).map(|i| self.rope.theta.powf(-((2 * i) as f64) / r as f64)).collect();
        let Some(y) = self.rope.yarn else { return base.iter().map(|&f| f as f32).collect() };
        // Frequency index at which `rotations` turns fit into the original context.
        let dim = |rotations: f64| {
            let turns = y.original_max_position_embeddings as f64 / (rotations * std::f64::consts::TAU);
            r as f64 * turns.ln() / (2.0 * self.rope.theta.ln())
        };
        let (mut low, mut high) = (dim(y.beta_fast), dim(y.beta_slow));
        if y.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min((r - 1) as f64));
        if low == high {
            high += 0.001; // As transformers: no division by zero.
        }
        let stretched = |(i, f): (usize, &f64)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (f * (1.0 - ramp) + f / y.factor * ramp) as f32
        };
        base.iter().enumerate().map(stretched).collect()
    }

    /// Factor on cos and sin (1 without YaRN and for every published checkpoint).
    pub fn rope_factor(&self) -> f32 {
        let Some(y) = self.rope.yarn else { return 1.0 };
        if let Some(f) = y.attention_factor {
            return f as f32;
        }
        match (y.mscale, y.mscale_all_dim) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => (yarn_m(y.factor, a) / yarn_m(y.factor, b)) as f32,
            _ => yarn_m(y.factor, 1.0) as f32,
        }
    }

    /// Factor on q . k: (P + R)^-1/2, times m^2 under YaRN with mscale_all_dim.
    pub fn softmax_scale(&self) -> f32 {
        let plain = (self.qk_head_dim() as f64).powf(-0.5);
        let m = match self.rope.yarn {
            Some(Yarn { mscale_all_dim: Some(a), factor, .. }) if a != 0.0 => yarn_m(factor, a),
            _ => 1.0,
        };
        (plain * m * m) as f32
    }
}

/// 0.1 a ln(s) + 1, and 1 where nothing is stretched.
fn yarn_m(factor: f64, a: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * a * factor.ln() + 1.0 }
}
