//! A model as the `[model]` table that `toml` reads: every key that means something, none that would change nothing.

use super::{Family, ModelConfig, MtpHidden, Rope, Yarn};
use hadal_kernels::ops::router::Scoring;
use toml::{Table, Value};

/// What stands for an absent value.
const NONE: &str = "none";

impl ModelConfig {
    /// The whole model as a `[model]` table without a preset. Reading it gives this model; fields that this model has
    /// no use for (the width of experts that are not there) become the family's.
    pub fn to_toml_table(&self) -> Table {
        let mut t = Table::new();
        let family = if self.family == Family::V3 { "v3" } else { "v2" };
        t.insert("family".into(), family.into());
        t.insert("vocab_size".into(), int(self.vocab_size));
        t.insert("hidden_size".into(), int(self.hidden_size));
        if self.first_k_dense_replace > 0 {
            t.insert("intermediate_size".into(), int(self.intermediate_size));
        }
        t.insert("num_hidden_layers".into(), int(self.num_hidden_layers));
        t.insert("first_k_dense_replace".into(), int(self.first_k_dense_replace));
        t.insert("num_attention_heads".into(), int(self.num_attention_heads));
        t.insert("q_lora_rank".into(), self.q_lora_rank.map_or(NONE.into(), int));
        t.insert("kv_lora_rank".into(), int(self.kv_lora_rank));
        t.insert("qk_nope_head_dim".into(), int(self.qk_nope_head_dim));
        t.insert("qk_rope_head_dim".into(), int(self.qk_rope_head_dim));
        t.insert("v_head_dim".into(), int(self.v_head_dim));
        if self.has_experts() {
            self.put_experts(&mut t);
        }
        t.insert("max_position_embeddings".into(), int(self.max_position_embeddings));
        t.insert("rms_norm_eps".into(), self.rms_norm_eps.into());
        t.insert("initializer_range".into(), self.initializer_range.into());
        t.insert("num_nextn_predict_layers".into(), int(self.num_nextn_predict_layers));
        if self.num_nextn_predict_layers > 0 {
            let word = if self.mtp_hidden == MtpHidden::PostNorm { "post_norm" } else { "pre_norm" };
            t.insert("mtp_hidden".into(), word.into());
        }
        t.insert("bos_token_id".into(), self.bos_token_id.map_or(NONE.into(), Value::from));
        t.insert("eos_token_ids".into(), self.eos_token_ids.clone().into());
        t.insert("rope".into(), rope(&self.rope).into());
        t
    }

    fn put_experts(&self, t: &mut Table) {
        t.insert("moe_intermediate_size".into(), int(self.moe_intermediate_size));
        t.insert("n_routed_experts".into(), int(self.n_routed_experts));
        t.insert("n_shared_experts".into(), int(self.n_shared_experts));
        t.insert("num_experts_per_tok".into(), int(self.num_experts_per_tok));
        t.insert("group_limited".into(), self.group_limited.into());
        if self.group_limited {
            t.insert("n_group".into(), int(self.n_group));
            t.insert("topk_group".into(), int(self.topk_group));
        }
        let scoring = if self.scoring == Scoring::Sigmoid { "sigmoid" } else { "softmax" };
        t.insert("scoring".into(), scoring.into());
        t.insert("correction_bias".into(), self.correction_bias.into());
        t.insert("norm_topk_prob".into(), self.norm_topk_prob.into());
        t.insert("routed_scaling_factor".into(), self.routed_scaling_factor.into());
    }
}

/// Sizes of a validated model are far below i64's largest.
fn int(n: usize) -> Value {
    Value::Integer(i64::try_from(n).unwrap_or(i64::MAX))
}

fn rope(r: &Rope) -> Table {
    let yarn = r.yarn.as_ref().map_or(NONE.into(), |y| Value::Table(yarn(y)));
    [("theta", r.theta.into()), ("interleaved", r.interleaved.into()), ("yarn", yarn)]
        .map(|(key, value)| (key.to_string(), value))
        .into_iter()
        .collect()
}

fn yarn(y: &Yarn) -> Table {
    // mscale counts only beside mscale_all_dim, and attention_factor replaces both there.
    let mscale = y.mscale.filter(|_| y.attention_factor.is_none() && y.mscale_all_dim.is_some());
    let optional = [("mscale", mscale), ("mscale_all_dim", y.mscale_all_dim), ("attention_factor", y.attention_factor)];
    let optional = optional.into_iter().filter_map(|(key, x)| Some((key, Value::from(x?))));
    [
        ("factor", y.factor.into()),
        ("original_max_position_embeddings", int(y.original_max_position_embeddings)),
        ("beta_fast", y.beta_fast.into()),
        ("beta_slow", y.beta_slow.into()),
        ("truncate", y.truncate.into()),
    ]
    .into_iter()
    .chain(optional)
    .map(|(key, value)| (key.to_string(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;

    /// What reading the written table gives, through text.
    fn again(c: &ModelConfig) -> ModelConfig {
        let text = toml::to_string(&c.to_toml_table()).unwrap();
        ModelConfig::from_toml_table(&text.parse().unwrap()).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    #[test]
    fn presets_come_back() {
        for name in PRESETS {
            let c = ModelConfig::preset(name).unwrap();
            let effective =
                if c.group_limited { c.clone() } else { ModelConfig { n_group: 1, topk_group: 1, ..c.clone() } };
            assert_eq!(again(&c), effective, "{name}");
        }
    }

    #[test]
    fn every_choice_comes_back() {
        let nano = ModelConfig::preset("nano").unwrap();
        let y = Yarn {
            factor: 2.5,
            original_max_position_embeddings: 256,
            beta_fast: 31.0,
            beta_slow: 2.0,
            mscale: None,
            mscale_all_dim: Some(0.1),
            attention_factor: Some(1.1),
            truncate: false,
        };
        let rope = |yarn| Rope { yarn, ..nano.rope };
        let cases = [
            ModelConfig { q_lora_rank: None, mtp_hidden: MtpHidden::PreNorm, ..nano.clone() },
            ModelConfig { bos_token_id: None, eos_token_ids: vec![5, 7], ..nano.clone() },
            ModelConfig { scoring: Scoring::Softmax, correction_bias: false, norm_topk_prob: false, ..nano.clone() },
            ModelConfig { group_limited: false, n_group: 1, topk_group: 1, ..nano.clone() },
            ModelConfig { rms_norm_eps: 0.1 + 0.2, initializer_range: 1e-300, ..nano.clone() },
            ModelConfig { rope: rope(Some(y)), ..nano.clone() },
            ModelConfig { rope: rope(Some(Yarn { attention_factor: None, mscale: Some(0.3), ..y })), ..nano.clone() },
            ModelConfig { rope: Rope { theta: 12345.678, interleaved: false, yarn: None }, ..nano.clone() },
        ];
        for c in cases {
            assert_eq!(again(&c), c);
        }
    }

    /// Fields without a use are not written, and what comes back writes the same table.
    #[test]
    fn writing_again_changes_nothing() {
        let nano = ModelConfig::preset("nano").unwrap();
        let dense = ModelConfig { first_k_dense_replace: 6, num_nextn_predict_layers: 0, ..nano.clone() };
        let no_dense = ModelConfig { first_k_dense_replace: 0, ..nano.clone() };
        let greedy = ModelConfig { group_limited: false, ..nano.clone() };
        for (c, key) in [(dense, "n_routed_experts"), (no_dense, "intermediate_size"), (greedy, "n_group")] {
            let table = c.to_toml_table();
            assert!(!table.contains_key(key), "{key}");
            assert_eq!(again(&c).to_toml_table(), table);
        }
    }
}
