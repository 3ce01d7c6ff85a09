//! The report at the end of a run: on the built-in corpus all of it, on other text and smaller models what makes sense.

use crate::support::{MODEL, Place, number, succeeds};
use serde_json::Value;

/// A few steps on the built-in corpus, in sequences that hold most problems.
const BUILT_IN: &str = "
[train]
steps = 2
batch = 2
seq = 128
eval_tokens = 256
";

/// Arguments of a run of the file `name` into `out`.
fn arguments(place: &Place, name: &str, out: &str, more: &[&str]) -> Vec<String> {
    let fixed = ["pretrain", "--config", &place.arg(name), "--out", &place.arg(out)].map(String::from);
    fixed.into_iter().chain(more.iter().map(|s| s.to_string())).collect()
}

/// The result without what a clock says.
fn timeless(result: &Value) -> Value {
    let mut result = result.clone();
    let map = result.as_object_mut().unwrap();
    for key in ["seconds", "tokens_per_s", "report_seconds", "checkpoint", "next"] {
        assert!(map.remove(key).is_some(), "{key}");
    }
    for sample in map["samples"].as_array_mut().unwrap() {
        sample.as_object_mut().unwrap().remove("tokens_per_s").unwrap();
    }
    result
}

#[test]
fn the_built_in_corpus_gets_the_whole_report() {
    let place = Place::new();
    let model = MODEL.replace("max_position_embeddings = 64", "max_position_embeddings = 128");
    place.write("built-in.toml", format!("{model}{BUILT_IN}"));
    let mut results = Vec::new();
    for threads in ["1", "3"] {
        let ran = succeeds(&arguments(&place, "built-in.toml", threads, &["--json", "--threads", threads]));
        results.push(ran.objects().pop().unwrap());
    }
    assert_eq!(timeless(&results[0]), timeless(&results[1]), "the number of threads changes the report");
    let result = &results[0];
    check_samples(result);
    check_arithmetic(&result["arithmetic"]);
    // Two layers of 16 + 4 numbers, against two heads of 12 + 8; two bytes each.
    let cache = &result["cache"];
    assert_eq!((&cache["latent_bytes_per_token"], &cache["mha_bytes_per_token"]), (&80.into(), &160.into()));
    assert_eq!(number(cache, "ratio"), 2.0);
    check_experts(&result["experts"]);
    check_acceptance(&result["acceptance"]);
}

fn check_samples(result: &Value) {
    let samples = result["samples"].as_array().unwrap();
    let kinds: Vec<&str> = samples.iter().map(|s| s["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["English", "English", "Chinese", "Chinese", "code", "code", "worked problem"]);
    for sample in samples {
        assert!(!sample["tokens"].as_array().unwrap().is_empty(), "{sample}");
        assert!(!sample["prompt"].as_str().unwrap().is_empty(), "{sample}");
    }
}

fn check_arithmetic(arithmetic: &Value) {
    assert_eq!(arithmetic["problems"], 60);
    for groups in ["kinds", "languages"] {
        let sum = |key| arithmetic[groups].as_array().unwrap().iter().map(|g| number(g, key)).sum::<f64>();
        assert_eq!((sum("problems"), sum("solved")), (60.0, number(arithmetic, "solved")), "{groups}");
    }
    let shown = arithmetic["shown"].as_array().unwrap();
    assert!(!shown.is_empty() && shown.iter().all(|s| !s["prompt"].as_str().unwrap().is_empty()), "{arithmetic}");
}

/// Every token chooses two of four experts.
fn check_experts(experts: &Value) {
    assert_eq!((number(experts, "even"), &experts["tokens"]), (0.5, &256.into()));
    let layers = experts["layers"].as_array().unwrap();
    let which: Vec<_> = layers.iter().map(|l| (l["layer"].as_u64().unwrap(), l["mtp"].as_bool().unwrap())).collect();
    assert_eq!(which, [(1, false), (2, true)]);
    for layer in layers {
        let shares: Vec<f64> = layer["shares"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        assert_eq!(shares.len(), 4);
        assert!((shares.iter().sum::<f64>() - 2.0).abs() < 1e-9, "{layer}");
        let (most, least) = (shares.iter().copied().fold(0.0, f64::max), shares.iter().copied().fold(1.0, f64::min));
        assert_eq!((number(layer, "most"), number(layer, "least")), (most, least));
        assert!((number(layer, "max_violation") - (most / 0.5 - 1.0)).abs() < 1e-9, "{layer}");
        let unused = shares.iter().filter(|&&s| s == 0.0).count();
        assert_eq!(layer["unused"].as_array().unwrap().len(), unused);
    }
}

fn check_acceptance(acceptance: &Value) {
    let written = acceptance["written"].as_array().unwrap();
    let texts: Vec<&str> = written.iter().map(|g| g["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["problems", "English", "Chinese", "code"]);
    let sum = |key| written.iter().map(|g| number(g, key)).sum::<f64>();
    assert!(sum("drafted") > 1000.0, "{acceptance}");
    assert!((number(acceptance, "rate") - sum("accepted") / sum("drafted")).abs() < 1e-9, "{acceptance}");
    assert_eq!(number(acceptance, "tokens_per_pass"), 1.0 + number(acceptance, "rate"));
    // Two windows of 128: 127 places each have a hidden state before and a target behind them.
    assert_eq!(acceptance["held_out"]["drafted"], 254);
}

#[test]
fn other_text_and_smaller_models_get_what_makes_sense() {
    let place = Place::new();
    let dense = "
[model]
preset = \"nano\"
vocab_size = 320
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
first_k_dense_replace = 1
num_attention_heads = 2
q_lora_rank = \"none\"
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
max_position_embeddings = 16
num_nextn_predict_layers = 0
[train]
steps = 2
batch = 2
seq = 16
";
    place.write("dense.toml", dense);
    let data = place.arg("text.txt");
    for dtype in ["fp32", "bf16"] {
        let text = succeeds(&arguments(&place, "dense.toml", dtype, &["--data", &data, "--dtype", dtype])).stdout;
        let has = ["--- held out\n", "Latent cache: ", "No layer has experts.", "no MTP layer", "Held-out text: "];
        has.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in {text}"));
        assert!(!text.contains("Worked arithmetic"), "{text}");
    }
    // Beginnings and problems that sixteen tokens do not hold.
    let ran = succeeds(&arguments(&place, "dense.toml", "built-in", &["--json"]));
    let result = ran.objects().pop().unwrap();
    assert_eq!((&result["experts"], &result["acceptance"]), (&Value::Null, &Value::Null));
    assert!(number(&result["arithmetic"], "too_long") > 0.0, "{result}");
    assert_eq!(result["samples"].as_array().unwrap().len(), 7);
    assert!(result["samples"].as_array().unwrap().iter().all(|s| s["tokens"].as_array().unwrap().len() <= 15));
}

#[test]
fn without_the_report_a_run_only_says_where_it_ended() {
    let place = Place::new();
    let result = succeeds(&place.pretrain("json", &["--no-demo", "--json"])).objects().pop().unwrap();
    assert_eq!(result["checkpoint"], place.arg("json/step-000003").as_str());
    for key in ["samples", "arithmetic", "cache", "experts", "acceptance"] {
        assert!(result.get(key).is_none(), "{key}: {result}");
    }
    let text = succeeds(&place.pretrain("text", &["--no-demo"])).stdout;
    assert!(text.contains("Checkpoint: ") && !text.contains("Samples"), "{text}");
}

/// The commands to try are written for a shell, whatever the directory is called.
#[test]
#[cfg(unix)]
fn the_commands_to_try_work() {
    let place = Place::new();
    let result = succeeds(&place.pretrain("it's a run", &["--no-demo", "--json"])).objects().pop().unwrap();
    let commands: Vec<&str> = result["next"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    for verb in ["generate", "inspect"] {
        let command = commands.iter().find(|c| c.starts_with(&format!("hadal {verb} "))).unwrap();
        let script = format!("hadal() {{ '{}' \"$@\"; }}; {command}", env!("CARGO_BIN_EXE_hadal"));
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(out.status.success() && !out.stdout.is_empty(), "{command}: {out:?}");
    }
    for verb in ["pretrain --resume", "convert"] {
        assert!(commands.iter().any(|c| c.starts_with(&format!("hadal {verb} "))), "{commands:?}");
    }
}

#[test]
fn lines_show_the_course_of_a_run() {
    let place = Place::new();
    let text = succeeds(&place.pretrain("out", &["--steps", "40", "--eval-every", "25", "--no-demo"])).stdout;
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("step ")).collect();
    let steps: Vec<&str> = lines.iter().map(|l| l.split(':').next().unwrap()).collect();
    assert_eq!(steps, ["step 1", "step 20", "step 25", "step 40"], "the first, every 20, and validations");
    assert!(lines[1].contains("tokens/s") && lines[1].contains(" left"), "{text}");
    assert!(!lines[1].contains("held out"), "nothing is known before the first validation: {text}");
    assert!(lines[2].contains("held out") && lines[2].contains("bits per byte"), "{text}");
    assert!(lines[3].contains(" 0 s left"), "{text}");
}
