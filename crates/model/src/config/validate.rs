//! Whether a configuration describes a model: every size positive, every pair of sizes consistent, and nothing so large
//! that an offset could overflow or a table fill the memory.

use super::{ConfigError, Family, ModelConfig, MtpHidden, Yarn};
use hadal_kernels::ops::router::Scoring;

type Check = Result<(), ConfigError>;

/// Largest single dimension: far above any model, small enough that a product of two never overflows.
const MAX_SIZE: usize = 1 << 24;
/// Most layers.
const MAX_LAYERS: usize = 1 << 12;
/// Most elements of all weights together.
const MAX_ELEMENTS: u128 = 1 << 46;
/// Most tensors under published names (V3 has about 46 thousand).
const MAX_TENSORS: usize = 1 << 18;
/// Most positions: rotary angles are f32, ids i32.
const MAX_POSITIONS: usize = 1 << 30;

fn ensure(ok: bool, key: &str, expected: impl FnOnce() -> String, found: impl std::fmt::Display) -> Check {
    if ok { Ok(()) } else { Err(ConfigError::value(key, expected(), found)) }
}

fn within(key: &str, found: usize, lo: usize, hi: usize) -> Check {
    ensure((lo..=hi).contains(&found), key, || format!("{lo} to {hi}"), found)
}

impl ModelConfig {
    /// Checks that the configuration is complete and consistent. A valid one can be laid out, run and written as a
    /// file that other tools load.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.sizes()?;
        self.experts()?;
        self.family_rules()?;
        self.rope_rules()?;
        // Computed with in f32: what overflows or vanishes there is as good as infinite or 0.
        let fine = |x: f64| (x as f32).is_finite() && x as f32 > 0.0;
        let positive = |key, x: f64| ensure(fine(x), key, || "a number above 0 that f32 holds".into(), x);
        positive("rms_norm_eps", self.rms_norm_eps)?;
        positive("routed_scaling_factor", self.routed_scaling_factor)?;
        let std = self.initializer_range;
        ensure(
            (std as f32).is_finite() && std >= 0.0,
            "initializer_range",
            || "a finite number of at least 0".into(),
            std,
        )?;
        self.extent()
    }

    fn sizes(&self) -> Check {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
        ];
        sizes.iter().try_for_each(|&(key, n)| within(key, n, 1, MAX_SIZE))?;
        let r = self.qk_rope_head_dim;
        let even = || format!("an even number from 2 to {MAX_SIZE} (rotary pairs)");
        ensure((2..=MAX_SIZE).contains(&r) && r.is_multiple_of(2), "qk_rope_head_dim", even, r)?;
        within("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)?;
        within("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)?;
        within("num_nextn_predict_layers", self.num_nextn_predict_layers, 0, MAX_LAYERS)?;
        let k = self.first_k_dense_replace;
        let layers = || format!("at most num_hidden_layers = {}", self.num_hidden_layers);
        ensure(k <= self.num_hidden_layers, "first_k_dense_replace", layers, k)
    }

    fn experts(&self) -> Check {
        let (e, k) = (self.n_routed_experts, self.num_experts_per_tok);
        within("n_routed_experts", e, 1, 1 << 16)?;
        within("n_shared_experts", self.n_shared_experts, 0, 1 << 10)?;
        let (groups, kept) = (self.n_group, self.topk_group);
        let divisor = || format!("a divisor of n_routed_experts = {e}");
        ensure(groups > 0 && e.is_multiple_of(groups), "n_group", divisor, groups)?;
        ensure((1..=groups).contains(&kept), "topk_group", || format!("1 to n_group = {groups}"), kept)?;
        let eligible = kept * (e / groups);
        let most = || format!("1 to {eligible}, the experts in topk_group = {kept} of {groups} groups");
        ensure((1..=eligible).contains(&k), "num_experts_per_tok", most, k)
    }

    fn family_rules(&self) -> Check {
        let (groups, e) = (self.n_group, self.n_routed_experts);
        match self.family {
            Family::V3 => {
                let sigmoid = || "sigmoid (deepseek_v3)".to_string();
                ensure(self.scoring == Scoring::Sigmoid, "scoring", sigmoid, "softmax")?;
                ensure(self.group_limited, "group_limited", || "true (deepseek_v3)".into(), false)?;
                ensure(self.correction_bias, "correction_bias", || "true (deepseek_v3)".into(), false)?;
                // A group is judged by its two best experts, also where there is one group only.
                let two = || format!("at least 2 experts in a group (n_routed_experts = {e})");
                ensure(e / groups >= 2, "n_group", two, groups)
            }
            Family::V2 => {
                let softmax = || "softmax (deepseek_v2)".to_string();
                ensure(self.scoring == Scoring::Softmax, "scoring", softmax, "sigmoid")?;
                ensure(!self.correction_bias, "correction_bias", || "false (deepseek_v2)".into(), true)?;
                ensure(!self.norm_topk_prob, "norm_topk_prob", || "false (deepseek_v2)".into(), true)?;
                let one = || "1 (greedy selection knows no groups)".to_string();
                ensure(self.group_limited || groups == 1, "n_group", one, groups)?;
                let depth = self.num_nextn_predict_layers;
                ensure(depth == 0, "num_nextn_predict_layers", || "0 (deepseek_v2)".into(), depth)?;
                ensure(self.mtp_hidden == MtpHidden::PostNorm, "mtp_hidden", || "post_norm".into(), "pre_norm")?;
                ensure(self.rope.interleaved, "rope.interleaved", || "true (deepseek_v2)".into(), false)?;
                let (d, h) = (self.hidden_size, self.num_attention_heads);
                let multiple = || format!("a divisor of hidden_size = {d} (deepseek_v2)");
                ensure(d.is_multiple_of(h), "num_attention_heads", multiple, h)
            }
        }
    }

    fn rope_rules(&self) -> Check {
        let theta = self.rope.theta;
        ensure(theta.is_finite() && theta > 1.0, "rope.theta", || "a finite number above 1".into(), theta)?;
        let Some(y) = self.rope.yarn else { return Ok(()) };
        let Yarn { factor, beta_fast, beta_slow, .. } = y;
        ensure(
            factor.is_finite() && factor >= 1.0,
            "rope.yarn.factor",
            || "a finite number of at least 1".into(),
            factor,
        )?;
        within("rope.yarn.original_max_position_embeddings", y.original_max_position_embeddings, 1, MAX_POSITIONS)?;
        let above = || "a finite number above 0".to_string();
        ensure(beta_slow.is_finite() && beta_slow > 0.0, "rope.yarn.beta_slow", above, beta_slow)?;
        let more = || format!("a finite number above beta_slow = {beta_slow}");
        ensure(beta_fast.is_finite() && beta_fast > beta_slow, "rope.yarn.beta_fast", more, beta_fast)?;
        let keys = [("mscale", y.mscale), ("mscale_all_dim", y.mscale_all_dim)];
        for (key, x) in keys.map(|(k, x)| (k, x.unwrap_or(0.0))) {
            let key = format!("rope.yarn.{key}");
            ensure(x.is_finite() && x >= 0.0, &key, || "a finite number of at least 0".into(), x)?;
        }
        let factor = y.attention_factor.unwrap_or(1.0);
        ensure(factor.is_finite() && factor > 0.0, "rope.yarn.attention_factor", above, factor)
    }

    /// Bounds on all weights together, by arithmetic that cannot overflow: sizes are below 2^24 here.
    fn extent(&self) -> Check {
        let n = |x: usize| x as u128;
        let (d, h) = (n(self.hidden_size), n(self.num_attention_heads));
        let heads = h * n(self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim);
        let attention = heads * (d + n(self.q_lora_rank.unwrap_or(0)) + n(self.kv_lora_rank));
        let experts = 3 * d * n(self.moe_intermediate_size) * n(self.n_routed_experts + self.n_shared_experts);
        let layer = attention + experts + 3 * d * n(self.intermediate_size);
        let layers = self.num_hidden_layers + self.num_nextn_predict_layers;
        let elements = 2 * n(self.vocab_size) * d + n(layers) * layer;
        let most = || format!("sizes whose weights hold at most {MAX_ELEMENTS} elements");
        ensure(elements <= MAX_ELEMENTS, "num_hidden_layers", most, format!("about {elements} elements"))?;
        let tensors = layers * (20 + 3 * self.n_routed_experts);
        let fewer = || format!("layers and experts of at most {MAX_TENSORS} tensors");
        ensure(tensors <= MAX_TENSORS, "n_routed_experts", fewer, format!("about {tensors} tensors"))
    }
}
