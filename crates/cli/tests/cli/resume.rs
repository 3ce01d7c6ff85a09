//! Stopping a run and going on with it.

use crate::support::{Place, hadal, refused, succeeds, timeless};
use std::path::Path;

/// Every visible file below, by its path, but what a clock decides.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_string();
            if path.is_dir() && !path.is_symlink() {
                open.push(path);
            } else if name.ends_with(".safetensors") {
                found.push((name, std::fs::read(path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let place = Place::new();
    let more = ["--steps", "4", "--checkpoint-every", "2", "--eval-every", "2"];
    succeeds(&place.pretrain("whole", &more));
    succeeds(&place.pretrain("out", &[&more[..], &["--resume"]].concat()));
    // As if it had been killed after the checkpoint of step 2 was written.
    std::fs::remove_dir_all(place.path("out/step-000004")).unwrap();
    let out = place.arg("out");
    let ran = succeeds(&["pretrain", "--resume", "--out", &out]);
    assert!(ran.stdout.contains("going on after step 2 from "), "{}", ran.stdout);
    assert_eq!(timeless(&place.path("out")), timeless(&place.path("whole")));
    assert!(files(&place.path("out")) == files(&place.path("whole")), "another checkpoint");
    assert!(!files(&place.path("out")).is_empty());
}

#[test]
fn other_settings_are_refused_and_some_taken() {
    let place = Place::new();
    succeeds(&place.pretrain("out", &["--steps", "2", "--set", "train.warmup=1", "--set", "train.constant=1"]));
    let out = place.arg("out");
    let resume = |more: &[&str]| [&["pretrain", "--resume", "--out", &out], more].concat().join("\n");
    let split = |args: String| args.split('\n').map(String::from).collect::<Vec<_>>();
    let refuse = |more: &[&str], parts: &[&str]| refused(&split(resume(more)), parts);
    refuse(&["--steps", "3"], &["run.toml: ", "train.steps: saved 2, asked 3", "--override allows it"]);
    refuse(
        &["--set", "model.hidden_size=64", "--lr", "0.001", "--override"],
        &["not within a run, even with --override: model.hidden_size: saved 32, asked 64"],
    );
    refuse(&["--seed", "3"], &["train.seed: saved 0, asked 3", "a run cannot change it"]);
    refuse(&["--steps", "1", "--set", "train.constant=0", "--override"], &["train.steps = 1", "2 steps"]);
    refused(&place.pretrain("out", &[]), &["found a run in it (--resume goes on with it)"]);
    let ran = succeeds(&split(resume(&["--steps", "3", "--override", "--json"])));
    let remarks = ran.objects().into_iter().find_map(|o| o.get("resumed").cloned()).unwrap();
    assert_eq!(remarks["step"], 2);
    let told = remarks["remarks"].as_array().unwrap();
    assert!(told.iter().any(|r| r == "train.steps: 2 -> 3"), "{told:?}");
    // The change is saved: the run goes on without a word about it.
    succeeds(&split(resume(&[])));
    assert!(std::fs::read_to_string(place.path("out/run.toml")).unwrap().lines().any(|l| l == "steps = 3"));
}

/// Sends a signal to a run once it has made its first step; exit code and the lines of its stdout.
#[cfg(unix)]
fn signalled(args: &[String], signal: &str) -> (Option<i32>, Vec<serde_json::Value>) {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_hadal"));
    let mut child = child.args(args).arg("--json").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut objects = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let object: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
        if object["step"] == 1 {
            assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        }
        objects.push(object);
    }
    (child.wait().unwrap().code(), objects)
}

#[test]
#[cfg(unix)]
fn a_signal_saves_and_leaves() {
    let place = Place::new();
    for (signal, exit) in [("-INT", 130), ("-TERM", 143)] {
        let name = format!("run{signal}");
        // More steps than can be made before the signal arrives.
        let (code, objects) = signalled(&place.pretrain(&name, &["--steps", "100000"]), signal);
        assert_eq!(code, Some(exit), "{objects:?}");
        let stopped = &objects.last().unwrap()["stopped"];
        let step = stopped["step"].as_u64().unwrap();
        assert!((1..100_000).contains(&step));
        assert_eq!(stopped["checkpoint"], place.arg(&format!("{name}/step-{step:06}")).as_str());
        let resume = stopped["resume"].as_str().unwrap();
        assert_eq!(resume, format!("hadal pretrain --resume --out {}", place.arg(&name)));
        // What it says is what works; one more step, or none where the schedule has no room for its phases.
        let args = resume.split(' ').skip(1).map(String::from);
        let phases = [format!("--steps={}", step + 1), "--override".into(), "--set=train.warmup=0".into()];
        let args: Vec<String> = args.chain(phases).chain(["--set=train.constant=1".into()]).collect();
        succeeds(&args);
        assert_eq!(timeless(&place.path(&name)).len() as u64, step + 1);
    }
}

#[test]
fn an_empty_directory_is_begun_anew() {
    let place = Place::new();
    let args = place.pretrain("out", &["--resume", "--steps", "1"]);
    succeeds(&args);
    let ran = hadal(&args);
    assert_eq!(ran.code, Some(0), "a finished run is finished again: {ran:?}");
    assert_eq!(timeless(&place.path("out")).len(), 1);
}
