//! Settings that cannot be: each is one line that says which, what was expected and what was found.

use crate::support::{MODEL, Place, TRAIN, hadal, refused, trained};

/// `run.toml` with one key changed or added must be refused.
fn config_refused(config: &str, parts: &[&str]) {
    let place = Place::new();
    place.write("run.toml", config);
    place.pretrain_refused(&[], &[parts, &["run.toml"]].concat());
}

fn model_with(from: &str, to: &str) -> String {
    assert!(MODEL.contains(from), "{from}");
    format!("{}{TRAIN}", MODEL.replace(from, to))
}

fn train_with(keys: &str) -> String {
    format!("{MODEL}{TRAIN}{keys}\n")
}

#[test]
fn unknown_keys_are_named_in_every_table() {
    let depth = "num_nextn_predict_layers = 1\n";
    config_refused(&model_with(depth, &format!("{depth}colour = 3\n")), &["[model]", "colour", "hidden_size"]);
    let theta = "theta = 10000.0\n";
    config_refused(&model_with(theta, &format!("{theta}colour = 3\n")), &["rope.colour", "theta"]);
    let yarn = "[model.rope.yarn]\nfactor = 4.0\noriginal_max_position_embeddings = 16\ncolour = 3\n";
    config_refused(&model_with(theta, &format!("{theta}{yarn}")), &["rope.yarn.colour", "factor"]);
    let line = |config: &str| config.lines().position(|l| l == "colour = 3").unwrap() + 1;
    for config in [format!("{MODEL}[data]\ncolour = 3\n"), train_with("colour = 3"), format!("colour = 3\n{MODEL}")] {
        let at = format!("run.toml:{}: ", line(&config));
        config_refused(&config, &[&at, "unknown field `colour`", "expected"]);
    }
}

#[test]
fn keys_without_effect_are_refused() {
    let no_mtp = |config: String| config.replace("num_nextn_predict_layers = 1", "num_nextn_predict_layers = 0");
    config_refused(&no_mtp(train_with("mtp_lambda = 0.3")), &["train.mtp_lambda has no effect", "MTP layer"]);
    let hidden = model_with("norm_topk_prob", "mtp_hidden = \"pre_norm\"\nnorm_topk_prob");
    config_refused(&no_mtp(hidden), &["mtp_hidden has no effect"]);
    let all_dense = no_mtp(model_with("first_k_dense_replace = 1", "first_k_dense_replace = 2"));
    config_refused(&all_dense, &["moe_intermediate_size has no effect: no layer has experts"]);
    let idle = ["moe_", "n_", "num_experts", "topk_", "norm_topk", "routed_"];
    let lines = all_dense.lines().filter(|l| !idle.iter().any(|k| l.starts_with(k)));
    let all_dense = lines.map(|l| format!("{l}\n")).collect::<String>();
    let dense = |key| format!("{all_dense}{key}\n");
    config_refused(&dense("balance_alpha = 0.1"), &["train.balance_alpha has no effect", "MoE"]);
    config_refused(&dense("bias_gamma = 0.1"), &["train.bias_gamma has no effect"]);
    config_refused(
        &model_with("first_k_dense_replace = 1", "first_k_dense_replace = 0"),
        &["intermediate_size has no effect: no layer is dense"],
    );
    for warmup in ["warmup = 2\nconstant = 1", "warmup = 3"] {
        let config = train_with(&format!("min_lr = 1e-4\n{warmup}"));
        config_refused(&config, &["train.min_lr has no effect: warmup = "]);
    }
    for key in ["bos_token_id = 3", "eos_token_ids = [3]"] {
        let config = model_with("norm_topk_prob", &format!("{key}\nnorm_topk_prob"));
        config_refused(&config, &[key.split(' ').next().unwrap(), "no effect", "tokenizer"]);
    }
}

#[test]
fn broken_toml_is_refused_with_its_line() {
    config_refused("[model]\npreset = \"nano\"\n\n[train]\nsteps == 3\n", &["run.toml:5: "]);
    config_refused("[train]\nsteps = \"three\"\n", &["run.toml:2: ", "string \"three\"", "expected u64"]);
    config_refused("[train]\nsteps = 3\n", &["expected a [model] table", "found none"]);
    config_refused("model = 3\n", &["run.toml:1: ", "expected a map"]);
    let place = Place::new();
    place.write("run.toml", b"\xff\xfe");
    place.pretrain_refused(&[], &["run.toml: cannot read", "UTF-8"]);
    std::fs::remove_file(place.path("run.toml")).unwrap();
    place.pretrain_refused(&[], &["run.toml: cannot read", "No such file"]);
}

#[test]
fn models_that_cannot_be_are_refused() {
    for (from, to, parts) in [
        ("hidden_size = 32", "hidden_size = 0", &["hidden_size", "1 to ", "found 0"][..]),
        ("hidden_size = 32", "hidden_size = \"wide\"", &["hidden_size", "integer", "found \"wide\""]),
        ("hidden_size = 32\n", "", &["hidden_size is missing"]),
        ("qk_rope_head_dim = 4", "qk_rope_head_dim = 3", &["qk_rope_head_dim", "even number", "found 3"]),
        ("num_experts_per_tok = 2", "num_experts_per_tok = 3", &["num_experts_per_tok", "1 to 2", "found 3"]),
        ("family = \"v3\"", "family = \"v4\"", &["family", "\"v2\" or \"v3\"", "found \"v4\""]),
        ("family = \"v3\"", "preset = \"v4\"", &["preset", "nano, mini", "found \"v4\""]),
        ("vocab_size = 320", "vocab_size = 100", &["vocab_size", "at least 266", "found 100"]),
    ] {
        let place = Place::new();
        place.write("run.toml", model_with(from, to));
        place.pretrain_refused(&[], parts);
    }
}

#[test]
fn training_settings_that_cannot_be_are_refused() {
    for (keys, parts) in [
        ("min_lr = 0.1", &["train.min_lr = 0.1", "at most lr = 0.002"][..]),
        ("weight_decay = -1", &["train.weight_decay = -1", "finite number >= 0"]),
        ("beta1 = 1", &["train.beta1 = 1", "[0, 1)"]),
        ("eps = inf", &["train.eps = inf", "finite"]),
        ("clip = 0", &["train.clip = 0", "> 0"]),
        ("warmup = 18446744073709551615", &["run.toml:", "too large"]),
        ("warmup = 4", &["train.warmup = 4, constant = 0", "at most steps = 3"]),
        ("warmup = 3\nconstant = 1", &["train.warmup = 3, constant = 1", "at most steps = 3"]),
        ("eval_every = 0", &["train.eval_every = 0", "at least 1"]),
    ] {
        config_refused(&train_with(keys), parts);
    }
    for fraction in ["0.0", "1.0", "nan"] {
        let config = format!("{MODEL}[data]\nvalid_fraction = {fraction}\n{TRAIN}");
        let place = Place::new();
        place.write("run.toml", config);
        place.pretrain_refused(&[], &["data.valid_fraction = ", "above 0 and below 1"]);
    }
    let place = Place::new();
    for (more, parts) in [
        (["--dtype", "fp8"], &["dtype \"fp8\"", "expected bf16 or fp32"][..]),
        (["--threads", "0"], &["--threads 0", "at least 1"]),
        (["--steps", "0"], &["train.steps = 0", "at least 1"]),
        (["--steps", "18446744073709551615"], &["--steps: 18446744073709551615", "at most 9223372036854775807"]),
        (["--steps", "9223372036854775807"], &["train.steps = 9223372036854775807", "at most 4294967296"]),
        (["--batch", "0"], &["train.batch = 0"]),
        (["--batch", "9223372036854775807"], &["train.batch = 9223372036854775807", "at most 2147483647"]),
        (["--micro-batch", "3"], &["train.micro_batch = 3", "divisor of batch = 4"]),
        (["--seq", "65"], &["train.seq = 65", "max_position_embeddings = 64"]),
        (["--seq", "1"], &["train.seq = 1", "more than the MTP depth 1"]),
        (["--lr", "nan"], &["train.lr = NaN"]),
        (["--lr", "0"], &["train.lr = 0"]),
        (["--lr", "1e300"], &["train.lr = 1e300", "a finite number that f32 holds"]),
        (["--checkpoint-every", "0"], &["train.checkpoint_every = 0"]),
    ] {
        place.pretrain_refused(&more, parts);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_run_that_no_memory_holds_is_refused() {
    let place = Place::new();
    refused(&["pretrain", "--preset", "v3", "--out", &place.arg("out")], &["does not fit", "of memory, found", "TB"]);
    assert!(!place.path("out").exists());
}

#[test]
fn an_unknown_preset_is_refused() {
    let place = Place::new();
    refused(&["pretrain", "--preset", "v4", "--out", &place.arg("out")], &["preset", "nano, mini", "found \"v4\""]);
    refused(&["inspect", "v4"], &["v4", "nano, mini"]);
    assert!(!place.path("out").exists());
}

#[test]
fn output_directories_that_cannot_be_are_refused() {
    let place = Place::new();
    std::fs::create_dir(place.path("full")).unwrap();
    place.write("full/note", "mine");
    let out = |name: &str, parts: &[&str]| refused(&place.pretrain(name, &[]), &[parts, &[name]].concat());
    out("full", &["expected a new or empty directory", "found files in it"]);
    out("text.txt", &["expected a new or empty directory", "found a file"]);
    out("text.txt/below", &["expected a new or empty directory", "Not a directory"]);
    assert_eq!(std::fs::read_dir(place.path("full")).unwrap().count(), 1);
    let nowhere = place.arg("none/batches");
    place.pretrain_refused(&["--record-batches", &nowhere], &[&nowhere, "no such directory"]);
    let model = trained().to_str().unwrap();
    for name in ["none/logits", "text.txt/logits", "full"] {
        refused(&["logits", model, "--tokens", "1", "--out", &place.arg(name)], &[name, "expected a file"]);
    }
}

#[test]
fn inspect_and_thread_counts() {
    let model = trained().to_str().unwrap();
    refused(&["inspect", model, "--seq", "65"], &["--seq 65", "max_position_embeddings = 64"]);
    refused(&["inspect", model, "--seq", "0"], &["--seq 0"]);
    refused(&["inspect", model, "--batch", "0"], &["--batch 0"]);
    refused(&["inspect", "v3", "--batch", "18446744073709551615"], &["--batch 18446744073709551615", "at most"]);
    refused(&["inspect", model, "--dtype", "fp8"], &["--dtype \"fp8\": expected bf16 or fp32"]);
    refused(&["inspect", model, "--recompute", "some"], &["--recompute \"some\": expected none, paper or all"]);
    refused(&["generate", model, "x", "--threads", "0"], &["--threads 0", "at least 1"]);
    refused(&["generate", model, "x", "--threads", "100000"], &["--threads 100000", "at most 1024", "cores"]);
    refused(&["generate", model, "x", "--dtype", "fp8"], &["--dtype \"fp8\": expected bf16 or fp32"]);
    let logits = ["logits", model, "--tokens", "1", "--out", "never-made", "--dtype", "fp8"];
    refused(&logits, &["--dtype \"fp8\": expected bf16 or fp32"]);
}

#[test]
fn wrong_arguments_are_json_too() {
    let ran = hadal(&["pretrain", "--preset", "nano", "--out", "x", "--steps", "many", "--json"]);
    assert_eq!(ran.code, Some(2));
    let error = ran.objects()[0]["error"].as_str().unwrap().to_string();
    assert!(error.contains("'many'") && ran.stderr.starts_with(&format!("error: {error}")), "{ran:?}");
    assert!(hadal(&["pretrain", "--steps", "many"]).stdout.is_empty());
    let both = hadal(&["pretrain", "--out", "x", "--preset", "nano", "--config", "x.toml"]);
    assert!(both.code == Some(2) && both.stderr.contains("cannot be used with"), "{both:?}");
}
