//! `convert`, and FP8 models in the verbs that open models.

use crate::support::{Place, hadal, number, refused, succeeds, trained};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeSet;
use std::path::Path;

fn dtypes(dir: &Path) -> BTreeSet<String> {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().iter().map(|(_, t)| format!("{:?}", t.dtype())).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|s| s.to_string()).collect()
}

/// A run in FP8 and back: what comes out runs, counts as before, and means the same in both forms.
#[test]
fn a_run_in_fp8() {
    let place = Place::new();
    let run = trained().to_str().unwrap();
    let (fp8, wide, logits) = (place.arg("fp8"), place.arg("wide"), |name: &str| place.arg(name));
    let done = succeeds(&["convert", run, &fp8, "--dtype", "fp8", "--json"]).objects();
    let Some((result, progress)) = done.split_last() else { panic!("no object") };
    let (first, last) = (&progress[0], &progress[progress.len() - 1]);
    assert_eq!((&first["progress"], &first["done"]), (&"converting".into(), &0.into()));
    assert!(number(last, "total") > 0.0 && last["done"] == last["total"], "{done:?}");
    assert_eq!((&result["out"], &result["dtype"], &result["files"]), (&fp8.clone().into(), &"fp8".into(), &1.into()));
    assert!(number(result, "bytes") > 0.0 && number(result, "seconds") > 0.0);
    assert_eq!(dtypes(&place.path("fp8")), set(&["F8_E4M3", "F32", "BF16"]));
    let text = succeeds(&["convert", &fp8, &wide, "--dtype", "fp32", "--threads", "3"]).stdout;
    assert!(text.starts_with(&format!("{wide}: ")) && text.contains(" in 1 file, "), "{text}");
    assert_eq!(dtypes(&place.path("wide")), set(&["F32"]));
    for (model, out) in [(&fp8, "a"), (&wide, "b")] {
        succeeds(&["logits", model, "--tokens", "17,4,256", "--out", &logits(out), "--dtype", "fp32"]);
    }
    assert_eq!(std::fs::read(place.path("a")).unwrap(), std::fs::read(place.path("b")).unwrap());
    let generate = |model: &str| succeeds(&["generate", model, "The river", "--max-tokens", "5"]).stdout;
    assert_eq!(generate(&fp8), generate(&wide));
    let inspect = |model: &str| succeeds(&["inspect", model, "--json"]).objects().remove(0);
    let (quantised, plain) = (inspect(&fp8), inspect(run));
    assert_eq!(quantised["storage"], "FP8 (E4M3) in blocks of 128 x 128");
    assert_eq!((&quantised["parameters"], &plain["storage"]), (&plain["parameters"], &serde_json::Value::Null));
    assert!(succeeds(&["inspect", &fp8]).stdout.contains("FP8 (E4M3)"));
    let powers = place.arg("powers");
    succeeds(&["convert", run, &powers, "--dtype", "fp8", "--scale-fmt", "ue8m0"]);
    assert_eq!(dtypes(&place.path("powers")), set(&["F8_E4M3", "F8_E8M0", "F32", "BF16"]));
    assert_eq!(inspect(&powers)["storage"], "FP8 (E4M3) in blocks of 128 x 128, scales are powers of two");
}

#[test]
fn shards_of_a_given_size() {
    let place = Place::new();
    let run = trained().to_str().unwrap();
    let out = place.arg("out");
    let done = succeeds(&["convert", run, &out, "--dtype", "bf16", "--shard-size", "20KB", "--json"]).objects();
    assert!(number(&done[done.len() - 1], "files") > 3.0, "{done:?}");
    assert!(place.path("out/model.safetensors.index.json").exists() && place.path("out/tokenizer.json").exists());
    succeeds(&["generate", &out, "The river", "--max-tokens", "3"]);
}

#[test]
fn bad_requests() {
    let place = Place::new();
    let (run, out) = (trained().to_str().unwrap(), place.arg("out"));
    let convert = |more: &[&str], parts: &[&str]| {
        refused(&[&["convert", run, &out], more].concat(), parts);
        assert!(!place.path("out").exists() && !place.path(".out.partial").exists());
    };
    convert(&["--dtype", "int8"], &["--dtype int8: expected bf16, fp32 or fp8"]);
    convert(&["--dtype", "fp8", "--scale-fmt", "e5m2"], &["--scale-fmt e5m2: expected fp32 or ue8m0"]);
    convert(&["--dtype", "bf16", "--scale-fmt", "ue8m0"], &["--scale-fmt ue8m0 has no effect with --dtype bf16"]);
    convert(&["--dtype", "bf16", "--shard-size", "0"], &["--shard-size 0: expected a whole number above 0"]);
    let gone = place.arg("gone");
    refused(&["convert", &gone, &out, "--dtype", "bf16"], &[&gone, "expected a model directory", "found nothing"]);
    refused(&["convert", run, run, "--dtype", "bf16"], &[run, "found a directory that is not empty"]);
    let file = place.arg("text.txt");
    refused(&["convert", run, &file, "--dtype", "bf16"], &[&file, "found a file"]);
    let below = place.arg("text.txt/out");
    refused(&["convert", run, &below, "--dtype", "bf16"], &[&below]);
    assert_eq!(hadal(&["convert", run, &out]).code, Some(2), "--dtype is needed");
}

/// FP8 tensors that no verb may read as something else.
#[test]
fn damaged_fp8_models() {
    let place = Place::new();
    let (run, fp8) = (trained().to_str().unwrap(), place.arg("fp8"));
    succeeds(&["convert", run, &fp8, "--dtype", "fp8"]);
    let path = place.path("fp8/model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight_scale_inv";
    let edit = |with: Option<(Dtype, Vec<u8>)>| {
        let file = SafeTensors::deserialize(&good).unwrap();
        let mut tensors = file.tensors();
        tensors.retain(|(n, _)| n != name);
        if let Some((dtype, bytes)) = &with {
            let shape = vec![bytes.len() * 8 / dtype.bitsize(), 1];
            tensors.push((name.into(), safetensors::tensor::TensorView::new(*dtype, shape, bytes).unwrap()));
        }
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    };
    let all = |parts: &[&str]| {
        let parts = &[parts, &["model.safetensors"]].concat();
        refused(&["generate", &fp8, "The river"], parts);
        refused(&["logits", &fp8, "--tokens", "1,2", "--out", &place.arg("logits")], parts);
        refused(&["convert", &fp8, &place.arg("out"), "--dtype", "bf16"], parts);
        assert!(!place.path("logits").exists() && !place.path("out").exists());
    };
    edit(None);
    all(&["model.layers.0.mlp.down_proj.weight: expected its scales", name, "found none of that name"]);
    edit(Some((Dtype::F32, vec![0; 8])));
    all(&[name, "expected shape [1, 1] (blocks of 128 x 128), found shape [2, 1]"]);
    edit(Some((Dtype::I32, vec![0; 4])));
    all(&[name, "expected F32, BF16, F8_E8M0 or U8 scales, found I32"]);
    edit(Some((Dtype::F8_E8M0, vec![255])));
    all(&[name, "expected finite numbers, found NaN"]);
    std::fs::write(&path, &good).unwrap();
    let config = std::fs::read_to_string(place.path("fp8/config.json")).unwrap();
    place.write("fp8/config.json", config.replace("\"fp8\"", "\"awq\""));
    let parts = ["config.json: quantization_config.quant_method: expected \"fp8\", found \"awq\""];
    refused(&["inspect", &fp8], &parts);
    refused(&["generate", &fp8, "The river"], &parts);
    place.write("fp8/config.json", config.replace("quantization_config", "quantization"));
    let ran = hadal(&["generate", &fp8, "The river"]);
    assert!(ran.stderr.contains("expected quantization_config in config.json beside an F8_E4M3 tensor"), "{ran:?}");
}
