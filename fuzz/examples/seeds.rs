//! Writes `seeds/<target>/`: what the product itself writes, and what other writers make of it.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --example seeds

use hadal_data::Tokenizer;
use hadal_fuzz::model;
use hadal_fuzz::safetensors::{join, split};
use hadal_kernels::DType;
use hadal_model::{ModelConfig, PRESETS};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let scratch = tempfile::tempdir()?;
    safetensors(&fresh(&root, "safetensors")?, scratch.path())?;
    index(&fresh(&root, "index")?, scratch.path())?;
    config(&fresh(&root, "config")?)?;
    tokenizer(&fresh(&root, "tokenizer")?)
}

fn fresh(root: &Path, target: &str) -> std::io::Result<PathBuf> {
    let dir = root.join(target);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn safetensors(out: &Path, scratch: &Path) -> std::io::Result<()> {
    let whole = |dtype, name: &str| {
        let dir = scratch.join(name);
        fs::create_dir(&dir)?;
        fs::read(model::checkpoint(&dir, dtype, usize::MAX).join("model.safetensors"))
    };
    let f32s = whole(DType::F32, "f32")?;
    let bf16s = whole(DType::Bf16, "bf16")?;
    fs::write(out.join("f32"), &f32s)?;
    // F16 has the size of BF16; none of these bits is infinite there.
    fs::write(
        out.join("f16"),
        edited(&bf16s, |header, data| {
            header.values_mut().filter(|t| t["dtype"] == "BF16").for_each(|t| t["dtype"] = json!("F16"));
            data.chunks_exact_mut(2).for_each(|x| x[1] &= 0xbf);
        }),
    )?;
    let fused = edited(&f32s, fuse);
    fs::write(out.join("fp8"), edited(&f32s, |header, data| quantise(header, data, "F32")))?;
    fs::write(out.join("fp8-ue8m0"), edited(&bf16s, |header, data| quantise(header, data, "F8_E8M0")))?;
    fs::write(out.join("fp8-fused"), edited(&fused, |header, data| quantise(header, data, "F32")))?;
    fs::write(out.join("fused"), fused)?;
    fs::write(
        out.join("without-mtp"),
        edited(&bf16s, |header, _| {
            header.retain(|name, _| !name.starts_with("model.layers.2."));
        }),
    )?;
    fs::write(out.join("bf16"), bf16s)?;
    // A seed that is refused at the door leads nowhere.
    let world = model::World::new();
    world.write("config.json", &model::quantized());
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        world.write("model.safetensors", &fs::read(&path)?);
        world.try_load(&model::tiny()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    Ok(())
}

/// The file with a change to its header; offsets and data follow the tensors that are left, in their order.
fn edited(file: &[u8], change: impl Fn(&mut Map<String, Value>, &mut Vec<u8>)) -> Vec<u8> {
    let (header, data) = split(file).expect("the product writes a header");
    let (mut header, mut data): (Map<_, _>, _) = (serde_json::from_slice(header).expect("JSON"), data.to_vec());
    change(&mut header, &mut data);
    let at = |t: &Value, i: usize| t["data_offsets"][i].as_u64().expect("offsets are integers") as usize;
    let mut out = Vec::new();
    for (_, t) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let begin = out.len();
        out.extend_from_slice(&data[at(t, 0)..at(t, 1)]);
        t["data_offsets"] = json!([begin, out.len()]);
    }
    join(&serde_json::to_vec(&header).expect("JSON"), &out)
}

/// Experts as transformers 5 writes them: one tensor for all gates and ups, one for all downs.
fn fuse(header: &mut Map<String, Value>, data: &mut Vec<u8>) {
    let c = model::tiny();
    let (e, d, f) = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size);
    for layer in [1, 2] {
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let fused = [
            ("gate_up_proj", vec!["gate_proj", "up_proj"], [e, 2 * f, d]),
            ("down_proj", vec!["down_proj"], [e, d, f]),
        ];
        for (name, parts, shape) in fused {
            let begin = data.len();
            for (expert, part) in (0..e).flat_map(|i| parts.iter().map(move |p| (i, p))) {
                let t = header.shift_remove(&format!("{prefix}.{expert}.{part}.weight")).expect("an expert's tensor");
                let range = [0, 1].map(|i| t["data_offsets"][i].as_u64().expect("offsets are integers") as usize);
                data.extend_from_within(range[0]..range[1]);
            }
            let t = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(format!("{prefix}.{name}"), t);
        }
    }
}

/// Projections as E4M3 codes with a grid of scales beside each.
fn quantise(header: &mut Map<String, Value>, data: &mut Vec<u8>, scales: &str) {
    let names: Vec<String> = header.keys().filter(|name| name.contains("_proj")).cloned().collect();
    for name in names {
        let shape: Vec<usize> = serde_json::from_value(header[&name]["shape"].clone()).expect("a shape");
        let [stack @ .., rows, cols] = &shape[..] else { continue };
        let grid = [stack, &[rows.div_ceil(model::BLOCK[0]), cols.div_ceil(model::BLOCK[1])]].concat();
        // Codes of all sizes but the two that are no numbers; 2^-7 for a scale.
        let begin = data.len();
        data.extend((0..shape.iter().product()).map(|i: usize| (i * 37 % 127) as u8));
        let middle = data.len();
        for _ in 0..grid.iter().product() {
            if scales == "F32" { data.extend(0.0078125f32.to_le_bytes()) } else { data.push(120) }
        }
        let tensor = |dtype: &str, shape: &[usize], range: [usize; 2]| json!({"dtype": dtype, "shape": shape, "data_offsets": range});
        header.insert(name.clone(), tensor("F8_E4M3", &shape, [begin, middle]));
        header.insert(format!("{name}_scale_inv"), tensor(scales, &grid, [middle, data.len()]));
    }
}

fn index(out: &Path, scratch: &Path) -> std::io::Result<()> {
    let dir = scratch.join("shards");
    fs::create_dir(&dir)?;
    model::shards(&dir);
    let text = fs::read(dir.join("model.safetensors.index.json"))?;
    let whole: Value = serde_json::from_slice(&text)?;
    fs::write(out.join("whole"), serde_json::to_vec(&whole)?)?;
    for name in ["short", "none", "integers"] {
        let mut index = whole.clone();
        let first = index["weight_map"].as_object_mut().and_then(|m| m.values_mut().next()).expect("a map of tensors");
        *first = json!(format!("{name}.safetensors"));
        fs::write(out.join(name), serde_json::to_vec(&index)?)?;
    }
    Ok(())
}

fn config(out: &Path) -> std::io::Result<()> {
    for name in PRESETS {
        let mut config = ModelConfig::preset(name).expect("a preset of the crate");
        // Laying out all of V3 for every mutation would take the time of a hundred others.
        config.num_hidden_layers = config.num_hidden_layers.min(config.first_k_dense_replace + 1);
        let mut file = config.to_hf_json(DType::Bf16);
        fs::write(out.join(format!("{name}.json")), serde_json::to_vec(&file)?)?;
        // As transformers 5 spells rope.
        let object = file.as_object_mut().expect("a configuration is an object");
        let theta = object.shift_remove("rope_theta");
        let mut rope = match object.shift_remove("rope_scaling") {
            Some(Value::Object(scaling)) => scaling,
            _ => Map::from_iter([("rope_type".to_string(), json!("default"))]),
        };
        rope.insert("rope_theta".into(), theta.unwrap_or_default());
        object.insert("rope_parameters".into(), Value::Object(rope));
        fs::write(out.join(format!("{name}-5.json")), serde_json::to_vec(&file)?)?;
        fs::write(out.join(format!("{name}.toml")), format!("[model]\npreset = \"{name}\"\nnum_hidden_layers = 4\n"))?;
    }
    let whole = "[model]\nfamily = \"v3\"\nvocab_size = 320\nhidden_size = 64\nintermediate_size = 128\n\
                 moe_intermediate_size = 32\nnum_hidden_layers = 3\nfirst_k_dense_replace = 1\n\
                 num_attention_heads = 4\nq_lora_rank = 24\nkv_lora_rank = 16\nqk_nope_head_dim = 8\n\
                 qk_rope_head_dim = 4\nv_head_dim = 8\nn_routed_experts = 8\nn_shared_experts = 1\n\
                 num_experts_per_tok = 2\nn_group = 2\ntopk_group = 1\nnorm_topk_prob = true\n\
                 routed_scaling_factor = 2.5\nmax_position_embeddings = 256\nrms_norm_eps = 1e-6\n\
                 initializer_range = 0.02\nnum_nextn_predict_layers = 1\nmtp_hidden = \"pre_norm\"\n\
                 bos_token_id = 0\neos_token_ids = [1, 2]\nrope.theta = 1e4\nrope.interleaved = false\n\
                 [model.rope.yarn]\nfactor = 40\nbeta_fast = 32\nbeta_slow = 1\nmscale = 1.0\nmscale_all_dim = 1.0\n\
                 original_max_position_embeddings = 64\ntruncate = true\n";
    fs::write(out.join("whole.toml"), whole)
}

fn tokenizer(out: &Path) -> std::io::Result<()> {
    let text = "the singer is singing a song in the ring, bringing things along; 今天天气很好，今天 aaaa 1234567";
    let trained = Tokenizer::train(&[text, text], 290).expect("the text is long enough");
    let [file, config] = trained.files().map(|(_, bytes)| bytes);
    let ours: Value = serde_json::from_slice(&file)?;
    let config: Value = serde_json::from_slice(&config)?;
    let scratch = tempfile::tempdir()?;
    let write = |name: &str, file: &Value, config: Option<&Value>| {
        let mut bytes = serde_json::to_vec(file)?;
        // A seed that is refused at the door leads nowhere.
        fs::write(scratch.path().join("tokenizer.json"), &bytes)?;
        Tokenizer::load(scratch.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        if let Some(config) = config {
            bytes.push(0);
            bytes.extend(serde_json::to_vec(config)?);
        }
        fs::write(out.join(name), bytes)
    };
    write("trained", &ours, Some(&config))?;

    // The layout of GPT-2's and of Llama 3's descendants.
    let mut gpt2 = ours.clone();
    gpt2["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    gpt2["added_tokens"] = json!([ours["added_tokens"][0]]);
    let merges = gpt2["model"]["merges"].as_array().into_iter().flatten();
    let legacy = merges.map(|m| json!(format!("{} {}", m[0].as_str().unwrap_or(""), m[1].as_str().unwrap_or(""))));
    gpt2["model"]["merges"] = legacy.collect();
    gpt2["model"].as_object_mut().expect("a model is an object").shift_remove("type");
    write("gpt2", &gpt2, None)?;

    let mut llama = ours.clone();
    let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    llama["normalizer"] = json!({"type": "NFC"});
    llama["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "Split", "pattern": {"String": "--"}, "behavior": "MergedWithNext", "invert": true},
        {"type": "Digits", "individual_digits": true},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]});
    llama["post_processor"] = json!({"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
         "single": [{"SpecialToken": {"id": "<think>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "special_tokens": {"<think>": {"id": "<think>", "ids": [5], "tokens": ["<think>"]}}},
    ]});
    llama["model"]["ignore_merges"] = json!(true);
    write("llama", &llama, Some(&json!({"eos_token": {"content": "<think>"}, "bos_token": null})))
}
