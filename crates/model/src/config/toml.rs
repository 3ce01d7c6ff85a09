//! Our own `[model]` table: `preset = "nano"` and the keys that differ from it, or `family` and all keys. Names are
//! those of [`ModelConfig`]; `"none"` stands for an absent value. A key that changes nothing is an error.

use super::keys::{Keys, show};
use super::{ConfigError, Family, ModelConfig, MtpHidden, Rope, Yarn, hf};
use hadal_kernels::ops::router::Scoring;
use serde_json::{Map, Value};

type Result<T> = std::result::Result<T, ConfigError>;

impl ModelConfig {
    /// Reads a `[model]` table.
    pub fn from_toml_table(table: &toml::Table) -> Result<Self> {
        read(table).map_err(|e| e.at("[model]"))
    }
}

fn read(table: &toml::Table) -> Result<ModelConfig> {
    // Through JSON, so that one reader serves both; what JSON has no word for (a date, NaN) fails as a wrong type.
    let value = serde_json::to_value(table).map_err(|e| ConfigError::value("model", "plain TOML values", e))?;
    let map: &Map<String, Value> = value.as_object().expect("a TOML table becomes a JSON object");
    let mut keys = Keys::new("", map);
    let preset = keys.str("preset")?.map(ModelConfig::preset).transpose()?;
    let complete = preset.is_none();
    let mut c = start(&mut keys, preset)?;
    fields(&mut keys, &mut c, complete)?;
    if let Some(key) = keys.unknown().next() {
        let (key, expected) = (keys.name(key), keys.known());
        return Err(ConfigError::Unknown { origin: String::new(), key, expected });
    }
    effective(&keys, &c)?;
    c.validate()?;
    tokens_exist(&c)?;
    Ok(c)
}

/// The preset, or a family's meanings with the sizes still to be filled in.
fn start(keys: &mut Keys<'_>, preset: Option<ModelConfig>) -> Result<ModelConfig> {
    let family = match keys.str("family")? {
        Some("v2") => Some(Family::V2),
        Some("v3") => Some(Family::V3),
        Some(other) => return Err(ConfigError::value("family", "\"v2\" or \"v3\"", show(&other.into()))),
        None => None,
    };
    match (preset, family) {
        (Some(p), None) => Ok(p),
        (Some(p), Some(f)) if p.family == f => Ok(p),
        (Some(_), Some(_)) => Err(ConfigError::ineffective("family", "the preset has another")),
        (None, None) => Err(ConfigError::missing("family", "\"v2\" or \"v3\", or preset = \"...\"")),
        (None, Some(Family::V3)) => ModelConfig::preset("v3").map(blank),
        (None, Some(Family::V2)) => ModelConfig::preset("v2-lite").map(blank),
    }
}

/// Values that a complete table may leave out, because they are choices and not sizes.
fn blank(c: ModelConfig) -> ModelConfig {
    let rope = Rope { yarn: None, ..c.rope };
    ModelConfig { q_lora_rank: None, rope, n_group: 1, topk_group: 1, bos_token_id: None, eos_token_ids: vec![], ..c }
}

/// Writes `key`'s value to `to`; a complete table must have it.
fn put<T>(found: Option<T>, key: &str, to: &mut T, needed: bool) -> Result<()> {
    match found {
        Some(v) => *to = v,
        None if needed => return Err(ConfigError::missing(key, "a value (or preset = \"...\")")),
        None => {}
    }
    Ok(())
}

fn fields(keys: &mut Keys<'_>, c: &mut ModelConfig, complete: bool) -> Result<()> {
    put(keys.bool("group_limited")?, "group_limited", &mut c.group_limited, false)?;
    for (key, to) in [
        ("num_hidden_layers", &mut c.num_hidden_layers),
        ("first_k_dense_replace", &mut c.first_k_dense_replace),
        ("num_nextn_predict_layers", &mut c.num_nextn_predict_layers),
    ] {
        put(keys.usize(key)?, key, to, complete)?;
    }
    // A model without experts, or without dense layers, needs no sizes of theirs.
    let (moe, dense) = (complete && c.has_experts(), complete && c.first_k_dense_replace > 0);
    let grouped = moe && c.group_limited;
    for (key, to, needed) in [
        ("vocab_size", &mut c.vocab_size, complete),
        ("hidden_size", &mut c.hidden_size, complete),
        ("intermediate_size", &mut c.intermediate_size, dense),
        ("moe_intermediate_size", &mut c.moe_intermediate_size, moe),
        ("num_attention_heads", &mut c.num_attention_heads, complete),
        ("kv_lora_rank", &mut c.kv_lora_rank, complete),
        ("qk_nope_head_dim", &mut c.qk_nope_head_dim, complete),
        ("qk_rope_head_dim", &mut c.qk_rope_head_dim, complete),
        ("v_head_dim", &mut c.v_head_dim, complete),
        ("n_routed_experts", &mut c.n_routed_experts, moe),
        ("n_shared_experts", &mut c.n_shared_experts, moe),
        ("num_experts_per_tok", &mut c.num_experts_per_tok, moe),
        ("n_group", &mut c.n_group, grouped),
        ("topk_group", &mut c.topk_group, grouped),
        ("max_position_embeddings", &mut c.max_position_embeddings, complete),
    ] {
        put(keys.usize(key)?, key, to, needed)?;
    }
    for (key, to, needed) in [
        ("routed_scaling_factor", &mut c.routed_scaling_factor, moe),
        ("rms_norm_eps", &mut c.rms_norm_eps, complete),
        ("initializer_range", &mut c.initializer_range, complete),
    ] {
        put(keys.f64(key)?, key, to, needed)?;
    }
    put(keys.bool("correction_bias")?, "correction_bias", &mut c.correction_bias, false)?;
    put(keys.bool("norm_topk_prob")?, "norm_topk_prob", &mut c.norm_topk_prob, moe)?;
    c.q_lora_rank = optional(keys, "q_lora_rank", c.q_lora_rank)?;
    words(keys, c)?;
    token_ids(keys, c)?;
    rope(keys, c, complete)
}

fn is_none(v: &Value) -> bool {
    v.as_str() == Some("none")
}

fn optional(keys: &mut Keys<'_>, key: &'static str, default: Option<usize>) -> Result<Option<usize>> {
    if keys.raw(key).is_some_and(is_none) { Ok(None) } else { Ok(keys.usize(key)?.or(default)) }
}

fn words(keys: &mut Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    c.scoring = match keys.str("scoring")? {
        None => c.scoring,
        Some("sigmoid") => Scoring::Sigmoid,
        Some("softmax") => Scoring::Softmax,
        Some(other) => {
            return Err(ConfigError::value("scoring", "\"sigmoid\" or \"softmax\"", show(&other.into())));
        }
    };
    c.mtp_hidden = match keys.str("mtp_hidden")? {
        None => c.mtp_hidden,
        Some("post_norm") => MtpHidden::PostNorm,
        Some("pre_norm") => MtpHidden::PreNorm,
        Some(other) => {
            return Err(ConfigError::value("mtp_hidden", "\"post_norm\" or \"pre_norm\"", show(&other.into())));
        }
    };
    Ok(())
}

fn token_ids(keys: &mut Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    let small = |n: usize, key: &str| u32::try_from(n).map_err(|_| ConfigError::value(key, "a token id", n));
    // A preset's are those of its own vocabulary; a smaller one may not have them.
    let vocabulary = c.vocab_size;
    c.bos_token_id = c.bos_token_id.filter(|&id| (id as usize) < vocabulary);
    c.eos_token_ids.retain(|&id| (id as usize) < vocabulary);
    let bos = optional(keys, "bos_token_id", c.bos_token_id.map(|id| id as usize))?;
    c.bos_token_id = bos.map(|n| small(n, "bos_token_id")).transpose()?;
    if let Some(v) = keys.raw("eos_token_ids") {
        let id = |v: &Value| super::keys::as_usize(v).and_then(|n| u32::try_from(n).ok());
        let ids = v.as_array().and_then(|a| a.iter().map(id).collect());
        c.eos_token_ids = ids.ok_or_else(|| ConfigError::value("eos_token_ids", "a list of token ids", show(v)))?;
    }
    Ok(())
}

fn rope(keys: &mut Keys<'_>, c: &mut ModelConfig, complete: bool) -> Result<()> {
    let Some(map) = keys.table("rope")? else {
        return if complete { Err(ConfigError::missing("rope", "a table with theta")) } else { Ok(()) };
    };
    let mut rope = Keys::new("rope.", map);
    put(rope.f64("theta")?, "rope.theta", &mut c.rope.theta, complete)?;
    put(rope.bool("interleaved")?, "rope.interleaved", &mut c.rope.interleaved, false)?;
    if rope.raw("yarn").is_some_and(is_none) {
        c.rope.yarn = None;
    } else if let Some(map) = rope.table("yarn")? {
        c.rope.yarn = Some(yarn(map, c.max_position_embeddings)?);
    }
    no_more(&rope)
}

/// A YaRN table is always whole: half of a preset's numbers with half of others would be nobody's intention.
fn yarn(map: &Map<String, Value>, positions: usize) -> Result<Yarn> {
    let mut keys = Keys::new("rope.yarn.", map);
    let yarn = hf::yarn(&mut keys, None, positions)?;
    no_more(&keys)?;
    let idle = match (yarn.attention_factor, yarn.mscale_all_dim) {
        (Some(_), _) => Some("attention_factor replaces it"),
        (None, None) => Some("it needs mscale_all_dim"),
        (None, Some(_)) => None,
    };
    match (yarn.mscale, idle) {
        (Some(_), Some(why)) => Err(ConfigError::ineffective("rope.yarn.mscale", why)),
        _ => Ok(yarn),
    }
}

fn no_more(keys: &Keys<'_>) -> Result<()> {
    match keys.unknown().next() {
        None => Ok(()),
        Some(key) => Err(ConfigError::Unknown { origin: String::new(), key: keys.name(key), expected: keys.known() }),
    }
}

/// Keys that only layers with experts read.
pub(super) const EXPERT_KEYS: [&str; 11] = [
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "group_limited",
    "n_group",
    "topk_group",
    "scoring",
    "correction_bias",
    "norm_topk_prob",
    "routed_scaling_factor",
];

/// Keys that are there and change nothing.
fn effective(keys: &Keys<'_>, c: &ModelConfig) -> Result<()> {
    if let Some(key) = EXPERT_KEYS.into_iter().find(|k| !c.has_experts() && keys.has(k)) {
        let why = "no layer has experts (first_k_dense_replace = num_hidden_layers and no MTP layer)";
        return Err(ConfigError::ineffective(key, why));
    }
    if keys.has("intermediate_size") && c.first_k_dense_replace == 0 {
        return Err(ConfigError::ineffective("intermediate_size", "no layer is dense (first_k_dense_replace = 0)"));
    }
    let greedy = ["n_group", "topk_group"].into_iter().find(|k| !c.group_limited && keys.has(k));
    if let Some(key) = greedy {
        return Err(ConfigError::ineffective(key, "group_limited is false"));
    }
    if keys.has("mtp_hidden") && c.num_nextn_predict_layers == 0 {
        return Err(ConfigError::ineffective("mtp_hidden", "num_nextn_predict_layers is 0"));
    }
    Ok(())
}

fn tokens_exist(c: &ModelConfig) -> Result<()> {
    let bos = c.bos_token_id.map(|id| ("bos_token_id", id));
    let all = bos.into_iter().chain(c.eos_token_ids.iter().map(|&id| ("eos_token_ids", id)));
    for (key, id) in all {
        if id as usize >= c.vocab_size {
            return Err(ConfigError::value(key, format!("below vocab_size = {}", c.vocab_size), id));
        }
    }
    Ok(())
}
