//! `--device`: names that mean nothing, GPUs that are not there, verbs that have no use for one.

use crate::support::{Place, hadal, refused, succeeds, trained};
use hadal_kernels::cuda::Cuda;

/// Whether this machine has no GPU, as its messages assume; if it has one, that they were not tested is reported.
#[track_caller]
fn no_gpu() -> bool {
    let absent = Cuda::count().unwrap() == 0;
    if !absent {
        use std::io::Write;
        let test = std::thread::current().name().unwrap_or("main").to_string();
        writeln!(std::io::stderr(), "skipped: {test}: an NVIDIA GPU is here").expect("stderr can be written");
    }
    absent
}

#[test]
fn names_that_mean_no_device_are_refused() {
    let model = trained().join("step-000003");
    let model = model.to_str().unwrap();
    for name in ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:0:0", "cpu:0", ""] {
        let found = format!("--device {name}: ");
        let refuse = |args: &[&str]| refused(&[args, &["--device", name]].concat(), &[&found, "cpu, cuda or cuda:N"]);
        refuse(&["generate", model, "The river"]);
        refuse(&["inspect", "nano"]);
        refuse(&["bench", "gemm"]);
    }
    let place = Place::new();
    place.pretrain_refused(&["--device", "gpu"], &["--device gpu: ", "cpu, cuda or cuda:N"]);
}

#[test]
fn without_a_driver_it_is_named_and_what_to_do() {
    if !no_gpu() {
        return;
    }
    // A driver without a GPU is another message.
    let there = std::process::Command::new("nvidia-smi").output().is_ok();
    let parts: &[&str] =
        if there { &["--device cuda"] } else { &["no NVIDIA driver", "libcuda", "install the driver of your GPU"] };
    let model = trained().join("step-000003");
    let model = model.to_str().unwrap();
    let place = Place::new();
    for name in ["cuda", "cuda:0", "cuda:7"] {
        place.pretrain_refused(&["--device", name], parts);
        refused(&["generate", model, "The river", "--device", name], parts);
        refused(&["bench", "gemm", "--device", name], parts);
    }
    refused(&["logits", model, "--tokens", "1,2", "--out", &place.arg("z.safetensors"), "--device", "cuda"], parts);
    assert!(!place.path("z.safetensors").exists());
    // A GPU of a number cannot be spoken of.
    refused(&["inspect", "nano", "--device", "cuda:0"], parts);
}

#[test]
fn verbs_of_the_host_have_no_device() {
    let model = trained().join("step-000003");
    let (place, model) = (Place::new(), model.to_str().unwrap());
    for device in ["cuda", "cpu"] {
        let refuse = |args: &[&str], verb: &str| {
            let expected = format!("--device has no effect on hadal {verb}");
            refused(&[args, &["--device", device]].concat(), &[&expected]);
        };
        refuse(&["convert", model, &place.arg("fp32"), "--dtype", "fp32"], "convert");
        refuse(&["tokenizer", "encode", model, "The river"], "tokenizer encode");
    }
    assert!(!place.path("fp32").exists());
}

/// What training takes is known without a GPU.
#[test]
fn inspect_predicts_a_gpus_memory_without_one() {
    if !no_gpu() {
        return;
    }
    let args = ["inspect", "1b", "--device", "cuda", "--batch", "8", "--seq", "2048"];
    let ran = succeeds(&args);
    let line = ran.stdout.lines().find(|l| l.starts_with("memory on an NVIDIA H200 (there is no GPU here)"));
    assert!(line.is_some_and(|l| l.contains(" GB at most")), "{}", ran.stdout);
    let total = |more: &[&str]| {
        let ran = hadal(&[&args[..], more, &["--json"]].concat());
        let object = ran.objects().pop().unwrap();
        let part = |name: &str| object["gpu_memory"][name].as_f64().unwrap_or_else(|| panic!("{name}: {object}"));
        let state: f64 = ["weights", "gradients", "moments"].map(part).iter().sum();
        assert!((part("bytes_per_parameter") - 18.0).abs() < 0.5, "{object}");
        assert!(part("total") >= state + part("step"), "{object}");
        part("step")
    };
    let [none, paper, all] = ["none", "paper", "all"].map(|r| total(&["--recompute", r]));
    assert!(none > paper && paper > all, "{none} {paper} {all}");
    // Without --device there is nothing of it.
    assert!(!succeeds(&["inspect", "nano"]).stdout.contains("memory on"));
}
