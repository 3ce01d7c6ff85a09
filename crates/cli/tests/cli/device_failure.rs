//! A GPU that fails in the midst of a run, that lacks memory, libraries or a place for compiled kernels, by a driver that
//! is not real: what is said, and what is left.

use crate::device::{fake_driver, no_gpu};
use crate::support::{Place, Ran, succeeds, trained};
use std::collections::BTreeSet;
use std::process::Command;

/// A place with a GPU of compute capability 8.0.
pub fn place() -> Place {
    let place = Place::new();
    fake_driver(&place);
    for other in ["libnvrtc.so", "libcublasLt.so"] {
        std::fs::copy(place.path("libcuda.so"), place.path(other)).unwrap();
    }
    place
}

/// Runs `hadal` there, where `fails` says what fails.
fn hadal(place: &Place, args: &[String], fails: &str, sync: bool) -> Ran {
    let sync = if sync { "1" } else { "0" };
    hadal_with(place, args, &[("FAKE_CUDA_FAILS", fails), ("HADAL_CUDA_SYNC", sync)])
}

/// Runs `hadal` there, with these variables.
pub fn hadal_with(place: &Place, args: &[String], variables: &[(&str, &str)]) -> Ran {
    let out = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(args)
        .env("LD_LIBRARY_PATH", place.arg(""))
        .env("HADAL_CACHE", place.arg("cache"))
        .env("FAKE_CUDA", "13000 1 8 0 0")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

/// The one line of a failure, without what every one has.
#[track_caller]
fn failure(ran: &Ran) -> &str {
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let mut errors = ran.stderr.lines().filter(|l| !l.starts_with('['));
    let (line, rest) = (errors.next().unwrap_or_default(), errors.next());
    assert_eq!(rest, None, "{}", ran.stderr);
    let said = line.strip_prefix("error: GPU 0 (Fake 1000): waiting for the device: ");
    let said = said.and_then(|s| s.strip_prefix("an error that is not real (FAKE_ERROR); launched last: "));
    said.unwrap_or_else(|| panic!("{line}"))
}

const HINT: &str = " (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)";

/// Checkpoints of the steps before the failure are there and can be gone on from, on another device too.
#[test]
fn a_run_goes_on_from_the_checkpoint_before_a_failure() {
    let place = place();
    let more = ["--device", "cuda", "--steps", "9", "--checkpoint-every", "3", "--eval-every", "9"];
    let args = place.pretrain("out", &more);
    // Step 1 is launched; step 2 and those after it are replayed.
    let ran = hadal(&place, &args, "replay 6", false);
    let said = failure(&ran);
    assert!(said.contains("replays of a recorded step of ") && said.contains(" of rmsnorm forward"), "{said}");
    assert!(said.ends_with(HINT), "{said}");
    let steps = |step: usize| place.path(&format!("out/step-{step:06}")).exists();
    assert_eq!([3, 6, 9].map(steps), [true, true, false]);
    let ran = succeeds(&["pretrain", "--resume", "--out", &place.arg("out")]);
    assert!(ran.stdout.contains("going on after step 6 from "), "{}", ran.stdout);
    assert!(steps(9));
}

#[test]
fn a_failure_names_the_launch_if_each_is_waited_for() {
    let place = place();
    let args = |out: &str| place.pretrain(out, &["--device", "cuda", "--steps", "4"]);
    let ran = hadal(&place, &args("out"), "kernel 30", false);
    let several = failure(&ran);
    assert!(several.matches(", grid [").count() > 1 && several.ends_with(HINT), "{several}");
    let ran = hadal(&place, &args("other"), "kernel 30", true);
    let one = failure(&ran);
    assert!(one.matches(", grid [").count() == 1 && one.ends_with(']') && one.contains("16["), "{one}");
}

/// Arguments of a run on the GPU that ends well.
fn short(place: &Place, out: &str) -> Vec<String> {
    place.pretrain(out, &["--device", "cuda", "--steps", "2", "--no-demo"])
}

/// What a run says that ends well, without its progress.
#[track_caller]
fn said(ran: &Ran) -> Vec<&str> {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.stderr.lines().filter(|l| !l.starts_with('[')).collect()
}

#[test]
fn a_step_that_does_not_fit_is_refused_with_what_would() {
    let place = place();
    // The GPU has 16 GiB.
    let refused = |more: &[&str]| {
        let ran = hadal_with(&place, &place.pretrain("out", &[&["--device", "cuda"], more].concat()), &[]);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        ran.stderr.lines().find_map(|l| l.strip_prefix("error: ")).unwrap_or_else(|| panic!("{ran:?}")).to_string()
    };
    let line = refused(&["--batch", "900000"]);
    let begins = "Fake 1000 (15.5 GiB free): training takes ";
    assert!(line.contains(begins) && line.contains("GiB with 900000 sequences of 32 at a time"), "{line}");
    let fits = line.split_once("; what fits: recompute = \"all\" with ").expect(&line).1;
    let sequences: usize = fits.split_once(" sequences of 32 at a time").expect(&line).0.parse().unwrap();
    assert!((300_000..900_000).contains(&sequences), "{line}");
    assert!(!place.path("out/latest").exists());
}

/// Arguments of a verb on the GPU.
fn on_gpu(args: &[&str]) -> Vec<String> {
    args.iter().chain(&["--device", "cuda"]).map(|a| a.to_string()).collect()
}

/// What inference takes is known before a weight is read, and where it does not fit, what would.
#[test]
fn inference_that_does_not_fit_is_refused_with_what_would() {
    let (place, model) = (place(), trained().join("step-000003"));
    let (model, out) = (model.to_str().unwrap(), place.arg("logits.safetensors"));
    let ids = vec!["7"; 60].join(",");
    let logits = ["logits", model, "--tokens", &ids, "--out", &out];
    let ran = |args: &[&str], bytes: usize| {
        hadal_with(&place, &on_gpu(args), &[("FAKE_CUDA_MEMORY", &((512 << 20) + bytes).to_string())])
    };
    let refused = |args: &[&str], bytes: usize| {
        let ran = ran(args, bytes);
        let line = ran.stderr.lines().find_map(|l| l.strip_prefix("error: "));
        assert_eq!(ran.code, Some(1), "{ran:?}");
        line.unwrap_or_else(|| panic!("{ran:?}")).to_string()
    };
    let nothing = "; nothing of this model fits: a smaller one does, or a device with more memory";
    for args in [&logits[..], &["generate", model, "The river"]] {
        let line = refused(args, 1000);
        let begins =
            format!("{model}: the model with what it computes does not fit: expected at most 1.00 kB of memory");
        assert!(line.starts_with(&begins) && line.ends_with(nothing), "{line}");
    }
    // Every number of ids takes more than fewer do, and as many as are said to fit do.
    for more in [&[][..], &["--no-cache"]] {
        let args = [&logits[..], more].concat();
        let enough = (1..1024).map(|i| i << 14).find(|&bytes| ran(&args, bytes).code == Some(0));
        let enough = enough.unwrap_or_else(|| panic!("in 16 MiB: {:?}", ran(&args, 16 << 20)));
        let bytes = enough - (20 << 10);
        let line = refused(&args, bytes);
        let fits = line.split_once("; what fits: --tokens of ").expect(&line).1;
        let n: usize = fits.strip_suffix(" ids").expect(&line).parse().unwrap();
        assert!((1..60).contains(&n), "{line}");
        let of = |n: usize| {
            let ids = vec!["7"; n].join(",");
            ran(&[&["logits", model, "--tokens", &ids, "--out", &out], more].concat(), bytes).code
        };
        assert_eq!((of(n), of(n + 1)), (Some(0), Some(1)), "{line}");
    }
}

/// Memory that others took in the meantime: each verb says what of its own would need less.
#[test]
fn running_out_of_memory_says_what_needs_less() {
    let (place, model) = (place(), trained().join("step-000003"));
    let model = model.to_str().unwrap();
    let out = place.arg("logits.safetensors");
    let train = place.pretrain("out", &["--device", "cuda"]);
    for (args, less) in [
        (on_gpu(&["generate", model, "The river"]), "a smaller --max-tokens or --dtype bf16 needs less"),
        (on_gpu(&["logits", model, "--tokens", "1,2", "--out", &out]), "fewer --tokens or --dtype bf16 need less"),
        (train, "a smaller batch, a shorter sequence or recompute = \"all\" needs less"),
    ] {
        let ran = hadal(&place, &args, "memory 1", false);
        let line = ran.stderr.lines().find_map(|l| l.strip_prefix("error: GPU 0 (Fake 1000): ")).unwrap_or_default();
        assert!(ran.code == Some(1) && line.contains(" GiB wanted, ") && line.contains(less), "{ran:?}");
    }
}

/// What a run took of the GPU is what its model is looked at with afterwards, though the driver has nothing left to give.
#[test]
fn a_run_is_looked_at_in_the_memory_that_it_took() {
    let place = place();
    let args = place.pretrain("out", &["--device", "cuda", "--steps", "2"]);
    let ran = hadal_with(&place, &args, &[("FAKE_CUDA_OTHERS", "1")]);
    // That far, as kernels that compute nothing draw no token.
    assert!(ran.stdout.contains("\nSamples: ") && !ran.stderr.contains("does not fit"), "{ran:?}");
}

/// Without cuBLASLt, or with one that is of no use, training takes hadal's own kernels, and says so.
#[test]
fn without_cublaslt_training_goes_on() {
    let place = place();
    let notice = "hadal's own kernels do its products, which takes longer";
    let ran = hadal_with(&place, &short(&place, "refused"), &[]);
    let expected = format!("cuBLASLt does not start (CUBLAS_STATUS_NOT_INITIALIZED): {notice}");
    assert_eq!(said(&ran), [expected]);
    if !no_gpu() {
        return;
    }
    std::fs::remove_file(place.path("libcublasLt.so")).unwrap();
    let ran = hadal_with(&place, &short(&place, "missing"), &[]);
    let [line] = said(&ran)[..] else { panic!("{}", ran.stderr) };
    assert!(line.starts_with("cuBLASLt is missing: libcublasLt.so ") && line.contains("LD_LIBRARY_PATH"), "{line}");
    assert!(line.ends_with(notice), "{line}");
}

/// A place for compiled kernels that cannot be made or is damaged costs their compilation, and the first is said, once.
#[test]
fn a_bad_cache_of_kernels_is_no_obstacle() {
    let place = place();
    place.write("file", "");
    let lines = |cache: &str, out: &str| {
        let ran = hadal_with(&place, &short(&place, out), &[("HADAL_CACHE", &place.arg(cache))]);
        let of_cache = |l: &&&str| !l.starts_with("cuBLASLt");
        said(&ran).iter().filter(of_cache).map(|l| l.to_string()).collect::<Vec<_>>()
    };
    let [line] = &lines("file", "a")[..] else { panic!("one line") };
    assert!(line.starts_with("compiled kernels are not kept for the next run: ") && line.contains("file"), "{line}");
    assert!(lines("cache", "b").is_empty());
    let kernels = || {
        let all = std::fs::read_dir(place.path("cache/kernels")).unwrap().map(|f| f.unwrap().path());
        all.map(|path| (std::fs::read(&path).unwrap(), path)).collect::<BTreeSet<_>>()
    };
    let whole = kernels();
    assert!(whole.len() > 5, "{whole:?}");
    for (i, (bytes, path)) in whole.iter().enumerate() {
        let damaged = [&b""[..], &bytes[..bytes.len() - 1], &[bytes, &b"?"[..]].concat()][i % 3].to_vec();
        std::fs::write(path, damaged).unwrap();
    }
    assert!(lines("cache", "c").is_empty());
    assert_eq!(kernels(), whole, "mended");
}
