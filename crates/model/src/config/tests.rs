use super::*;
use crate::{Layout, Scope};
use hadal_kernels::DType;
use hadal_numerics::block::ScaleFormat;
use hadal_numerics::{Purpose, Rng};
use serde_json::{Value, json};

fn read(v: &Value) -> Result<(ModelConfig, Vec<String>), ConfigError> {
    ModelConfig::from_hf_json(v.to_string().as_bytes(), "config.json")
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// Reads what must be readable without a warning.
#[track_caller]
fn clean(v: &Value) -> ModelConfig {
    let (c, warnings) = read(v).unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    c
}

fn with(mut base: Value, key: &str, value: Value) -> Value {
    base[key] = value;
    base
}

fn without(mut base: Value, key: &str) -> Value {
    base.as_object_mut().unwrap().shift_remove(key).expect("the key was there");
    base
}

/// As V3 is published, with its weights no longer quantised.
fn published_v3() -> Value {
    parse(
        r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
    }"#,
    )
}

/// A small V3 model as transformers 5 writes it.
fn new_v3() -> Value {
    parse(
        r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "transformers_version": "5.23.0", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "qk_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "q_lora_rank": 12, "kv_lora_rank": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "rope_interleave": true,
        "max_position_embeddings": 2560,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
            "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
            "mscale_all_dim": 1.0},
        "rms_norm_eps": 1e-06, "hidden_act": "silu", "initializer_range": 0.02, "attention_bias": false,
        "attention_dropout": 0.0, "tie_word_embeddings": false, "output_router_logits": false, "pretraining_tp": 1,
        "use_cache": true, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": null
    }"#,
    )
}

fn new_v2() -> Value {
    let v = without(without(new_v3(), "rope_interleave"), "num_nextn_predict_layers");
    let v = with(with(v, "model_type", json!("deepseek_v2")), "architectures", json!(["DeepseekV2ForCausalLM"]));
    let v = with(with(v, "q_lora_rank", json!(null)), "mlp_bias", json!(false));
    with(with(v, "topk_method", json!("group_limited_greedy")), "norm_topk_prob", json!(false))
}

#[test]
fn published_files_are_the_presets() {
    let v3 = clean(&published_v3());
    assert_eq!(v3, ModelConfig { initializer_range: 0.02, ..ModelConfig::preset("v3").unwrap() });
    assert!((v3.softmax_scale() - 0.135_234).abs() < 1e-6);
}

#[test]
fn new_layout_of_both_families() {
    let c = clean(&new_v3());
    let yarn = c.rope.yarn.unwrap();
    assert_eq!((yarn.factor, yarn.original_max_position_embeddings, c.rope.theta), (40.0, 64, 10000.0));
    assert_eq!((c.qk_head_dim(), c.v_head_dim, c.q_lora_rank), (16, 8, Some(12)));
    let c = clean(&new_v2());
    assert_eq!((c.family, c.scoring, c.group_limited, c.correction_bias), (Family::V2, Scoring::Softmax, true, false));
    assert_eq!((c.q_lora_rank, c.num_nextn_predict_layers, c.norm_topk_prob), (None, 0, false));
}

/// The configurations that another implementation wrote beside its results.
#[test]
fn golden_configurations_are_read_clean() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
    let mut n = 0;
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        if path.exists() {
            let (c, warnings) = ModelConfig::from_hf(&path).unwrap();
            assert_eq!(warnings, Vec::<String>::new());
            assert_eq!(clean(&c.to_hf_json(DType::F32)), c, "{}", path.display());
            n += 1;
        }
    }
    assert!(n >= 19, "{n} configurations");
}

/// Every key left out means what transformers makes of it.
#[test]
fn absent_keys() {
    let c = clean(&json!({"model_type": "deepseek_v3"}));
    let v3 = ModelConfig::preset("v3").unwrap();
    let rope = Rope { yarn: None, ..v3.rope };
    assert_eq!(c, ModelConfig { max_position_embeddings: 4096, initializer_range: 0.02, rope, ..v3 });
    let c = clean(&json!({"model_type": "deepseek_v2", "num_experts_per_tok": 6}));
    assert_eq!((c.q_lora_rank, c.first_k_dense_replace, c.moe_intermediate_size), (Some(1536), 0, 1407));
    assert_eq!((c.norm_topk_prob, c.routed_scaling_factor, c.group_limited), (false, 1.0, false));
    assert_eq!((c.bos_token_id, c.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    let e = read(&json!({"model_type": "deepseek_v2"})).unwrap_err().to_string();
    assert_eq!(e, "config.json: num_experts_per_tok is missing: expected an integer of at least 1");
}

#[test]
fn null_is_not_absent() {
    assert_eq!(clean(&with(published_v3(), "q_lora_rank", json!(null))).q_lora_rank, None);
    assert_eq!(clean(&with(published_v3(), "num_nextn_predict_layers", json!(null))).num_nextn_predict_layers, 0);
    assert_eq!(clean(&with(published_v3(), "rope_scaling", json!(null))).rope.yarn, None);
    assert_eq!(clean(&with(published_v3(), "bos_token_id", json!(null))).bos_token_id, None);
    assert!(!clean(&with(published_v3(), "norm_topk_prob", json!(null))).norm_topk_prob);
    assert_eq!(clean(&with(published_v3(), "num_key_value_heads", json!(null))).num_attention_heads, 128);
    let e = read(&with(published_v3(), "n_group", json!(null))).unwrap_err().to_string();
    assert_eq!(e, "config.json: n_group: expected an integer of at least 0, found null");
}

#[test]
fn numbers_spelled_either_way() {
    let c = clean(&with(with(published_v3(), "hidden_size", json!(7168.0)), "rope_theta", json!(10000.0)));
    assert_eq!(c, clean(&published_v3()));
    for wrong in [json!(7168.5), json!(-1), json!("7168"), json!(1e300), json!(true), json!([])] {
        let e = read(&with(published_v3(), "hidden_size", wrong.clone())).unwrap_err().to_string();
        assert!(e.contains("hidden_size") && e.ends_with(&format!("found {}", keys::show(&wrong))), "{e}");
    }
}

#[test]
fn rope_precedence() {
    let theta = |v: &Value| read(v).unwrap().0.rope.theta;
    let plain = without(without(published_v3(), "rope_scaling"), "rope_theta");
    assert_eq!(theta(&plain), 10000.0);
    let outside = with(plain.clone(), "rope_theta", json!(7));
    assert_eq!(theta(&outside), 7.0);
    let new = json!({"rope_type": "default", "rope_theta": 5.0});
    assert_eq!(theta(&with(outside.clone(), "rope_parameters", new.clone())), 5.0);
    // The old container wins over the new one as a whole, and {} is no container.
    let old = json!({"type": "yarn", "factor": 2});
    let both = with(with(outside, "rope_parameters", new), "rope_scaling", old);
    let (c, warnings) = read(&both).unwrap();
    assert_eq!((c.rope.theta, c.rope.yarn.unwrap().factor), (7.0, 2.0));
    assert_eq!(warnings, ["config.json: rope_parameters differs from rope_scaling, which wins"]);
    assert_eq!(theta(&with(both, "rope_scaling", json!({}))), 5.0);
}

#[test]
fn yarn_defaults_and_kinds() {
    let yarn = |v: Value| read(&with(published_v3(), "rope_scaling", v)).map(|(c, _)| c.rope.yarn);
    let y = yarn(json!({"rope_type": "yarn", "type": "linear", "factor": 40})).unwrap().unwrap();
    assert_eq!((y.original_max_position_embeddings, y.beta_fast, y.beta_slow), (163840, 32.0, 1.0));
    assert_eq!((y.mscale, y.mscale_all_dim, y.attention_factor, y.truncate), (None, None, None, true));
    assert_eq!(yarn(json!({"type": "default"})).unwrap(), None);
    let e = yarn(json!({"type": "linear", "factor": 40})).unwrap_err().to_string();
    assert_eq!(e, "config.json: rope_scaling.type: expected \"default\" or \"yarn\", found \"linear\"");
    let e = yarn(json!({"type": "yarn"})).unwrap_err().to_string();
    assert_eq!(e, "config.json: rope_scaling.factor is missing: expected a number");
    let outer = with(published_v3(), "original_max_position_embeddings", json!(2048));
    assert_eq!(clean(&outer).rope.yarn.unwrap().original_max_position_embeddings, 2048);
    let (_, warnings) = read(&with(published_v3(), "rope_scaling", json!({"type": "default", "factor": 4}))).unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("rope_scaling.factor has no effect"), "{}", warnings[0]);
}

#[test]
fn aliases_agree_or_fail() {
    let alias = with(without(new_v3(), "num_nextn_predict_layers"), "num_mtp_layers", json!(3));
    assert_eq!(clean(&alias).num_nextn_predict_layers, 3);
    let e = read(&with(new_v3(), "num_mtp_layers", json!(3))).unwrap_err().to_string();
    assert_eq!(e, "config.json: num_mtp_layers: expected the value of num_nextn_predict_layers = 1, found 3");
    let alias = with(without(new_v3(), "n_routed_experts"), "num_local_experts", json!(16));
    assert_eq!(clean(&alias).n_routed_experts, 16);
}

#[test]
fn ends_of_text() {
    let ids = |v: Value| clean(&with(new_v3(), "eos_token_id", v)).eos_token_ids;
    assert_eq!(ids(json!(3)), [3]);
    assert_eq!(ids(json!([3, 4])), [3, 4]);
    assert_eq!(ids(json!(null)), [0u32; 0]);
    let (_, warnings) = read(&with(new_v3(), "eos_token_id", json!(96))).unwrap();
    assert_eq!(warnings, ["config.json: token id 96 (bos or eos): vocab_size is 96"]);
}

#[test]
fn which_state_mtp_reads() {
    assert_eq!(clean(&new_v3()).mtp_hidden, MtpHidden::PostNorm);
    assert_eq!(clean(&with(new_v3(), "hadal_mtp_hidden", json!("pre_norm"))).mtp_hidden, MtpHidden::PreNorm);
    assert!(read(&with(new_v3(), "hadal_mtp_hidden", json!("both"))).is_err());
}

#[test]
fn unknown_keys_are_named() {
    let (c, warnings) = read(&with(new_v3(), "attention_sink", json!(4))).unwrap();
    assert_eq!(warnings, ["config.json: unknown key attention_sink: ignored"]);
    assert_eq!(c, clean(&new_v3()));
    let v = with(new_v2(), "topk_method", json!("greedy"));
    assert_eq!(read(&v).unwrap().1.len(), 2, "n_group and topk_group without effect");
    let (_, warnings) = read(&with(new_v3(), "architectures", json!(["DeepseekV3Model"]))).unwrap();
    assert_eq!(warnings.len(), 1);
}

/// Each names the key, the value and what is supported, in one line.
#[test]
fn unsupported_meanings() {
    let v3 = [
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("attention_dropout", json!(0.1)),
        ("hidden_act", json!("gelu")),
        ("tie_word_embeddings", json!(true)),
        ("moe_layer_freq", json!(2)),
        ("scoring_func", json!("softmax")),
        ("topk_method", json!("greedy")),
        ("quantization_config", json!("fp8")),
        ("quantization_config", json!({"quant_method": "awq"})),
        ("quantization_config", json!({"quant_method": "fp8", "fmt": "e5m2"})),
        ("quantization_config", json!({"quant_method": "fp8", "activation_scheme": "static"})),
        ("quantization_config", json!({"quant_method": "fp8", "weight_block_size": null})),
        ("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128]})),
        ("quantization_config", json!({"quant_method": "fp8", "weight_block_size": [128, 0]})),
        ("quantization_config", json!({"quant_method": "fp8", "scale_fmt": 2})),
        ("quantization_config", json!({"quant_method": "fp8", "expert_dtype": "fp4"})),
        ("quantization_config", json!({"quant_method": "fp8", "modules_to_not_convert": "lm_head"})),
        ("num_key_value_heads", json!(1)),
        ("partial_rotary_factor", json!(0.5)),
        ("model_type", json!("llama")),
        ("mtp_hidden_states_first", json!(true)),
        ("index_topk", json!(2048)),
        ("rope_scaling", json!({"type": "yarn", "factor": 40, "partial_rotary_factor": 0.5})),
        ("rope_scaling", json!({"type": "longrope"})),
        ("qk_rope_head_dim", json!(7)),
        ("n_group", json!(3)),
        ("n_group", json!(8)),
        ("topk_group", json!(5)),
        ("num_experts_per_tok", json!(5)),
        ("num_experts_per_tok", json!(0)),
        ("first_k_dense_replace", json!(3)),
        ("q_lora_rank", json!(0)),
        ("vocab_size", json!(0)),
        ("hidden_size", json!(1u64 << 60)),
        ("num_hidden_layers", json!(1u64 << 40)),
        ("rms_norm_eps", json!(0)),
    ];
    let v2 = [
        ("norm_topk_prob", json!(true)),
        ("topk_method", json!("noaux_tc")),
        ("scoring_func", json!("sigmoid")),
        ("rope_interleave", json!(false)),
        ("num_nextn_predict_layers", json!(1)),
        ("num_attention_heads", json!(3)),
    ];
    let cases = v3.map(|(k, v)| (new_v3(), k, v)).into_iter().chain(v2.map(|(k, v)| (new_v2(), k, v)));
    for (base, key, value) in cases {
        let e = read(&with(base, key, value.clone())).expect_err(key).to_string();
        assert!(e.starts_with("config.json: ") && e.contains(key) && !e.contains('\n'), "{key} {value}: {e}");
        assert!(e.contains("expected ") && e.contains("found "), "{key} {value}: {e}");
    }
    // What null leaves unset is supported.
    let v = with(new_v3(), "quantization_config", json!(null));
    clean(&with(with(v, "index_topk", json!(null)), "partial_rotary_factor", json!(1.0)));
}

/// How weights are stored does not change the model that is read.
#[test]
fn quantisation_is_read_apart() {
    let published = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let stored = |q: &Value| {
        assert_eq!(clean(&with(new_v3(), "quantization_config", q.clone())), clean(&new_v3()));
        std::fs::write(&path, json!({ "quantization_config": q }).to_string()).unwrap();
        Quantization::from_hf(&path).unwrap()
    };
    let expected = Quantization::published(ScaleFormat::F32);
    assert_eq!(stored(&published), Some(expected));
    assert_eq!(expected.to_hf_json(), published);
    assert_eq!(stored(&json!({"quant_method": "fp8"})), Some(expected));
    let more = with(with(published, "scale_fmt", json!("ue8m0")), "modules_to_not_convert", json!(["lm_head"]));
    assert_eq!(stored(&more), Some(Quantization::published(ScaleFormat::Ue8m0)));
    assert_eq!(stored(&json!({"quant_method": "fp8", "weight_block_size": [1, 32]})).unwrap().block, [1, 32]);
    assert_eq!((stored(&json!(null)), stored(&json!({}))), (None, None));
    assert_eq!(Quantization::from_hf(&dir.path().join("none.json")).unwrap(), None);
    let (_, warnings) = read(&with(new_v3(), "quantization_config", json!({"quant_method": "fp8", "a": 1}))).unwrap();
    assert_eq!(warnings, ["config.json: unknown key quantization_config.a: ignored"]);
    for q in [json!({"fmt": "e4m3"}), json!({"quant_method": null})] {
        let e = read(&with(new_v3(), "quantization_config", q)).unwrap_err().to_string();
        assert_eq!(e, "config.json: quantization_config.quant_method is missing: expected \"fp8\"");
    }
}

/// Sizes within bounds whose product is not.
#[test]
fn nothing_overflows() {
    let most = 1 << 24;
    let c = ModelConfig {
        vocab_size: most,
        hidden_size: most,
        intermediate_size: most,
        moe_intermediate_size: most,
        num_attention_heads: most,
        kv_lora_rank: most,
        qk_rope_head_dim: most,
        qk_nope_head_dim: most,
        v_head_dim: most,
        q_lora_rank: Some(most),
        num_hidden_layers: 4096,
        num_nextn_predict_layers: 4096,
        n_routed_experts: 65536,
        n_shared_experts: 1024,
        ..ModelConfig::preset("nano").unwrap()
    };
    assert!(c.validate().unwrap_err().to_string().contains("elements"));
    let c = ModelConfig {
        n_routed_experts: 65536,
        num_hidden_layers: 4096,
        hidden_size: 4,
        moe_intermediate_size: 1,
        ..ModelConfig::preset("nano").unwrap()
    };
    assert!(c.validate().unwrap_err().to_string().contains("tensors"));
}

#[test]
fn bad_files_say_where() {
    let e = ModelConfig::from_hf_json(b"{\"a\": 1,\n \"b\" 2}", "m/config.json").unwrap_err().to_string();
    assert!(e.starts_with("m/config.json:2:6: expected a JSON object: "), "{e}");
    let long = format!("\"{}\"", "long ".repeat(1000));
    let e = ModelConfig::from_hf_json(long.as_bytes(), "m/config.json").unwrap_err().to_string();
    assert!(e.contains("expected a JSON object: invalid type: string") && e.len() < 400, "{e}");
    assert!(ModelConfig::from_hf_json(b"[1]", "x").unwrap_err().to_string().starts_with("x:1:"));
    let e = ModelConfig::from_hf(std::path::Path::new("/nonexistent/config.json")).unwrap_err().to_string();
    assert!(e.starts_with("/nonexistent/config.json: "), "{e}");
}

/// Any single byte changed gives an answer, never a panic.
#[test]
fn damaged_files_do_not_panic() {
    let text = new_v3().to_string().into_bytes();
    let rng = Rng::new(3, Purpose::Test, 0);
    let mut errors = 0;
    for i in 0..4000u64 {
        let mut bytes = text.clone();
        let at = rng.below(2 * i, bytes.len() as u64) as usize;
        bytes[at] = b"09-.{}[],:\"ntx\\\xff"[rng.below(2 * i + 1, 16) as usize];
        if i % 8 == 0 {
            bytes.truncate(at);
        }
        if let Err(e) = ModelConfig::from_hf_json(&bytes, "c") {
            errors += 1;
            assert!(!e.to_string().contains('\n'), "{e}");
        }
    }
    assert!(errors > 1000, "{errors}");
}

/// Valid configurations of all kinds.
fn random(seed: u64) -> ModelConfig {
    let rng = Rng::new(seed, Purpose::Test, 1);
    let mut i = 0;
    let mut pick = |n: usize| {
        i += 1;
        rng.below(i, n as u64) as usize
    };
    let v3 = pick(2) == 0;
    let limited = v3 || pick(2) == 0;
    let groups = if limited { 1 + pick(4) } else { 1 };
    let per_group = 2 + pick(4);
    let kept = 1 + pick(groups);
    let heads = 1 + pick(4);
    let mut option = |x: f64| (pick(2) == 0).then_some(x);
    let yarn = option(1.0).map(|_| Yarn {
        factor: 1.0 + seed as f64 / 3.0,
        original_max_position_embeddings: 1 + seed as usize,
        beta_fast: 32.0,
        beta_slow: 0.1 + seed as f64,
        mscale: option(0.707),
        mscale_all_dim: option(1.0),
        attention_factor: option(1.1),
        truncate: option(1.0).is_some(),
    });
    let yarn = yarn.map(|y| Yarn { beta_fast: y.beta_slow + 31.0, ..y });
    let c = ModelConfig {
        family: if v3 { Family::V3 } else { Family::V2 },
        vocab_size: 3 + pick(1000),
        hidden_size: heads * (1 + pick(100)),
        intermediate_size: 1 + pick(100),
        moe_intermediate_size: 1 + pick(100),
        num_hidden_layers: 2 + pick(5),
        first_k_dense_replace: pick(3),
        num_attention_heads: heads,
        q_lora_rank: (pick(2) == 0).then_some(1 + seed as usize),
        kv_lora_rank: 1 + pick(64),
        qk_nope_head_dim: 1 + pick(64),
        qk_rope_head_dim: 2 + 2 * pick(32),
        v_head_dim: 1 + pick(64),
        n_routed_experts: groups * per_group,
        n_shared_experts: pick(3),
        num_experts_per_tok: 1 + pick(kept * per_group),
        n_group: groups,
        topk_group: kept,
        scoring: if v3 { Scoring::Sigmoid } else { Scoring::Softmax },
        group_limited: limited,
        correction_bias: v3,
        norm_topk_prob: v3 && pick(2) == 0,
        routed_scaling_factor: 0.1 + pick(100) as f64 / 7.0,
        rope: Rope { theta: 10.0 + pick(1000) as f64 / 3.0, interleaved: !v3 || pick(2) == 0, yarn },
        max_position_embeddings: 1 + pick(10000),
        rms_norm_eps: 1e-6 * (1 + pick(9)) as f64,
        initializer_range: pick(10) as f64 / 300.0,
        num_nextn_predict_layers: if v3 { pick(3) } else { 0 },
        mtp_hidden: if v3 && pick(2) == 0 { MtpHidden::PreNorm } else { MtpHidden::PostNorm },
        bos_token_id: (pick(2) == 0).then_some(pick(3) as u32),
        eos_token_ids: (0..pick(3) as u32).collect(),
    };
    c.validate().unwrap();
    c
}

#[test]
fn written_files_read_back_equal() {
    let presets = PRESETS.iter().map(|name| ModelConfig::preset(name).unwrap());
    for c in presets.chain((0..300).map(random)) {
        for dtype in [DType::F32, DType::Bf16] {
            assert_eq!(clean(&c.to_hf_json(dtype)), c);
        }
    }
}

#[test]
fn presets_are_valid_and_laid_out() {
    for name in PRESETS {
        let c = ModelConfig::preset(name).unwrap();
        c.validate().unwrap();
        assert!(Layout::new(&c, Scope::whole(&c)).parameters() > 1_000_000, "{name}");
    }
    let e = ModelConfig::preset("v9").unwrap_err().to_string();
    assert_eq!(e, "model: preset: expected nano, mini, 1b, v2-lite, moonlight-16b, v3, found \"v9\"");
}

fn toml(text: &str) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_toml_table(&text.parse().unwrap())
}

const WHOLE: &str = "
family = 'v3'
vocab_size = 4096
hidden_size = 256
intermediate_size = 704
moe_intermediate_size = 128
num_hidden_layers = 6
first_k_dense_replace = 1
num_attention_heads = 4
q_lora_rank = 96
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 16
v_head_dim = 32
n_routed_experts = 16
n_shared_experts = 1
num_experts_per_tok = 4
n_group = 4
topk_group = 2
norm_topk_prob = true
routed_scaling_factor = 2.5
max_position_embeddings = 1024
rms_norm_eps = 1e-6
initializer_range = 0.02
num_nextn_predict_layers = 1
bos_token_id = 0
eos_token_ids = [1]
rope.theta = 10000
";

#[test]
fn toml_presets_and_whole_tables() {
    let nano = ModelConfig::preset("nano").unwrap();
    assert_eq!(toml("preset = 'nano'").unwrap(), nano);
    assert_eq!(toml(WHOLE).unwrap(), nano);
    let c = toml("preset = 'nano'\nvocab_size = 8192\nq_lora_rank = 'none'\nmtp_hidden = 'pre_norm'").unwrap();
    let expected = ModelConfig { vocab_size: 8192, q_lora_rank: None, mtp_hidden: MtpHidden::PreNorm, ..nano.clone() };
    assert_eq!(c, expected);
    let c = toml("preset = 'nano'\nrope.yarn = { factor = 4, original_max_position_embeddings = 256 }").unwrap();
    assert_eq!((c.rope.yarn.unwrap().factor, c.rope.theta), (4.0, 10000.0));
    let c = toml("preset = 'v3'\nrope.yarn = 'none'").unwrap();
    assert_eq!(c, ModelConfig { rope: nano.rope, ..ModelConfig::preset("v3").unwrap() });
    // Every size is needed where no preset gives it.
    for line in WHOLE.lines().filter(|l| !l.is_empty() && !l.starts_with(['b', 'e']) && !l.starts_with("q_lora")) {
        let e = toml(&WHOLE.replace(line, "")).unwrap_err().to_string();
        assert!(e.starts_with("[model]: ") && e.contains("is missing"), "{line}: {e}");
    }
}

/// A table for a model without experts leaves their keys out, as one without dense layers leaves out their width.
#[test]
fn toml_tables_need_only_the_sizes_of_layers_that_are_there() {
    let without = |text: &str, keys: &[&str]| -> String {
        let lost = |l: &&str| keys.iter().any(|k| l.starts_with(&format!("{k} =")));
        text.lines().filter(|l| !lost(l)).map(|l| format!("{l}\n")).collect()
    };
    let dense = WHOLE.replace("first_k_dense_replace = 1", "first_k_dense_replace = 6");
    let dense = dense.replace("predict_layers = 1", "predict_layers = 0");
    let c = toml(&without(&dense, &super::toml::EXPERT_KEYS)).unwrap();
    assert!(!c.has_experts() && c.intermediate_size == 704);
    let moe = WHOLE.replace("first_k_dense_replace = 1", "first_k_dense_replace = 0");
    let c = toml(&without(&moe, &["intermediate_size"])).unwrap();
    assert!(c.has_experts() && c.moe_intermediate_size == 128);
}

#[test]
fn presets_have_a_training_sequence() {
    for name in PRESETS {
        let seq = preset_sequence(name).unwrap();
        assert!((256..=ModelConfig::preset(name).unwrap().max_position_embeddings).contains(&seq), "{name}");
    }
    assert_eq!(preset_sequence("v9"), None);
}

/// The tokens that a published preset names lie behind a smaller vocabulary's end.
#[test]
fn a_preset_may_get_a_smaller_vocabulary() {
    for preset in ["v2-lite", "moonlight-16b", "v3"] {
        let c = toml(&format!("preset = '{preset}'\nvocab_size = 8192")).unwrap();
        assert_eq!(c.vocab_size, 8192);
        let there = |id: &u32| *id < 8192;
        let whole = ModelConfig::preset(preset).unwrap();
        assert_eq!(c.bos_token_id, whole.bos_token_id.filter(there));
        assert!(c.eos_token_ids.iter().all(there));
    }
}

#[test]
fn toml_keys_without_effect_are_errors() {
    for (text, message) in [
        ("preset = 'nano'\nhidden_dim = 3", "unknown key hidden_dim: expected one of bos_token_id, "),
        ("preset = 'v2-lite'\nn_group = 1", "n_group has no effect: group_limited is false"),
        ("preset = 'mini'\nmtp_hidden = 'pre_norm'", "mtp_hidden has no effect: num_nextn_predict_layers is 0"),
        (
            "preset = 'mini'\nfirst_k_dense_replace = 8\nn_shared_experts = 2",
            "n_shared_experts has no effect: no layer has experts",
        ),
        (
            "preset = 'mini'\nfirst_k_dense_replace = 8\nrouted_scaling_factor = 2",
            "routed_scaling_factor has no effect: no layer has experts",
        ),
        (
            "preset = 'nano'\nfirst_k_dense_replace = 0\nintermediate_size = 64",
            "intermediate_size has no effect: no layer is dense",
        ),
        ("preset = 'nano'\nrope.yarn.beta_fast = 3", "rope.yarn.factor is missing"),
        ("preset = 'nano'\nrope.yarn = {}", "rope.yarn.factor is missing"),
        ("preset = 'nano'\nrope.yarn = { factor = 2, mscale = 1 }", "rope.yarn.mscale has no effect: it needs"),
        ("preset = 'nano'\nrope.yarn = { factor = 2, slow = 1 }", "unknown key rope.yarn.slow"),
        ("preset = 'nano'\nrope.base = 3", "unknown key rope.base: expected one of interleaved, theta, yarn"),
        ("preset = 'nano'\nfamily = 'v2'", "family has no effect: the preset has another"),
        ("preset = 'giant'", "preset: expected nano, mini"),
        ("preset = 'nano'\nhidden_size = 'big'", "hidden_size: expected an integer of at least 0, found \"big\""),
        ("preset = 'nano'\nrms_norm_eps = nan", "rms_norm_eps: expected a number, found null"),
        ("preset = 'nano'\ntopk_group = 9", "topk_group: expected 1 to n_group = 4, found 9"),
        ("preset = 'nano'\nbos_token_id = 4096", "bos_token_id: expected below vocab_size = 4096, found 4096"),
        ("preset = 'nano'\nscoring = 'softmax'", "scoring: expected sigmoid (deepseek_v3), found softmax"),
        ("", "family is missing"),
    ] {
        let e = toml(text).expect_err(text).to_string();
        assert!(e.starts_with("[model]: ") && e.contains(message) && !e.contains('\n'), "{text}: {e}");
    }
}
