//! Benches: every kind runs its smallest cases once and prints results of one form; wrong options are one line.

#[cfg(target_os = "linux")]
use crate::device_failure::{hadal_with, place};
use crate::support::{Place, Ran, hadal, number, refused, succeeds};
use serde_json::Value;
use std::process::Command;

/// Keys of every result, in their order.
const KEYS: [&str; 11] =
    ["bench", "case", "unit", "ours", "rival_name", "rival", "ratio", "share_of_peak", "commit", "machine", "spread"];
/// Keys that training adds.
const OF_TRAINING: [&str; 4] = ["first_loss", "mean_loss", "peak_bytes", "state_bytes"];

/// Runs a kind's cases that have `case` in their names as shortly as possible.
fn bench(kind: &str, case: &str) -> Vec<Value> {
    let rows = succeeds(&["bench", kind, "--case", case, "--repeats", "1", "--seconds", "0", "--json"]).objects();
    rows.iter().for_each(|row| is_result(row, kind, &KEYS));
    rows
}

fn is_result(row: &Value, kind: &str, keys: &[&str]) {
    let found: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(found, keys);
    assert_eq!(row["bench"], kind);
    let [least, most] = [0, 1].map(|i| row["spread"][i].as_f64().unwrap());
    let ours = number(row, "ours");
    assert!(ours > 0.0 && ours.is_finite() && least <= ours && ours <= most, "{row}");
    for key in ["case", "unit", "commit", "machine"] {
        assert!(!row[key].as_str().unwrap().is_empty(), "{key} in {row}");
    }
    if row["rival"].is_null() {
        assert!(row["rival_name"].is_null() && row["ratio"].is_null(), "{row}");
    } else {
        let ratio = ours / number(row, "rival");
        assert!(row["rival_name"].is_string() && (number(row, "ratio") / ratio - 1.0).abs() < 1e-9, "{row}");
    }
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|r| r["case"].as_str().unwrap()).collect()
}

#[test]
fn products_are_measured_against_registers() {
    let rows = bench("gemm", "nano/router");
    let expected = [
        "nano/router/forward 16x16x256",
        "nano/router/input gradient 16x256x16",
        "nano/router/weight gradient 16x256x16",
    ];
    assert_eq!(names(&rows), expected);
    assert!(rows.iter().all(|r| r["unit"] == "GFLOP/s" && number(r, "share_of_peak") > 0.0));
    // A whole name is that case alone.
    assert_eq!(bench("gemm", "nano/o_proj/forward 16x256x128").len(), 1);
    let rows = bench("gemm", "nano/o_proj/rows 1x");
    assert!(rows.len() == 1 && rows[0]["unit"] == "GB/s" && number(&rows[0], "share_of_peak") > 0.0);
}

#[test]
fn experts_are_measured_beside_a_dense_product() {
    let rows = bench("grouped_gemm", "nano/down_proj");
    assert_eq!(rows.len(), 6, "{:?}", names(&rows));
    assert!(rows.iter().all(|r| r["rival_name"] == "hadal gemm" && number(r, "rival") > 0.0));
}

#[test]
fn attention_and_peak_are_measured() {
    let rows = bench("attention", "nano");
    let shape = "4 heads, 48/32";
    let expected = ["forward", "backward", "forward and backward"].map(|d| format!("nano/2x24/{d} {shape}"));
    assert_eq!(names(&rows), expected);
    let rows = bench("peak", "fma");
    assert_eq!(rows[0]["case"], "portable fma");
}

#[test]
fn memory_ops_are_measured_beside_a_copy() {
    let rows = bench("memory_ops", "nano");
    assert_eq!(rows.len(), 18, "{:?}", names(&rows));
    for row in &rows {
        assert!(row["rival_name"] == "plain copy" && row["unit"] == "GB/s", "{row}");
        assert_eq!(row["ratio"], row["share_of_peak"]);
    }
}

/// What a rival is told of a case is what the case's name says.
#[test]
fn cases_are_listed_with_their_sizes() {
    let listed = |kind: &str| succeeds(&["bench", kind, "--list", "--json"]).objects();
    let gemm = listed("gemm");
    for case in &gemm {
        let [m, n, k] = ["m", "n", "k"].map(|key| case[key].as_u64().unwrap());
        let name = case["case"].as_str().unwrap();
        assert!(name.ends_with(&format!("{m}x{n}x{k}")) && !name.contains("nano"), "{case}");
        assert!(["nn", "nt", "tn"].contains(&case["layout"].as_str().unwrap()), "{case}");
    }
    let has = |name: &str| gemm.iter().any(|c| c["case"] == name);
    assert!(has("square/tn 2048x2048x2048") && has("mini/o_proj/forward 4096x512x512"));
    assert!(has("v2-lite/dense down_proj/weight gradient 2048x10944x512") && has("v2-lite/q_proj/rows 16x3072x2048"));
    let grouped = listed("grouped_gemm");
    assert_eq!(grouped.len(), 24);
    for case in &grouped {
        let rows: u64 = case["counts"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap()).sum();
        assert_eq!(rows, case["rows"].as_u64().unwrap());
    }
    let attention = listed("attention");
    assert_eq!(attention[0]["case"], "v2-lite/1x2048/forward 16 heads, 192/128");
    assert_eq!(attention[0]["lengths"], serde_json::json!([2048]));
    assert!(succeeds(&["bench", "memory_ops", "--list"]).stdout.lines().any(|l| l.starts_with("mini/adamw ")));
}

/// A real step, and the same from what was exported for a rival.
#[test]
fn training_is_measured_and_exported() {
    let place = Place::new();
    let made = ["bench", "train", "--preset", "nano", "--batch", "2", "--seq", "16", "--steps", "2", "--json"];
    let keys = [&KEYS[..], &OF_TRAINING].concat();
    let result = |ran: Ran| {
        let row = ran.objects().pop().unwrap();
        is_result(&row, "train", &keys);
        row
    };
    let row = result(succeeds(&[&made[..], &["--dtype", "fp32"]].concat()));
    assert_eq!((&row["case"], &row["unit"]), (&Value::from("nano 2x16 fp32 cpu"), &Value::from("tokens/s")));
    let (first, mean) = (number(&row, "first_loss"), number(&row, "mean_loss"));
    // Of 4096 ids, before anything is learnt.
    assert!((first - 4096f64.ln()).abs() < 0.1 && mean < first + 0.1, "{row}");
    // Masters, gradients and two moments of 11.7 million numbers.
    assert_eq!(row["state_bytes"].as_u64().unwrap() / 1_000_000, 187);
    if cfg!(target_os = "linux") {
        assert!(number(&row, "peak_bytes") < 1e9, "{row}");
    }
    timed_by_op(&made, &keys);
    let export = place.arg("export");
    succeeds(&[&made[..], &["--export", &export]].concat());
    let again = result(succeeds(&["bench", "train", "--from", &export, "--dtype", "fp32", "--json"]));
    for key in ["case", "first_loss", "mean_loss", "state_bytes"] {
        assert_eq!(again[key], row[key], "{key}");
    }
    // What backward computes again changes no bit, but the case's name.
    for recompute in ["none", "all"] {
        let from = ["bench", "train", "--from", &export, "--dtype", "fp32", "--json", "--recompute", recompute];
        let other = result(succeeds(&from));
        assert_eq!(other["case"], Value::from(format!("nano 2x16 fp32 cpu recompute {recompute}")));
        for key in ["first_loss", "mean_loss", "state_bytes"] {
            assert_eq!(other[key], row[key], "{recompute}: {key}");
        }
    }
    refused(&["bench", "train", "--from", &export, "--steps", "3"], &["--steps 3", "at most 2", "tokens.safetensors"]);
    refused(&["bench", "train", "--from", &export, "--steps", "1"], &["--steps 1", "at least 2"]);
    refused(&["bench", "train", "--from", &export, "--seed", "1"], &["--seed has no effect"]);
    refused(&[&made[..10], &["--export", &export]].concat(), &["export", "not empty"]);
    std::fs::remove_file(place.path("export/bench.json")).unwrap();
    refused(&["bench", "train", "--from", &export], &["bench.json", "--export writes", "No such file"]);
}

/// A preset's model with other keys: they are used, and the case's name has them.
#[test]
fn training_is_measured_with_other_keys_of_the_model() {
    let bench = |more: &[&str]| {
        let made = ["bench", "train", "--preset", "nano", "--batch", "1", "--seq", "8", "--steps", "2", "--json"];
        succeeds(&[&made[..], more].concat()).objects().pop().unwrap()
    };
    let sets = ["--set", "model.num_hidden_layers=2", "--set", " model.n_routed_experts = 8"];
    let row = bench(&sets);
    assert_eq!(row["case"], "nano num_hidden_layers=2 n_routed_experts=8 1x8 bf16 cpu");
    let bytes = |row: &Value| row["state_bytes"].as_u64().unwrap();
    assert!(bytes(&row) < bytes(&bench(&[])) / 2, "{row}");
    let refuse = |set: &str, parts: &[&str]| refused(&["bench", "train", "--preset", "nano", "--set", set], parts);
    refuse("train.steps=3", &["--set train.steps=3: expected a key of the model, as model.n_routed_experts=64"]);
    refuse("model.steps", &["--set model.steps: expected KEY=VALUE"]);
    refuse("model.colour=3", &["--set model.colour=3: [model]: ", "colour"]);
    refuse("model.n_group=3", &["--set model.n_group=3: [model]: n_group"]);
    refuse("model.preset=mini", &["--set model.preset=mini and --preset: expected model.preset to be set once"]);
    for set in ["model.num_nextn_predict_layers=1", "model.mtp_hidden=pre-norm"] {
        refuse(set, &[set, "has no effect on hadal bench train, which trains without MTP"]);
    }
}

/// Keys of a step on a GPU, which the host gives it ahead of time; where there is no GPU, of one that computes nothing.
#[test]
#[cfg(target_os = "linux")]
fn training_on_a_gpu_tells_how_far_the_host_was_ahead() {
    let train = |steps: &str, more: &[&str]| {
        let made = ["bench", "train", "--preset", "nano", "--batch", "2", "--seq", "16", "--steps", steps];
        let args = [&made[..], &["--device", "cuda", "--json"], more].concat();
        // Another GPU's library could not be put in the place of one that is there.
        if hadal_kernels::cuda::Cuda::count().unwrap() > 0 {
            return hadal(&args);
        }
        hadal_with(&place(), &args.iter().map(|a| a.to_string()).collect::<Vec<_>>(), &[])
    };
    let result = |ran: Ran, keys: &[&str]| {
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let row = ran.objects().pop().unwrap();
        is_result(&row, "train", &[&KEYS[..], &OF_TRAINING, keys].concat());
        row
    };
    let row = result(train("5", &[]), &["host_waits", "graph_replayed"]);
    assert_eq!((row["host_waits"].as_f64(), row["graph_replayed"].as_bool()), (Some(0.0), Some(true)), "{row}");
    // Steps that are timed by op are launched one by one, and each is waited for.
    result(train("2", &["--by-op"]), &["by_op"]);
    let few = train("2", &[]);
    assert!(few.code == Some(1) && few.stderr.contains("--steps 2: expected at least 3 on a GPU"), "{few:?}");
}

/// The ops of a step take no more time than the step.
fn timed_by_op(made: &[&str], keys: &[&str]) {
    let mut rows = succeeds(&[made, &["--by-op"]].concat()).objects();
    let row = rows.pop().unwrap();
    is_result(&row, "train", &[keys, &["by_op"]].concat());
    let by_op = row["by_op"].as_object().unwrap();
    for op in ["gemm forward", "gemm_grouped backward weight", "mla_prefill backward", "adamw", "outside ops"] {
        assert!(by_op[op].as_f64().unwrap() > 0.0, "{op} in {row}");
    }
    let all: f64 = by_op.values().map(|s| s.as_f64().unwrap()).sum();
    let step = 32.0 / number(&row, "ours");
    assert!((all / step - 1.0).abs() < 1e-6, "{all} s in ops, {step} s a step: {row}");
    // Each has a row too.
    assert_eq!(rows.len(), by_op.len());
    for (op, seconds) in by_op {
        let case = format!("{}/{op}", row["case"].as_str().unwrap());
        let of_op = rows.iter().find(|row| row["case"] == *case).unwrap();
        assert_eq!((number(of_op, "ours"), &of_op["unit"]), (1e3 * seconds.as_f64().unwrap(), &Value::from("ms")));
        is_result(of_op, "train_by_op", &[&KEYS[..], &["calls"]].concat());
    }
    let sized = succeeds(&[made, &["--by-op", "--by-size"]].concat()).objects().pop().unwrap();
    let q_a = "gemm forward x bf16[8192], w bf16[96, 256], y bf16[3072]";
    assert!(sized["by_op"].as_object().unwrap().contains_key(q_a), "{sized}");
    let alone = hadal(&[made, &["--by-size"]].concat());
    assert!(alone.code == Some(2) && alone.stderr.contains("--by-op"), "{alone:?}");
}

#[test]
fn results_are_recorded() {
    let place = Place::new();
    let run = || {
        let options = ["--case", "nano/o_proj/forward", "--repeats", "1", "--seconds", "0", "--json", "--record"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
        let ran = command.args(["bench", "gemm"]).args(options).current_dir(place.path("")).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    };
    let printed = [run(), run()];
    let row: Value = serde_json::from_str(&printed[0]).unwrap();
    let folder = place.path("bench/record").join(row["machine"].as_str().unwrap());
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    // Two, if midnight lay between both runs.
    let text: String = files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect();
    assert!(files.iter().all(|f| f.extension().is_some_and(|e| e == "jsonl")) && text.lines().count() == 2);
    assert!(printed.iter().all(|line| text.contains(line.as_str())));
}

/// That a result could not be recorded is found out before it is measured, and finding it out leaves no file.
#[test]
fn a_record_that_takes_no_results_is_refused_first() {
    let place = Place::new();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
        let ran = command.args(["bench"]).args(args).args(["--json", "--record"]).current_dir(place.path("")).output();
        let ran = ran.unwrap();
        (ran.status.code(), String::from_utf8(ran.stdout).unwrap())
    };
    let gemm = ["gemm", "--case", "nano/o_proj/forward", "--repeats", "1", "--seconds", "0"];
    let train = ["train", "--preset", "nano", "--batch", "1", "--seq", "8", "--steps", "2"];
    let refuse = |args: &[&str]| {
        let (code, stdout) = run(args);
        let only: Value = serde_json::from_str(&stdout).expect("one object, no result before it");
        let error = only["error"].as_str().unwrap();
        assert!(code == Some(1) && error.contains(".jsonl: cannot append a result: "), "{stdout}");
        error.split(".jsonl").next().unwrap().to_string() + ".jsonl"
    };
    place.write("bench", "a file where a folder should be");
    refuse(&gemm);
    refuse(&train);
    std::fs::remove_file(place.path("bench")).unwrap();
    // What was found out leaves nothing beside the record.
    let (code, stdout) = run(&gemm);
    assert_eq!(code, Some(0), "{stdout}");
    let row: Value = serde_json::from_str(&stdout).unwrap();
    let folder = place.path("bench/record").join(row["machine"].as_str().unwrap());
    let files = || std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    std::fs::remove_file(file).unwrap();
    std::fs::create_dir(file).unwrap();
    assert_eq!([refuse(&gemm), refuse(&train)].map(|name| place.path(&name)), [file.clone(), file.clone()]);
    assert_eq!(&files(), std::slice::from_ref(file));
}

#[test]
fn wrong_options_are_one_line() {
    for kind in ["gemm", "grouped_gemm", "attention", "memory_ops", "peak"] {
        let parts = ["--case xyz", &format!("hadal bench {kind} --list"), "found none"];
        refused(&["bench", kind, "--case", "xyz"], &parts);
    }
    let empty = ["--case \"\"", "hadal bench gemm --list", "found nothing"];
    refused(&["bench", "gemm", "--case", ""], &empty);
    refused(&["bench", "gemm", "--case", "", "--list"], &empty);
    for repeats in ["0", "1000001", "18446744073709551615"] {
        let parts = [&format!("--repeats {repeats}: "), "at least 1", "at most 1000000"];
        refused(&["bench", "gemm", "--repeats", repeats], &parts);
    }
    for seconds in ["-1", "nan", "inf"] {
        refused(&["bench", "gemm", &format!("--seconds={seconds}")], &["--seconds", "from 0 to 3600"]);
    }
    refused(&["bench", "gemm", "--seconds", "-1"], &["--seconds -1: expected a number from 0 to 3600"]);
    let negative = hadal(&["bench", "gemm", "--threads", "-1"]);
    assert!(
        negative.code == Some(2) && negative.stderr.contains("invalid value '-1' for '--threads <N>'"),
        "{negative:?}"
    );
    let cores = std::thread::available_parallelism().unwrap().get();
    for found in [0, cores + 1] {
        let found = found.to_string();
        refused(&["bench", "gemm", "--threads", &found], &["--threads", &found, &format!("at most the {cores} cores")]);
    }
    refused(&["bench", "gemm", "--seed", "1"], &["--seed has no effect on hadal bench gemm"]);
    let train =
        |more: &[&str], parts: &[&str]| refused(&[&["bench", "train", "--preset", "nano"], more].concat(), parts);
    train(&["--device", "gpu"], &["--device gpu", "expected cpu, cuda or cuda:N"]);
    train(&["--dtype", "fp8"], &["--dtype \"fp8\": expected bf16 or fp32"]);
    train(&["--recompute", "some"], &["--recompute \"some\": expected none, paper or all"]);
    let both = hadal(&["bench", "train", "--preset", "nano", "--recompute", "none", "--export", "never-made"]);
    assert!(both.code == Some(2) && both.stderr.contains("cannot be used with"), "{both:?}");
    for steps in ["0", "1"] {
        train(&["--steps", steps], &[&format!("--steps {steps}: expected at least 2: the first is not timed")]);
    }
    train(&["--steps", "0", "--export", "never-made"], &["--steps 0: expected at least 1"]);
    train(&["--steps", "5000000000"], &["--steps 5000000000: expected at most 4294967296"]);
    train(&["--batch", "0"], &["--batch 0: expected at least 1"]);
    train(
        &["--batch", "9999999999", "--seq", "9"],
        &["--batch 9999999999 --seq 9: expected at most 2147483647 tokens"],
    );
    train(&["--seq", "0"], &["--seq 0: expected at least 1"]);
    train(&["--seq", "1025"], &["--seq 1025: ", "max_position_embeddings = 1024"]);
    refused(&["bench", "train", "--preset", "v4"], &["preset", "nano, mini", "found \"v4\""]);
    refused(&["bench", "train", "--from", "nowhere"], &["nowhere", "config.json"]);
    assert_eq!(hadal(&["bench", "train"]).code, Some(2));
    let unknown = hadal(&["bench", "speed"]);
    assert!(unknown.code == Some(2) && unknown.stderr.contains("'speed'"), "{unknown:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_step_that_no_memory_holds_is_refused() {
    refused(&["bench", "train", "--preset", "v3"], &["does not fit", "of memory, found", "TB"]);
}
