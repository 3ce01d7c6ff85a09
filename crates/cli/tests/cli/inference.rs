//! generate, logits and inspect.

use crate::support::{Place, number, succeeds, trained};
use safetensors::SafeTensors;
use std::path::Path;

fn run_dir() -> String {
    trained().to_str().unwrap().to_string()
}

fn logits(path: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let t = file.tensor("logits").unwrap();
    let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (t.shape().to_vec(), values)
}

#[test]
fn the_same_seed_writes_the_same_text() {
    let (run, step) = (run_dir(), trained().join("step-000003").to_str().unwrap().to_string());
    let text = |model: &str, more: &[&str]| {
        let args = [&["generate", model, "The river", "--max-tokens", "12", "--dtype", "fp32"], more].concat();
        succeeds(&args).stdout
    };
    let greedy = text(&run, &["--temperature", "0"]);
    assert!(greedy.starts_with("The river") && greedy.ends_with('\n'), "{greedy:?}");
    assert_eq!(text(&step, &["--temperature", "0", "--seed", "4", "--threads", "5"]), greedy);
    assert_eq!(text(&run, &["--temperature", "2", "--top-k", "1", "--seed", "4"]), greedy);
    let sampled = |seed| text(&run, &["--temperature", "1", "--top-p", "1", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn generation_as_json() {
    let args = ["generate", &run_dir(), "The lamp", "--temperature", "0", "--dtype", "fp32", "--max-tokens", "7"];
    let text = succeeds(&args).stdout;
    let objects = succeeds(&[&args[..], &["--json"]].concat()).objects();
    let [result] = &objects[..] else { panic!("one object: {objects:?}") };
    assert_eq!(result["prompt"], "The lamp");
    assert_eq!(format!("The lamp{}\n", result["text"].as_str().unwrap()), text);
    let (tokens, finish) = (result["tokens"].as_array().unwrap(), result["finish"].as_str().unwrap());
    assert!(tokens.iter().all(|t| t.as_u64().unwrap() < 320));
    assert!(finish == "stop" && tokens.len() < 7 || finish == "length" && tokens.len() == 7, "{result}");
    assert!(number(result, "tokens_per_s") > 0.0);
    assert_eq!(result["cache_bytes_per_token"], 2 * (16 + 4) * 4, "layers, C + R, fp32");
}

#[test]
fn without_max_tokens_a_short_model_still_answers() {
    let objects = succeeds(&["generate", &run_dir(), "The", "--json", "--bos"]).objects();
    assert!(objects[0]["tokens"].as_array().unwrap().len() < 64, "{objects:?}");
}

#[test]
fn cached_and_uncached_logits_agree() {
    let place = Place::new();
    let ids = [17u32, 4, 256, 300, 9, 0, 1, 319, 42, 42, 42, 100];
    let tokens = ids.map(|t| t.to_string()).join(",");
    let write = |name: &str, more: &[&str]| {
        let (run, out) = (run_dir(), place.arg(name));
        let ran = succeeds(&[&["logits", &run, "--tokens", &tokens, "--out", &out, "--json"], more].concat());
        assert_eq!(ran.objects(), [serde_json::json!({ "out": out, "shape": [12, 320], "dtype": "f32" })]);
        let (shape, values) = logits(&place.path(name));
        assert_eq!((&shape[..], values.len()), (&[12, 320][..], 12 * 320));
        values
    };
    let cached = write("a", &["--dtype", "fp32"]);
    let uncached = write("b", &["--dtype", "fp32", "--no-cache"]);
    assert_eq!(write("c", &["--dtype", "fp32", "--threads", "5"]), cached);
    let close = |a: &[f32], b: &[f32], tolerance: f64| {
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let rms = (b.iter().map(square).sum::<f64>() / b.len() as f64).sqrt();
        let worst = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).abs() / (f64::from(b.abs()) + rms);
        let worst = a.iter().zip(b).map(worst).fold(0.0, f64::max);
        assert!(rms > 0.01 && worst <= tolerance, "{worst} of {tolerance}");
    };
    close(&cached, &uncached, 1e-5);
    // bf16 has 8 bits; errors add up over two layers.
    close(&write("d", &[]), &uncached, 0.05);
    // What follows changes nothing before it.
    let short = place.arg("e");
    succeeds(&["logits", &run_dir(), "--tokens", "17,4,256", "--out", &short, "--dtype", "fp32"]);
    assert_eq!(logits(&place.path("e")), (vec![3, 320], cached[..3 * 320].to_vec()));
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 2 + 5, "no other file is left");
}

#[test]
fn presets_have_the_published_numbers() {
    for (name, parameters, cache) in [("v3", 671_026_404_352u64, 70_272), ("v2-lite", 15_706_484_224, 31_104)] {
        let result = &succeeds(&["inspect", name, "--json"]).objects()[0];
        assert_eq!((&result["parameters"], &result["cache_bytes_per_token"]), (&parameters.into(), &cache.into()));
        let text = succeeds(&["inspect", name]).stdout;
        assert!(text.contains(&parameters.to_string()) && text.contains(&format!("{cache} B")), "{text}");
    }
    for preset in ["nano", "mini", "1b", "moonlight-16b"] {
        assert_eq!(succeeds(&["inspect", preset, "--json"]).objects().len(), 1);
    }
}

#[test]
fn inspect_counts_what_a_run_wrote() {
    let result = &succeeds(&["inspect", &run_dir(), "--json", "--batch", "4", "--seq", "32"]).objects()[0];
    let (d, v) = (32, 320);
    let attention = 16 * d + 16 + 2 * 12 * 16 + (16 + 4) * d + 16 + 2 * 16 * 16 + d * 2 * 8;
    let (dense, moe) = (3 * d * 48, 4 * d + 5 * 3 * d * 16);
    let total = 2 * v * d + d + 2 * (attention + 2 * d) + dense + moe;
    assert_eq!(result["parameters"], total);
    assert_eq!(result["parameters_active"], total - 2 * 3 * d * 16, "2 of 4 experts");
    assert_eq!(result["correction_biases"], 4);
    // A MoE layer, eh_proj, three norms, and its own correction bias.
    assert_eq!(result["mtp_parameters"], attention + 2 * d + moe + 2 * d * d + 3 * d + 4);
    assert_eq!((&result["mtp_layers"], &result["family"]), (&1.into(), &"V3".into()));
    let memory = &result["training_memory"];
    let parts = ["masters", "compute_weights", "gradients", "moments", "saved_activations", "working_set", "process"];
    assert_eq!(parts.iter().map(|p| number(memory, p)).sum::<f64>(), number(memory, "total"));
}
