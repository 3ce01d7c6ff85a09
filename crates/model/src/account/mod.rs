//! What a model costs, counted and not measured: parameters, floating-point operations (a multiply-add is two), bytes.
//! Everything follows from the table of tensors; nothing here allocates weights.

mod activations;
mod training;

pub use activations::{Activations, Passes};
pub use training::TrainingMemory;

use crate::{Kind, Layout, ModelConfig, Scope, TensorInfo};
use hadal_kernels::DType;

/// Numbers of parameters. Correction biases are counted apart: they are not trained by gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The main model, without correction biases, as published totals have it.
    pub total: usize,
    /// Those that one token uses, embedding and head counted whole.
    pub active: usize,
    /// As `active`, without the embedding: a token looks one row up and multiplies nothing.
    pub active_without_embedding: usize,
    /// Correction biases of the main model.
    pub biases: usize,
    /// The MTP layers' own, without correction biases; embedding and head are the main model's.
    pub mtp: usize,
    /// Correction biases of the MTP layers.
    pub mtp_biases: usize,
}

impl Parameters {
    /// Counts a valid configuration's.
    pub fn of(c: &ModelConfig) -> Self {
        let (main, mtp) = tables(c);
        let trained = |ts: &[TensorInfo], f: &dyn Fn(&TensorInfo) -> usize| -> usize {
            ts.iter().filter(|t| t.kind != Kind::Buffer).map(f).sum()
        };
        let biases = |ts: &[TensorInfo]| ts.iter().filter(|t| t.kind == Kind::Buffer).map(TensorInfo::len).sum();
        let active = trained(&main, &|t| used(c, t));
        Self {
            total: trained(&main, &TensorInfo::len),
            active,
            active_without_embedding: active - c.vocab_size * c.hidden_size,
            biases: biases(&main),
            mtp: trained(&mtp, &TensorInfo::len),
            mtp_biases: biases(&mtp),
        }
    }
}

/// Floating-point operations for one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// The main model, head included.
    pub main: f64,
    /// The MTP layers, each with its use of the head.
    pub mtp: f64,
}

impl Flops {
    /// Both.
    pub fn total(&self) -> f64 {
        self.main + self.mtp
    }

    /// Forward, for one token that attends to `keys` keys, with keys and values expanded per head as training and
    /// prefill do it. Matrix products and attention only: norms, rotations and the like are under a percent.
    pub fn forward(c: &ModelConfig, keys: f64) -> Self {
        let width = c.qk_head_dim() + c.v_head_dim;
        let per_layer = 2.0 * keys * (c.num_attention_heads * width) as f64;
        let (main, mtp) = tables(c);
        let products = |ts: &[TensorInfo]| -> f64 {
            let matrices = ts.iter().filter(|t| t.decay && t.kind != Kind::Embedding);
            matrices.map(|t| 2.0 * used(c, t) as f64).sum()
        };
        let depth = c.num_nextn_predict_layers as f64;
        let head = 2.0 * (c.vocab_size * c.hidden_size) as f64;
        Self {
            main: products(&main) + c.num_hidden_layers as f64 * per_layer,
            mtp: products(&mtp) + depth * (head + per_layer),
        }
    }

    /// Forward and backward, per token of a sequence of `tokens` (causal: on average (tokens + 1) / 2 keys). The
    /// backward is twice the forward; recomputation is not counted.
    pub fn training(c: &ModelConfig, tokens: usize) -> Self {
        let f = Self::forward(c, (tokens as f64 + 1.0) / 2.0);
        Self { main: 3.0 * f.main, mtp: 3.0 * f.mtp }
    }
}

/// Bytes that one token occupies in the latent cache of the main model.
pub fn cache_bytes_per_token(c: &ModelConfig, dtype: DType) -> usize {
    c.num_hidden_layers * c.cache_width() * dtype.size()
}

/// Bytes that one token would occupy if every head's key and value were cached, as plain multi-head attention does.
pub fn mha_cache_bytes_per_token(c: &ModelConfig, dtype: DType) -> usize {
    c.num_hidden_layers * c.num_attention_heads * (c.qk_head_dim() + c.v_head_dim) * dtype.size()
}

/// The tensors of the main model and of the MTP layers.
fn tables(c: &ModelConfig) -> (Vec<TensorInfo>, Vec<TensorInfo>) {
    let layout = Layout::new(c, Scope::whole(c));
    let mut main = layout.tensors;
    // MTP layers come last, their first tensor is enorm.
    let mtp = layout.mtp.first().map_or(Vec::new(), |m| main.split_off(m.enorm.0));
    (main, mtp)
}

/// Elements of a tensor that one token uses: of routed experts, those of K.
fn used(c: &ModelConfig, t: &TensorInfo) -> usize {
    if t.kind == Kind::RoutedExpert { t.rows * t.cols * c.num_experts_per_tok } else { t.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;

    fn preset(name: &str) -> ModelConfig {
        ModelConfig::preset(name).unwrap()
    }

    /// Published totals, and what they say of active parameters.
    #[test]
    fn parameters_of_published_models() {
        let v3 = Parameters::of(&preset("v3"));
        assert_eq!(v3.total, 671_026_404_352);
        assert_eq!(v3.biases, 14_848);
        assert_eq!(v3.mtp + v3.mtp_biases, 11_610_068_224);
        assert_eq!(v3.mtp_biases, 256);
        assert_eq!((v3.active as f64 / 1e7).round(), 3755.0);
        assert_eq!((v3.active_without_embedding as f64 / 1e7).round(), 3663.0);

        let lite = Parameters::of(&preset("v2-lite"));
        assert_eq!(lite.total, 15_706_484_224);
        assert_eq!((lite.active as f64 / 1e7).round(), 266.0);
        assert_eq!((lite.active_without_embedding as f64 / 1e7).round(), 245.0);
        assert_eq!((lite.mtp, lite.biases, lite.mtp_biases), (0, 0, 0));

        // Its authors count 15.29B and 2.24B, both without embedding and head.
        let moon = Parameters::of(&preset("moonlight-16b"));
        let tables = 2 * 163840 * 2048;
        assert_eq!(((moon.total - tables) as f64 / 1e7).round(), 1529.0);
        assert_eq!(((moon.active - tables) as f64 / 1e7).round(), 224.0);
        assert_eq!((moon.total as f64 / 1e7).round(), 1596.0);
    }

    /// A model small enough to count by hand.
    #[test]
    fn parameters_and_flops_by_hand() {
        let c = ModelConfig {
            vocab_size: 11,
            hidden_size: 6,
            intermediate_size: 5,
            moe_intermediate_size: 3,
            num_hidden_layers: 2,
            first_k_dense_replace: 1,
            num_attention_heads: 2,
            q_lora_rank: None,
            kv_lora_rank: 4,
            qk_nope_head_dim: 3,
            qk_rope_head_dim: 2,
            v_head_dim: 7,
            n_routed_experts: 8,
            n_shared_experts: 1,
            num_experts_per_tok: 2,
            ..preset("nano")
        };
        c.validate().unwrap();
        // q, kv_a, kv_b, o.
        let attention = 6 * 10 + 6 * 6 + 4 * 20 + 14 * 6;
        let (dense, expert, gate) = (3 * 6 * 5, 3 * 6 * 3, 8 * 6);
        let norms = 6 + 6 + 4;
        let p = Parameters::of(&c);
        let moe = attention + norms + gate + 9 * expert;
        assert_eq!(p.total, 2 * 66 + 6 + attention + norms + dense + moe);
        assert_eq!(p.active, p.total - 6 * expert);
        assert_eq!(p.active_without_embedding, p.active - 66);
        assert_eq!(p.mtp, moe + 2 * 36 + 3 * 6);
        assert_eq!((p.biases, p.mtp_biases), (8, 8));

        let active_moe = attention + gate + 3 * expert;
        let main = 2.0 * (attention + dense + active_moe + 66) as f64;
        let f = Flops::forward(&c, 10.0);
        assert_eq!(f.main, main + 2.0 * 2.0 * 10.0 * (2 * (5 + 7)) as f64);
        assert_eq!(f.mtp, 2.0 * (active_moe + 72 + 66) as f64 + 2.0 * 10.0 * 24.0);
        assert_eq!(Flops::training(&c, 19).total(), 3.0 * f.total());
    }

    #[test]
    fn cache_of_published_models() {
        let v3 = preset("v3");
        assert_eq!(cache_bytes_per_token(&v3, DType::Bf16), 70_272);
        assert_eq!(mha_cache_bytes_per_token(&v3, DType::Bf16), 4_997_120);
        assert_eq!(cache_bytes_per_token(&preset("v2-lite"), DType::Bf16), 31_104);
    }

    #[test]
    fn training_memory_by_part() {
        let c = preset("nano");
        let layout = Layout::new(&c, Scope::whole(&c));
        let n = layout.len;
        let activations = Activations { saved: 1000, working: 10, workers: 7 };
        let m = TrainingMemory::of(&layout, Precision::Bf16, DType::F32, activations);
        assert_eq!((m.masters, m.compute, m.moments), (4 * n, 2 * n, 8 * n));
        assert_eq!(m.gradients, 4 * n + 4 * 2 * 4096 * 256);
        assert_eq!(m.state(), 18 * n + 4 * 2 * 4096 * 256);
        assert_eq!(m.total(), m.state() + 1010 + m.process);
        let f = TrainingMemory::of(&layout, Precision::Fp32, DType::Bf16, Activations::default());
        assert_eq!((f.compute, f.moments), (0, 4 * n));
    }
}
