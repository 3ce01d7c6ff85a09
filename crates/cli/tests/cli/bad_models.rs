//! Model directories that cannot be run, and requests that a model cannot serve.

use crate::support::{Place, refused, trained};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// All verbs that open a model's weights must refuse it.
fn model_refused(place: &Place, dir: &Path, parts: &[&str]) {
    let (model, out) = (dir.to_str().unwrap(), place.arg("logits"));
    refused(&["generate", model, "The river"], parts);
    refused(&["logits", model, "--tokens", "1,2", "--out", &out], parts);
    assert!(!place.path("logits").exists() && !place.path("logits.partial").exists());
}

/// Rewrites model.safetensors with one tensor replaced (dtype, shape, bytes), or left out.
fn edit(dir: &Path, name: &str, with: Option<(Dtype, Vec<usize>, Vec<u8>)>) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert!(file.tensor(name).is_ok(), "{name}");
    let mut tensors: Vec<(String, TensorView<'_>)> = file.tensors().into_iter().filter(|(n, _)| n != name).collect();
    if let Some((dtype, shape, data)) = &with {
        tensors.push((name.to_string(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    }
    let edited = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(&path, edited).unwrap();
}

/// Rewrites config.json.
fn configure(dir: &Path, key: &str, value: serde_json::Value) {
    let path = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
}

#[test]
fn damaged_weights() {
    let place = Place::new();
    let norm = "model.norm.weight";
    let damage = |name: &str, f: &dyn Fn(&Path), parts: &[&str]| {
        let dir = place.copy_model(name);
        f(&dir);
        model_refused(&place, &dir, &[parts, &[name]].concat());
    };
    let shape = |d: &Path| edit(d, norm, Some((Dtype::F32, vec![31], vec![0; 4 * 31])));
    damage("shape", &shape, &["model.safetensors", norm, "expected shape [32], found shape [31]"]);
    let dtype = |d: &Path| edit(d, norm, Some((Dtype::I64, vec![32], vec![0; 8 * 32])));
    damage("dtype", &dtype, &["model.safetensors", norm, "expected BF16, F16, F32 or F8_E4M3 with scales, found I64"]);
    let nan = [[0; 4 * 31].as_slice(), &f32::NAN.to_le_bytes()].concat();
    let nan = |d: &Path| edit(d, norm, Some((Dtype::F32, vec![32], nan.clone())));
    damage("nan", &nan, &["model.safetensors", norm, "expected finite numbers, found NaN"]);
    let lost = |d: &Path| edit(d, norm, None);
    damage("lost", &lost, &["1 of 41 tensors are missing, the first is model.norm.weight"]);
    let file = |d: &Path| d.join("model.safetensors");
    let cut = |d: &Path, keep: usize| {
        let bytes = std::fs::read(file(d)).unwrap();
        std::fs::write(file(d), &bytes[..keep.min(bytes.len() - 1)]).unwrap();
    };
    damage("cut", &|d| cut(d, usize::MAX), &["model.safetensors", "bytes of data after the header, found "]);
    damage("header", &|d| cut(d, 100), &["model.safetensors", "expected a safetensors header of at most 92 bytes"]);
    damage("stub", &|d| cut(d, 5), &["model.safetensors", "at least 8 bytes, found 5 bytes"]);
    damage("gone", &|d| std::fs::remove_file(file(d)).unwrap(), &["model.safetensors", "found neither"]);
    let json = |d: &Path| std::fs::write(file(d), b"\x08\0\0\0\0\0\0\0not json").unwrap();
    damage("noise", &json, &["model.safetensors", "expected a safetensors header"]);
}

#[test]
fn broken_indices() {
    let place = Place::new();
    let dir = place.copy_model("index");
    std::fs::rename(dir.join("model.safetensors"), dir.join("all.safetensors")).unwrap();
    let index = |text: &str| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    let name = "model.safetensors.index.json";
    index(r#"{"weight_map": {"model.norm.weight": "gone.safetensors"}}"#);
    model_refused(&place, &dir, &[name, "expected the file gone.safetensors beside it", "found no such file"]);
    index(r#"{"weight_map": {"model.norm.weight": "../all.safetensors"}}"#);
    model_refused(&place, &dir, &[name, "model.norm.weight", "expected the name of a file", "../all.safetensors"]);
    index(r#"{"weight_map": {"colour": "all.safetensors"}}"#);
    model_refused(&place, &dir, &["all.safetensors", "colour", "found none of that name"]);
    index(r#"{"weights": {}}"#);
    model_refused(&place, &dir, &[name, "weight_map"]);
    refused(&["inspect", dir.to_str().unwrap()], &[name, "weight_map"]);
}

#[test]
fn configurations_that_mean_something_else() {
    let place = Place::new();
    let dir = place.copy_model("model");
    let (good, path) = (std::fs::read(dir.join("config.json")).unwrap(), dir.join("config.json"));
    for (key, value, parts) in [
        ("attention_bias", true.into(), &["attention_bias", "expected false", "found true"][..]),
        ("model_type", "llama".into(), &["model_type", "\"deepseek_v3\" or \"deepseek_v2\"", "found \"llama\""]),
        ("hidden_act", "gelu".into(), &["hidden_act", "expected \"silu\"", "found \"gelu\""]),
        ("n_group", 3.into(), &["n_group", "divisor of n_routed_experts = 4", "found 3"]),
        ("hidden_size", (-1).into(), &["hidden_size", "integer", "found -1"]),
        ("routed_scaling_factor", 1e300.into(), &["routed_scaling_factor", "above 0 that f32 holds"]),
        ("hidden_size", 64.into(), &["shape [320, 64], found shape [320, 32]"]),
    ] {
        configure(&dir, key, value);
        let dir_name = dir.to_str().unwrap();
        model_refused(&place, &dir, &[parts, &[dir_name]].concat());
        std::fs::write(&path, &good).unwrap();
    }
    std::fs::write(&path, "{\n  \"model_type\": deepseek_v3\n}").unwrap();
    model_refused(&place, &dir, &["config.json:2:17: expected a JSON object: expected value"]);
    refused(&["inspect", dir.to_str().unwrap()], &["config.json:2:", "expected a JSON object"]);
    std::fs::write(&path, "").unwrap();
    model_refused(&place, &dir, &["config.json:1:", "expected a JSON object"]);
}

#[test]
fn directories_that_hold_no_model() {
    let place = Place::new();
    for (name, found) in [("none", "found nothing"), ("text.txt", "found a file"), ("", "found neither")] {
        model_refused(&place, &place.path(name), &[&place.arg(name), "expected a model directory", found]);
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_or_is_not_there() {
    let place = Place::new();
    let dir = place.copy_model("model");
    let model = dir.to_str().unwrap();
    configure(&dir, "vocab_size", 300.into());
    refused(&["generate", model, "x"], &[model, "tokenizer and model disagree", "vocab_size = 300 ids, found 320"]);
    configure(&dir, "vocab_size", 320.into());
    std::fs::remove_file(dir.join("tokenizer.json")).unwrap();
    refused(&["generate", model, "x"], &["tokenizer.json", "cannot be read", "No such file"]);
}

#[test]
fn requests_beyond_the_model() {
    let place = Place::new();
    let (model, out) = (trained().to_str().unwrap(), place.arg("logits"));
    let long = "The river carries ".repeat(30);
    let generate = |more: &[&str], parts: &[&str]| {
        refused(&[&["generate", model], more].concat(), &[parts, &[model]].concat());
    };
    generate(&[&long], &["prompt tokens", "at most 64 together (max_position_embeddings)"]);
    generate(&["The", "--max-tokens", "64"], &["and 64 new ones: expected at most 64 together"]);
    generate(&["The", "--max-tokens", "18446744073709551615"], &["expected at most 64 together"]);
    generate(&["The", "--max-tokens", "0"], &["max_new_tokens 0: expected at least 1"]);
    generate(&[""], &["the prompt is empty", "at least one token"]);
    generate(&["The", "--temperature=-1"], &["temperature -1: expected 0"]);
    generate(&["The", "--temperature", "nan"], &["temperature NaN: expected 0"]);
    generate(&["The", "--top-p", "1.5"], &["top_p 1.5: expected a number from 0 to 1"]);
    let many = vec!["1"; 65].join(",");
    for cache in [&[][..], &["--no-cache"]] {
        let logits = |tokens: &str, parts: &[&str]| {
            let args = [&["logits", model, "--out", &out, "--tokens", tokens], cache].concat();
            refused(&args, &[parts, &[model]].concat());
            assert!(!place.path("logits").exists() && !place.path("logits.partial").exists());
        };
        logits("1,999999", &["token 999999 at index 1", "expected an id below 320"]);
        let args = ["logits", model, "--out", &out, "--tokens", "1,4294967296"];
        refused(&args, &["token 4294967296 at index 1: expected an id below vocab_size"]);
        logits("4294967295", &["token 4294967295 at index 0", "expected an id below 320"]);
        logits(&many, &["65 ", "at most 64 together (max_position_embeddings)"]);
    }
}

/// 2^30 positions of which all are asked for, and weights of 2^24 columns that no file holds.
#[test]
#[cfg(target_os = "linux")]
fn what_no_memory_holds_is_refused_before_it_is_asked_for() {
    let place = Place::new();
    let dir = place.copy_model("model");
    let model = dir.to_str().unwrap();
    configure(&dir, "max_position_embeddings", (1 << 30).into());
    configure(&dir, "num_hidden_layers", 4000.into());
    let parts = [model, "does not fit: expected at most ", " of memory, found that it needs "];
    refused(&["generate", model, "The", "--max-tokens", "1000000000"], &parts);
    refused(&["generate", model, "The", "--max-tokens", "1073741825"], &["at most 1073741824 together"]);
    configure(&dir, "num_hidden_layers", 2.into());
    configure(&dir, "vocab_size", (1 << 24).into());
    configure(&dir, "hidden_size", (1 << 20).into());
    let out = place.arg("logits");
    refused(&["logits", model, "--tokens", "1", "--out", &out], &parts);
}

/// Finite weights whose logits overflow: `generate` says so, `logits` writes what it found.
#[test]
fn activations_that_overflow() {
    let place = Place::new();
    let dir = place.copy_model("model");
    let row = [1e38f32.to_le_bytes(), 3e38f32.to_le_bytes()].concat();
    edit(&dir, "lm_head.weight", Some((Dtype::F32, vec![320, 32], row.repeat(320 * 16))));
    edit(&dir, "model.norm.weight", Some((Dtype::F32, vec![32], 1e3f32.to_le_bytes().repeat(32))));
    let (model, out) = (dir.to_str().unwrap(), place.arg("logits"));
    refused(&["generate", model, "The river"], &[model, "expected finite logits for position ", "overflow"]);
    crate::support::succeeds(&["logits", model, "--tokens", "1,2", "--out", &out]);
}

#[test]
fn checkpoints_without_their_run() {
    let place = Place::new();
    let run = place.path("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("metrics.jsonl"), "").unwrap();
    model_refused(&place, &run, &["run", "a run with a checkpoint (latest), found neither"]);
}
