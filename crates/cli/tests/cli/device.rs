//! `--device`: names that mean nothing, GPUs that are not there, verbs that have no use for one.

use crate::support::{Place, hadal, refused, succeeds, trained};
use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Isa, Level};

/// Whether this machine has no GPU, as its messages assume; if it has one, that they were not tested is reported.
#[track_caller]
pub fn no_gpu() -> bool {
    let absent = Cuda::count().unwrap() == 0;
    if !absent {
        hadal_numerics::skipped("an NVIDIA GPU is here");
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
    let parts = |asked: &str| {
        let named = format!("--device {asked}: ");
        let why = ["no NVIDIA driver", "libcuda", "install the driver of your GPU"];
        std::iter::once(named).chain(why.map(String::from).into_iter().filter(|_| !there)).collect::<Vec<_>>()
    };
    let refused = |args: &[&str], asked: &str| {
        let parts = parts(asked);
        refused(args, &parts.iter().map(String::as_str).collect::<Vec<_>>());
    };
    let model = trained().join("step-000003");
    let model = model.to_str().unwrap();
    let place = Place::new();
    for name in ["cuda", "cuda:0", "cuda:7"] {
        let pretrain = place.pretrain("out", &["--device", name]);
        refused(&pretrain.iter().map(String::as_str).collect::<Vec<_>>(), name);
        assert!(!place.path("out").exists());
        refused(&["generate", model, "The river", "--device", name], name);
        refused(&["bench", "gemm", "--device", name], name);
    }
    refused(&["logits", model, "--tokens", "1,2", "--out", &place.arg("z.safetensors"), "--device", "cuda"], "cuda");
    assert!(!place.path("z.safetensors").exists());
    // A GPU of a number cannot be spoken of.
    refused(&["inspect", "nano", "--device", "cuda:0"], "cuda:0");
}

/// What the variable `HADAL_ISA` names has to be a level, and one that this CPU has.
#[test]
fn levels_that_are_not_there_are_refused() {
    let model = trained().join("step-000003");
    let said = |level: &str, args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_hadal")).args(args).env("HADAL_ISA", level).output();
        let out = out.unwrap();
        assert_eq!(out.status.code(), Some(1), "{level}");
        String::from_utf8(out.stderr).unwrap()
    };
    let verbs: [&[&str]; 4] = [
        &["generate", model.to_str().unwrap(), "The river"],
        &["inspect", "nano"],
        &["bench", "gemm"],
        &["pretrain", "--preset", "nano", "--out", "never-made"],
    ];
    for args in verbs {
        for level in ["avx1024", "AVX2", ""] {
            let expected = format!("error: HADAL_ISA={level}: expected portable, avx2, avx512, avx512bf16 or amx\n");
            assert_eq!(said(level, args), expected);
        }
        for level in Level::ALL.into_iter().filter(|&l| Isa::new(l).is_none()) {
            let (found, name) = (said(level.name(), args), level.name());
            let lacks = found.starts_with(&format!("error: HADAL_ISA={name}: this CPU has no more than "));
            let refused =
                "error: HADAL_ISA=amx: this CPU has AMX, but the kernel refuses its use; expected no more than ";
            assert!(lacks || found.starts_with(refused), "{found}");
            assert_eq!(found.lines().count(), 1, "{found}");
        }
    }
    assert!(!std::path::Path::new("never-made").exists());
}

/// More threads than cores are told, once, and change nothing.
#[test]
fn threads_above_the_cores_are_told() {
    let model = trained().join("step-000003");
    let cores = std::thread::available_parallelism().unwrap().get();
    let (model, threads) = (model.to_str().unwrap(), (cores + 1).to_string());
    let ran = hadal(&["generate", model, "The river", "--max-tokens", "3", "--threads", &threads]);
    let expected = format!("--threads {threads}: more than the {cores} cores of this machine, which they share");
    let said: Vec<&str> = ran.stderr.lines().filter(|l| !l.starts_with('[')).collect();
    assert_eq!((ran.code, said), (Some(0), vec![&expected[..]]));
    let same = succeeds(&["generate", model, "The river", "--max-tokens", "3", "--threads", "1"]);
    assert_eq!(ran.stdout, same.stdout);
}

/// Builds `fake_driver.rs` as the driver's library.
#[cfg(target_os = "linux")]
pub fn fake_driver(place: &Place) {
    let library = place.arg("libcuda.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cli/fake_driver.rs");
    let built = std::process::Command::new(std::env::var("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "cuda", "-o", &library, source])
        .output()
        .expect("rustc, which built this test");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// What a driver that is there may say: too old, no GPU, one that is too old, no compiler beside it, an error of its own.
#[test]
#[cfg(target_os = "linux")]
fn fake_drivers_are_answered() {
    let place = Place::new();
    fake_driver(&place);
    let said = |fake: &str, device: &str| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_hadal"))
            .args(["bench", "gemm", "--device", device])
            .env("LD_LIBRARY_PATH", place.arg(""))
            .env("FAKE_CUDA", fake)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{fake}");
        String::from_utf8(out.stderr).unwrap()
    };
    let says = |fake: &str, device: &str, parts: &[&str]| {
        let found = said(fake, device);
        assert_eq!(found.lines().count(), 1, "{found}");
        for part in parts {
            assert!(found.contains(part), "{fake}: {part}: {found}");
        }
    };
    says("11040 1 9 0 0", "cuda", &["driver supports CUDA 11.4", "expected 12.8 or newer", "update the driver"]);
    says("13000 0 9 0 0", "cuda", &["--device cuda: this machine has 0 GPUs"]);
    // CUDA_ERROR_NO_DEVICE.
    says("13000 1 9 0 100", "cuda", &["this machine has 0 GPUs"]);
    says("13000 2 9 0 0", "cuda:2", &["--device cuda:2: this machine has 2 GPUs, numbered from 0"]);
    says("13000 1 7 5 0", "cuda", &["Fake 1000 has compute capability 7.5", "expected 8.0 (Ampere) or newer"]);
    says("13000 1 9 0 999", "cuda", &["starting the driver", "FAKE_ERROR", "an error that is not real"]);
    // No NVRTC beside it; a machine that has one has a driver too, of which no test can rid it.
    if no_gpu() {
        says("13000 1 9 0 0", "cuda", &["NVRTC", "libnvrtc.so", "LD_LIBRARY_PATH"]);
    }
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
