//! `config.json` of Hugging Face, written in the layout of published files: every reader of either age understands
//! `rope_theta` with `rope_scaling`, and one spelling leaves nothing to disagree.

use super::{Family, ModelConfig, MtpHidden, Yarn};
use hadal_kernels::DType;
use serde_json::{Value, json};

impl ModelConfig {
    /// The `config.json` of this model, its tensors stored in `dtype` (F32 or BF16).
    pub fn to_hf_json(&self, dtype: DType) -> Value {
        let v3 = self.family == Family::V3;
        let mut out = json!({
            "architectures": [if v3 { "DeepseekV3ForCausalLM" } else { "DeepseekV2ForCausalLM" }],
            "model_type": if v3 { "deepseek_v3" } else { "deepseek_v2" },
            "torch_dtype": if dtype == DType::F32 { "float32" } else { "bfloat16" },
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "first_k_dense_replace": self.first_k_dense_replace,
            "moe_layer_freq": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": self.n_shared_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "topk_method": self.topk_method(),
            "scoring_func": if v3 { "sigmoid" } else { "softmax" },
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.yarn.as_ref().map(rope_scaling),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "hidden_act": "silu",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "tie_word_embeddings": false,
            "use_cache": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                many => json!(many),
            },
        });
        if v3 {
            out["rope_interleave"] = json!(self.rope.interleaved);
            out["num_nextn_predict_layers"] = json!(self.num_nextn_predict_layers);
            out["hadal_mtp_hidden"] = json!(match self.mtp_hidden {
                MtpHidden::PostNorm => "post_norm",
                MtpHidden::PreNorm => "pre_norm",
            });
        }
        out
    }

    fn topk_method(&self) -> &'static str {
        match (self.family, self.group_limited) {
            (Family::V3, _) => "noaux_tc",
            (Family::V2, true) => "group_limited_greedy",
            (Family::V2, false) => "greedy",
        }
    }
}

fn rope_scaling(y: &Yarn) -> Value {
    let mut out = json!({
        "type": "yarn",
        "factor": y.factor,
        "original_max_position_embeddings": y.original_max_position_embeddings,
        "beta_fast": y.beta_fast,
        "beta_slow": y.beta_slow,
    });
    let options =
        [("mscale", y.mscale), ("mscale_all_dim", y.mscale_all_dim), ("attention_factor", y.attention_factor)];
    for (key, x) in options {
        if let Some(x) = x {
            out[key] = json!(x);
        }
    }
    if !y.truncate {
        out["truncate"] = json!(false);
    }
    out
}
