//! `config.json` of Hugging Face, read. Published files (4.x) and those that transformers 5.x writes spell rope and
//! dtype differently; an absent key means the family's default there, which null does not. A key is known and used,
//! known to change nothing ([`INERT`]), or unknown and named in a warning; a meaning that we do not have is an error.

use super::keys::{Keys, as_usize, show};
use super::{ConfigError, Family, ModelConfig, MtpHidden, Rope, Yarn, quantization};
use hadal_kernels::ops::router::Scoring;
use serde_json::{Map, Value};
use std::path::Path;

type Result<T> = std::result::Result<T, ConfigError>;

/// Keys accepted in silence, because no value of theirs changes the model's function.
const INERT: &[&str] = &[
    // What wrote the file, and how its code is found.
    "_name_or_path",
    "transformers_version",
    "auto_map",
    "tokenizer_class",
    // The dtype of the tensors is read from the tensors.
    "torch_dtype",
    "dtype",
    // How the writer ran it.
    "use_cache",
    "output_router_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
    "pretraining_tp",
    "ep_size",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    // Derived from qk_nope_head_dim and qk_rope_head_dim; head_dim is the rope width here.
    "head_dim",
    "qk_head_dim",
    // Of training losses, which belong to a training run.
    "aux_loss_alpha",
    "seq_aux",
    "router_aux_loss_coef",
    // Padding is not part of a packed batch.
    "pad_token_id",
];

/// Keys with one supported meaning: the values that mean it, and how a message says so. Null always means it.
const FIXED: &[(&str, &[&str], &str)] = &[
    ("attention_bias", &["false"], "false (no bias in attention)"),
    ("mlp_bias", &["false"], "false (no bias in feed-forward layers)"),
    ("attention_dropout", &["0", "0.0"], "0 (no dropout)"),
    ("hidden_act", &["\"silu\""], "\"silu\" (SwiGLU)"),
    ("tie_word_embeddings", &["false"], "false (embedding and head are two tensors)"),
    ("moe_layer_freq", &["1", "1.0"], "1 (every layer after first_k_dense_replace has experts)"),
    ("partial_rotary_factor", &["1", "1.0"], "1 (all of qk_rope_head_dim is rotated)"),
    ("mtp_hidden_states_first", &["false"], "false (eh_proj reads the embedding first)"),
    ("index_topk", &[], "none (sparse attention is not supported)"),
    ("sliding_window", &[], "none (attention sees the whole context)"),
];

/// What a family's absent keys mean in transformers.
struct Defaults {
    sizes: [(&'static str, usize); 14],
    n_group: usize,
    topk_group: usize,
    top_k: Option<usize>,
    norm_topk_prob: bool,
    scale: f64,
    mtp: usize,
    bos: u32,
    eos: u32,
}

const V3: Defaults = Defaults {
    sizes: [
        ("vocab_size", 129280),
        ("hidden_size", 7168),
        ("intermediate_size", 18432),
        ("moe_intermediate_size", 2048),
        ("num_hidden_layers", 61),
        ("first_k_dense_replace", 3),
        ("num_attention_heads", 128),
        ("kv_lora_rank", 512),
        ("qk_nope_head_dim", 128),
        ("qk_rope_head_dim", 64),
        ("v_head_dim", 128),
        ("n_routed_experts", 256),
        ("n_shared_experts", 1),
        ("max_position_embeddings", 4096),
    ],
    n_group: 8,
    topk_group: 4,
    top_k: Some(8),
    norm_topk_prob: true,
    scale: 2.5,
    mtp: 1,
    bos: 0,
    eos: 1,
};

const V2: Defaults = Defaults {
    sizes: [
        ("vocab_size", 102400),
        ("hidden_size", 4096),
        ("intermediate_size", 11008),
        ("moe_intermediate_size", 1407),
        ("num_hidden_layers", 32),
        ("first_k_dense_replace", 0),
        ("num_attention_heads", 32),
        ("kv_lora_rank", 512),
        ("qk_nope_head_dim", 128),
        ("qk_rope_head_dim", 64),
        ("v_head_dim", 128),
        ("n_routed_experts", 64),
        ("n_shared_experts", 2),
        ("max_position_embeddings", 2048),
    ],
    n_group: 1,
    topk_group: 1,
    top_k: None,
    norm_topk_prob: false,
    scale: 1.0,
    mtp: 0,
    bos: 1,
    eos: 2,
};

/// Largest file that is read: far above any configuration.
pub(super) const MAX_BYTES: u64 = 16 << 20;

impl ModelConfig {
    /// Reads a `config.json`. Beside the configuration: warnings, one line each, of keys that were not understood.
    /// `num_nextn_predict_layers` is what the file says, though a file may claim layers that its weights lack: see
    /// [`crate::Checkpoint::mtp_layers`].
    pub fn from_hf(path: &Path) -> Result<(Self, Vec<String>)> {
        Self::from_map(&quantization::read_object(path)?, &path.display().to_string())
    }

    /// As [`ModelConfig::from_hf`], from the bytes of the file called `place` in messages.
    pub fn from_hf_json(bytes: &[u8], place: &str) -> Result<(Self, Vec<String>)> {
        Self::from_map(&quantization::parse_object(bytes, place)?, place)
    }

    fn from_map(map: &Map<String, Value>, place: &str) -> Result<(Self, Vec<String>)> {
        let (config, warnings) = read(map).map_err(|e| e.at(place))?;
        Ok((config, warnings.into_iter().map(|w| format!("{place}: {w}")).collect()))
    }
}

fn read(map: &Map<String, Value>) -> Result<(ModelConfig, Vec<String>)> {
    let mut keys = Keys::new("", map);
    let mut warnings = Vec::new();
    for &(key, allowed, expected) in FIXED {
        match keys.raw(key) {
            Some(v) if !v.is_null() && !allowed.contains(&v.to_string().as_str()) => {
                return Err(ConfigError::value(key, expected, show(v)));
            }
            _ => {}
        }
    }
    let family = family(&mut keys, &mut warnings)?;
    // How the tensors are stored changes nothing of the model; what cannot be read is refused here already.
    quantization::read(&mut keys, &mut warnings)?;
    let config = model(&mut keys, family, &mut warnings)?;
    config.validate()?;
    for key in INERT {
        let _ = keys.raw(key);
    }
    warnings.extend(keys.unknown().map(|k| format!("unknown key {}: ignored", keys.name(k))));
    let ids = config.bos_token_id.iter().chain(&config.eos_token_ids);
    for id in ids.filter(|&&id| id as usize >= config.vocab_size) {
        warnings.push(format!("token id {id} (bos or eos): vocab_size is {}", config.vocab_size));
    }
    Ok((config, warnings))
}

fn family(keys: &mut Keys<'_>, warnings: &mut Vec<String>) -> Result<Family> {
    let supported = "\"deepseek_v3\" or \"deepseek_v2\"";
    let (family, class) = match keys.str("model_type")? {
        Some("deepseek_v3") => (Family::V3, "DeepseekV3ForCausalLM"),
        Some("deepseek_v2") => (Family::V2, "DeepseekV2ForCausalLM"),
        Some(other) => return Err(ConfigError::value("model_type", supported, show(&other.into()))),
        None => return Err(ConfigError::missing("model_type", supported)),
    };
    if let Some(v) = keys.raw("architectures")
        && !v.is_null()
        && !v.as_array().is_some_and(|a| a.iter().any(|x| x == class))
    {
        warnings.push(format!("architectures: read as [\"{class}\"], found {}", show(v)));
    }
    Ok(family)
}

fn model(keys: &mut Keys<'_>, family: Family, warnings: &mut Vec<String>) -> Result<ModelConfig> {
    let d = if family == Family::V3 { &V3 } else { &V2 };
    aliases(keys, family)?;
    let mut sizes = [0; 14];
    for (size, &(key, default)) in sizes.iter_mut().zip(&d.sizes) {
        *size = match (key, keys.raw(key)) {
            ("n_routed_experts", None) => keys.usize(experts_alias(family))?.unwrap_or(default),
            ("n_shared_experts", Some(Value::Null)) => 0,
            _ => keys.usize(key)?.unwrap_or(default),
        };
    }
    let [vocab_size, hidden_size, intermediate_size, moe_intermediate_size, num_hidden_layers, dense, heads, rest @ ..] =
        sizes;
    let [kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, experts, shared, positions] = rest;
    if let Some(Some(n)) = keys.usize_or_null("num_key_value_heads")?
        && n != heads
    {
        let expected = format!("num_attention_heads = {heads} (every head has its own keys)");
        return Err(ConfigError::value("num_key_value_heads", expected, n));
    }
    let gate = gate(keys, family, d, warnings)?;
    Ok(ModelConfig {
        family,
        vocab_size,
        hidden_size,
        intermediate_size,
        moe_intermediate_size,
        num_hidden_layers,
        first_k_dense_replace: dense,
        num_attention_heads: heads,
        q_lora_rank: keys.usize_or_null("q_lora_rank")?.unwrap_or(Some(1536)),
        kv_lora_rank,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim,
        n_routed_experts: experts,
        n_shared_experts: shared,
        num_experts_per_tok: match (keys.usize("num_experts_per_tok")?, d.top_k) {
            (Some(k), _) | (None, Some(k)) => k,
            (None, None) => return Err(ConfigError::missing("num_experts_per_tok", "an integer of at least 1")),
        },
        n_group: gate.n_group,
        topk_group: gate.topk_group,
        scoring: if family == Family::V3 { Scoring::Sigmoid } else { Scoring::Softmax },
        group_limited: gate.limited,
        correction_bias: family == Family::V3,
        norm_topk_prob: keys.bool("norm_topk_prob")?.unwrap_or(d.norm_topk_prob),
        routed_scaling_factor: keys.f64("routed_scaling_factor")?.unwrap_or(d.scale),
        rope: rope(keys, family, positions, warnings)?,
        max_position_embeddings: positions,
        rms_norm_eps: keys.f64("rms_norm_eps")?.unwrap_or(1e-6),
        initializer_range: keys.f64("initializer_range")?.unwrap_or(0.02),
        num_nextn_predict_layers: mtp_depth(keys, d)?,
        mtp_hidden: mtp_hidden(keys)?,
        bos_token_id: match tokens(keys, "bos_token_id", d.bos)?.as_slice() {
            [] => None,
            [id] => Some(*id),
            more => return Err(ConfigError::value("bos_token_id", "one token id or null", format!("{more:?}"))),
        },
        eos_token_ids: tokens(keys, "eos_token_id", d.eos)?,
    })
}

fn experts_alias(family: Family) -> &'static str {
    if family == Family::V3 { "num_local_experts" } else { "num_experts" }
}

/// Two spellings of one key must agree.
fn aliases(keys: &mut Keys<'_>, family: Family) -> Result<()> {
    let pairs = [("n_routed_experts", experts_alias(family)), ("num_nextn_predict_layers", "num_mtp_layers")];
    for (key, alias) in pairs {
        if let (Some(a), Some(b)) = (keys.raw(key), keys.raw(alias))
            && as_usize(a) != as_usize(b)
        {
            return Err(ConfigError::value(alias, format!("the value of {key} = {}", show(a)), show(b)));
        }
    }
    Ok(())
}

struct Gate {
    limited: bool,
    n_group: usize,
    topk_group: usize,
}

fn gate(keys: &mut Keys<'_>, family: Family, d: &Defaults, warnings: &mut Vec<String>) -> Result<Gate> {
    let (score, methods): (_, &[&str]) = match family {
        Family::V3 => ("sigmoid", &["noaux_tc"]),
        Family::V2 => ("softmax", &["greedy", "group_limited_greedy"]),
    };
    let scoring = keys.str("scoring_func")?.unwrap_or(score);
    if scoring != score {
        return Err(ConfigError::value(
            "scoring_func",
            format!("{score:?} with this model_type"),
            show(&scoring.into()),
        ));
    }
    let method = keys.str("topk_method")?.unwrap_or(methods[0]);
    if !methods.contains(&method) {
        let expected = format!("{} with this model_type", methods.join(" or "));
        return Err(ConfigError::value("topk_method", expected, show(&method.into())));
    }
    if method != "greedy" {
        let n_group = keys.usize("n_group")?.unwrap_or(d.n_group);
        return Ok(Gate { limited: true, n_group, topk_group: keys.usize("topk_group")?.unwrap_or(d.topk_group) });
    }
    // Greedy selection reads neither; published files say 1 or null.
    for key in ["n_group", "topk_group"] {
        if let Some(Some(n)) = keys.usize_or_null(key)?
            && n != 1
        {
            warnings.push(format!("{key} = {n} has no effect with topk_method \"greedy\": ignored"));
        }
    }
    Ok(Gate { limited: false, n_group: 1, topk_group: 1 })
}

fn mtp_depth(keys: &mut Keys<'_>, d: &Defaults) -> Result<usize> {
    let main = keys.usize_or_null("num_nextn_predict_layers")?;
    let alias = keys.usize_or_null("num_mtp_layers")?;
    Ok(main.or(alias).map_or(d.mtp, |n| n.unwrap_or(0)))
}

fn mtp_hidden(keys: &mut Keys<'_>) -> Result<MtpHidden> {
    match keys.str("hadal_mtp_hidden")? {
        None | Some("post_norm") => Ok(MtpHidden::PostNorm),
        Some("pre_norm") => Ok(MtpHidden::PreNorm),
        Some(other) => {
            Err(ConfigError::value("hadal_mtp_hidden", "\"post_norm\" or \"pre_norm\"", show(&other.into())))
        }
    }
}

/// A token id, a list of them, or null for none.
fn tokens(keys: &mut Keys<'_>, key: &'static str, default: u32) -> Result<Vec<u32>> {
    let Some(v) = keys.raw(key) else { return Ok(vec![default]) };
    let id = |v: &Value| as_usize(v).and_then(|n| u32::try_from(n).ok());
    let ids = match v {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| ConfigError::value(key, "a token id, a list of token ids or null", show(v)))
}

/// `rope_scaling` (old) wins over `rope_parameters` (new), and a theta inside the container over one outside.
fn rope(keys: &mut Keys<'_>, family: Family, positions: usize, warnings: &mut Vec<String>) -> Result<Rope> {
    let interleaved = keys.bool("rope_interleave")?.unwrap_or(true) || family == Family::V2;
    if family == Family::V2 && keys.raw("rope_interleave") == Some(&Value::Bool(false)) {
        return Err(ConfigError::value("rope_interleave", "true with model_type \"deepseek_v2\"", false));
    }
    let theta = keys.f64("rope_theta")?.unwrap_or(10000.0);
    let original = keys.usize("original_max_position_embeddings")?;
    let base = Rope { theta, interleaved, yarn: None };
    let old = keys.object("rope_scaling")?;
    let new = keys.object("rope_parameters")?;
    let read = |prefix, map, warnings: &mut Vec<String>| container(prefix, map, base, original, positions, warnings);
    match (old, new) {
        (None, None) => Ok(base),
        (None, Some(new)) => read("rope_parameters.", new, warnings),
        (Some(old), None) => read("rope_scaling.", old, warnings),
        (Some(old), Some(new)) => {
            let rope = read("rope_scaling.", old, warnings)?;
            if !read("rope_parameters.", new, &mut Vec::new()).is_ok_and(|r| r == rope) {
                warnings.push("rope_parameters differs from rope_scaling, which wins".into());
            }
            Ok(rope)
        }
    }
}

fn container(
    prefix: &'static str,
    map: &Map<String, Value>,
    base: Rope,
    original: Option<usize>,
    positions: usize,
    warnings: &mut Vec<String>,
) -> Result<Rope> {
    let mut keys = Keys::new(prefix, map);
    let theta = keys.f64("rope_theta")?.unwrap_or(base.theta);
    let kind = keys.str("type")?.unwrap_or("default");
    let (key, kind) = keys.str("rope_type")?.map_or(("type", kind), |k| ("rope_type", k));
    if let Some(x) = keys.f64_or_null("partial_rotary_factor")?
        && x != 1.0
    {
        return Err(ConfigError::value(&keys.name("partial_rotary_factor"), "1", x));
    }
    let yarn = match kind {
        "default" => None,
        "yarn" => Some(yarn(&mut keys, original, positions)?),
        other => return Err(ConfigError::value(&keys.name(key), "\"default\" or \"yarn\"", show(&other.into()))),
    };
    warnings.extend(keys.unknown().map(|k| match yarn {
        Some(_) => format!("unknown key {}: ignored", keys.name(k)),
        None => format!("{} has no effect without rope_type \"yarn\": ignored", keys.name(k)),
    }));
    Ok(Rope { theta, yarn, ..base })
}

/// Also of our own TOML: the keys are the same.
pub(super) fn yarn(keys: &mut Keys<'_>, original: Option<usize>, positions: usize) -> Result<Yarn> {
    let inside = keys.usize("original_max_position_embeddings")?;
    Ok(Yarn {
        factor: keys.f64("factor")?.ok_or_else(|| ConfigError::missing(&keys.name("factor"), "a number"))?,
        original_max_position_embeddings: original.or(inside).unwrap_or(positions),
        beta_fast: keys.f64_or_null("beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.f64_or_null("beta_slow")?.unwrap_or(1.0),
        mscale: keys.f64_or_null("mscale")?,
        mscale_all_dim: keys.f64_or_null("mscale_all_dim")?,
        attention_factor: keys.f64_or_null("attention_factor")?,
        truncate: keys.bool("truncate")?.unwrap_or(true),
    })
}
