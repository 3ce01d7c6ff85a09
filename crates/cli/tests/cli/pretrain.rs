//! A run from text to a checkpoint: what it prints and what it leaves.

use crate::support::{MODEL, Place, hadal, metrics, number, succeeds};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeSet;
use std::path::Path;

/// The names that published V3 files have, spelled out for the model of these tests.
fn published_names() -> BTreeSet<String> {
    let mut names: Vec<String> =
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].map(String::from).into();
    let swiglu = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
    for layer in 0..3 {
        let mut parts: Vec<String> =
            ["input_layernorm", "post_attention_layernorm"].map(|p| format!("{p}.weight")).into();
        let attention =
            ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"];
        parts.extend(attention.map(|p| format!("self_attn.{p}.weight")));
        if layer == 0 {
            parts.extend(swiglu.map(|p| format!("mlp.{p}")));
        } else {
            parts.extend(["mlp.gate.weight", "mlp.gate.e_score_correction_bias"].map(String::from));
            parts.extend(swiglu.map(|p| format!("mlp.shared_experts.{p}")));
            parts.extend((0..4).flat_map(|e| swiglu.map(|p| format!("mlp.experts.{e}.{p}"))));
        }
        if layer == 2 {
            let mtp = ["eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head"];
            parts.extend(mtp.map(|p| format!("{p}.weight")));
        }
        names.extend(parts.iter().map(|p| format!("model.layers.{layer}.{p}")));
    }
    names.into_iter().collect()
}

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

fn check_checkpoint(dir: &Path, dtype: Dtype) {
    assert_eq!(names(dir), ["config.json", "model.safetensors", "state", "tokenizer.json", "tokenizer_config.json"]);
    let mut state = vec!["m.safetensors", "master.safetensors", "state.json", "v.safetensors"];
    // In fp32 the model's file holds the masters.
    state.retain(|name| dtype == Dtype::BF16 || *name != "master.safetensors");
    assert_eq!(names(&dir.join("state")), state);
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let names: BTreeSet<String> = file.names().into_iter().map(String::from).collect();
    assert_eq!(names, published_names());
    for (name, tensor) in file.tensors() {
        let expected = if name.ends_with("correction_bias") { Dtype::F32 } else { dtype };
        assert_eq!(tensor.dtype(), expected, "{name}");
    }
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    for (key, value) in [("vocab_size", 320), ("num_nextn_predict_layers", 1), ("bos_token_id", 0), ("eos_token_id", 1)]
    {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["model_type"], "deepseek_v3");
}

#[test]
fn a_run_leaves_metrics_and_whole_checkpoints() {
    let place = Place::new();
    let recorded = place.arg("batches.safetensors");
    let more = ["--steps", "4", "--checkpoint-every", "2", "--eval-every", "2", "--save-initial", "--record-batches"];
    let ran = succeeds(&place.pretrain("out", &[&more[..], &[recorded.as_str()]].concat()));
    let objects = ran.stdout.lines().filter(|l| l.starts_with('{')).count();
    assert_eq!(objects, 0, "JSON without --json: {}", ran.stdout);
    assert!(ran.stdout.contains("Checkpoint: ") && ran.stdout.contains("Try: hadal generate"), "{}", ran.stdout);

    let out = place.path("out");
    for step in [0, 2, 4] {
        check_checkpoint(&out.join(format!("step-{step:06}")), Dtype::BF16);
    }
    assert_eq!(out.join("latest").canonicalize().unwrap(), out.join("step-000004").canonicalize().unwrap());
    let steps = ["step-000000", "step-000002", "step-000004"];
    assert_eq!(names(&out), [&[".lock", "best", "data", "latest", "metrics.jsonl", "run.toml"][..], &steps].concat());
    check_metrics(&out);
    check_recorded(&place.path("batches.safetensors"));
}

fn check_metrics(out: &Path) {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = metrics(out);
    assert_eq!(lines.len(), 4);
    for (i, (line, text)) in lines.iter().zip(text.lines()).enumerate() {
        assert_eq!(serde_json::to_string(line).unwrap(), text, "numbers read back as the same numbers");
        assert_eq!(line["step"], i + 1);
        assert_eq!(line["tokens"], (i + 1) * 4 * 32);
        let parts: f64 = ["loss_main", "loss_mtp", "loss_balance"].iter().map(|k| number(line, k)).sum();
        assert!((number(line, "loss") - parts).abs() <= 1e-12, "{text}");
        // Fresh weights know nothing: ln 320, and 0.3 of it for MTP.
        let nothing = 320f64.ln();
        assert!((number(line, "loss_main") - nothing).abs() < 0.1 * nothing, "{text}");
        assert!((number(line, "loss_mtp") - 0.3 * nothing).abs() < 0.03 * nothing, "{text}");
        assert!(number(line, "loss_balance") > 0.0 && number(line, "loss_balance") < 1e-3, "{text}");
        for key in ["lr", "grad_norm", "seconds", "tokens_per_s"] {
            assert!(number(line, key) > 0.0, "{key}: {text}");
        }
        assert!((0.0..=1.0).contains(&number(line, "max_violation")), "2 of 4 experts: {text}");
        assert_eq!(line.get("valid_bits_per_byte").is_some(), (i + 1) % 2 == 0, "{text}");
        assert_eq!(line.get("valid_loss").is_some(), (i + 1) % 2 == 0, "{text}");
    }
}

fn check_recorded(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = file.tensor("tokens").unwrap();
    assert_eq!((tokens.dtype(), tokens.shape()), (Dtype::I32, &[4, 4, 33][..]));
    let ids: Vec<i32> = tokens.data().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
    assert!(ids.iter().all(|id| (0..320).contains(id)));
    assert!(ids.iter().collect::<BTreeSet<_>>().len() > 40, "varied text");
    assert_ne!(ids[..4 * 33], ids[4 * 33..8 * 33], "each step has its own windows");
}

#[test]
fn json_is_an_object_a_line_and_ends_with_the_result() {
    let place = Place::new();
    let ran = succeeds(&place.pretrain("out", &["--json"]));
    let objects = ran.objects();
    let steps: Vec<&serde_json::Value> = objects.iter().filter(|o| o.get("step").is_some()).collect();
    assert_eq!(steps.into_iter().cloned().collect::<Vec<_>>(), metrics(&place.path("out")), "as in metrics.jsonl");
    assert!(objects[0].get("phase").is_some());
    let start = objects.iter().find(|o| o.get("parameters").is_some()).unwrap();
    assert_eq!((&start["steps"], &start["tokens_per_step"]), (&3.into(), &128.into()));
    let result = objects.last().unwrap();
    assert_eq!(result["checkpoint"], place.arg("out/step-000003").as_str());
    assert_eq!(result["loss"], metrics(&place.path("out"))[2]["loss"]);
    assert!(number(result, "valid_bits_per_byte") > 0.0);
    let samples = result["samples"].as_array().unwrap();
    assert!(!samples.is_empty() && samples.iter().all(|s| !s["tokens"].as_array().unwrap().is_empty()), "{result}");
}

#[test]
fn the_loss_falls_on_text_that_repeats() {
    let place = Place::new();
    succeeds(&place.pretrain("out", &["--steps", "30", "--lr", "0.01"]));
    let lines = metrics(&place.path("out"));
    let mean = |key, part: &[serde_json::Value]| part.iter().map(|l| number(l, key)).sum::<f64>() / part.len() as f64;
    for key in ["loss", "loss_main", "loss_mtp"] {
        let (first, last) = (mean(key, &lines[..5]), mean(key, &lines[25..]));
        assert!(last < 0.75 * first, "{key}: {first} to {last}");
    }
    let valid: Vec<f64> = lines.iter().filter_map(|l| l.get("valid_loss")?.as_f64()).collect();
    assert!(valid.len() >= 4 && valid[valid.len() - 1] < valid[0], "{valid:?}");
}

#[test]
fn a_run_that_diverges_stops_and_writes_no_such_weights() {
    let place = Place::new();
    let ran = hadal(&place.pretrain("out", &["--steps", "6", "--lr", "1e30", "--checkpoint-every", "6"]));
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
    // Norms keep the loss of huge weights finite for a step; their gradients are not.
    assert!(ran.stderr.starts_with("error: step 2: expected a finite gradient norm, found NaN; "), "{ran:?}");
    assert_eq!(names(&place.path("out")), [".lock", "data", "metrics.jsonl", "run.toml"]);
    assert_eq!(metrics(&place.path("out")).len(), 1, "lines are of finite numbers");
}

#[test]
fn options_win_over_the_file_and_paths_may_come_from_it() {
    let place = Place::new();
    let data = place.arg("text.txt");
    place.write("run.toml", format!("{MODEL}[data]\npaths = [{data:?}]\n[train]\nsteps = 9\nbatch = 2\nseq = 16\n"));
    let (config, out) = (place.arg("run.toml"), place.arg("out"));
    succeeds(&["pretrain", "--config", &config, "--out", &out, "--steps", "2", "--batch", "3"]);
    let lines = metrics(&place.path("out"));
    assert_eq!((lines.len(), &lines[1]["tokens"]), (2, &(2 * 3 * 16).into()));
}

#[test]
fn an_empty_directory_is_taken_and_a_tokenizer_reused() {
    let place = Place::new();
    succeeds(&place.pretrain("first", &["--steps", "1"]));
    std::fs::create_dir(place.path("out")).unwrap();
    succeeds(&place.pretrain("out", &["--steps", "1", "--tokenizer", &place.arg("first/step-000001")]));
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        assert!(read(&format!("first/latest/{file}")) == read(&format!("out/latest/{file}")), "{file}");
    }
}

#[test]
fn help_names_the_verbs() {
    let ran = hadal(&["--help"]);
    assert_eq!(ran.code, Some(0));
    for verb in ["pretrain", "generate", "logits", "inspect"] {
        assert!(ran.stdout.contains(verb), "{}", ran.stdout);
        assert_eq!(hadal(&[verb, "--help"]).code, Some(0));
    }
}

/// Weights that one step makes infinite while its loss and gradients are still fine.
#[test]
fn weights_that_are_no_numbers_make_no_checkpoint() {
    let place = Place::new();
    let config = std::fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", format!("{config}weight_decay = 1e20\n"));
    let more = ["--lr", "1e30", "--checkpoint-every", "1", "--eval-every", "100"];
    let ran = hadal(&place.pretrain("out", &more));
    assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
    assert!(ran.stderr.starts_with("error: step 1: expected a finite weight, found "), "{ran:?}");
    assert_eq!(names(&place.path("out")), [".lock", "data", "metrics.jsonl", "run.toml"]);
}

#[test]
fn warmup_alone_leaves_the_other_phases_what_remains() {
    let place = Place::new();
    let config = std::fs::read_to_string(place.path("run.toml")).unwrap();
    place.write("run.toml", format!("{config}warmup = 3\n"));
    succeeds(&place.pretrain("out", &[]));
    let rates: Vec<f64> = metrics(&place.path("out")).iter().map(|m| number(m, "lr")).collect();
    assert!(rates.windows(2).all(|w| w[0] < w[1]), "{rates:?}");
}

/// Starts `hadal` with stdout as given; exit code and stderr.
#[cfg(unix)]
fn with_stdout(args: &[String], stdout: impl Into<std::process::Stdio>) -> (Option<i32>, String) {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_hadal")).args(args).stdout(stdout).output().unwrap();
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

#[test]
#[cfg(unix)]
fn a_run_goes_on_when_nobody_reads_and_other_verbs_stop() {
    let place = Place::new();
    let closed = || std::io::pipe().unwrap().1;
    let ran = with_stdout(&place.pretrain("out", &["--steps", "2"]), closed());
    assert_eq!(ran, (Some(0), String::new()));
    assert!(place.path("out/step-000002/config.json").exists());
    let inspect = ["inspect", "nano"].map(String::from);
    assert_eq!(with_stdout(&inspect, closed()), (Some(141), String::new()));
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_stdout_is_an_error() {
    let place = Place::new();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for args in [["inspect", "nano"].map(String::from).to_vec(), place.pretrain("out", &[])] {
        let (code, stderr) = with_stdout(&args, full());
        assert_eq!((code, stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(stderr.starts_with("error: stdout: cannot write: No space left"), "{stderr}");
    }
}
