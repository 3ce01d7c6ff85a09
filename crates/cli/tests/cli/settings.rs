//! Keys of a run file on the command line, and what the binary says of itself and of arguments.

use crate::support::{MODEL, Place, TRAIN, hadal, metrics, refused, succeeds, trained};

#[test]
fn any_key_can_be_set_and_the_resolved_run_is_saved() {
    let place = Place::new();
    let more = ["--set", "train.steps=2", "--set", "train.dtype=fp32", "--set", "model.num_hidden_layers=3"];
    let more =
        [&more[..], &["--set", "data.valid_fraction=0.1", "--set", " train.beta1 = 0.8 ", "--lr", "1e-3"]].concat();
    succeeds(&place.pretrain("out", &more));
    assert_eq!(metrics(&place.path("out")).len(), 2);
    let config = std::fs::read_to_string(place.path("out/latest/config.json")).unwrap();
    assert!(config.contains("\"num_hidden_layers\": 3"), "{config}");
    let saved = std::fs::read_to_string(place.path("out/run.toml")).unwrap();
    let paths = format!("paths = [{:?}]", place.arg("text.txt"));
    let version = format!("version = {:?}", env!("CARGO_PKG_VERSION"));
    for line in
        [&paths, &version, "dtype = \"fp32\"", "valid_fraction = 0.1", "beta1 = 0.8", "lr = 0.001", "min_lr = 0.0001"]
    {
        assert!(saved.lines().any(|l| l == line), "{line} is not in\n{saved}");
    }
}

/// The saved file begins another run with the same numbers.
#[test]
fn a_saved_run_file_makes_the_same_run() {
    let place = Place::new();
    let saved = trained().join("run.toml");
    succeeds(&[
        "pretrain",
        "--config",
        saved.to_str().unwrap(),
        "--out",
        &place.arg("out"),
        "--data",
        &place.arg("text.txt"),
    ]);
    let read = |path: &std::path::Path| std::fs::read(path.join("step-000003/model.safetensors")).unwrap();
    assert!(read(&place.path("out")) == read(trained()));
    let text = |path: &std::path::Path| std::fs::read_to_string(path.join("run.toml")).unwrap();
    let without_paths =
        |text: String| text.lines().filter(|l| !l.starts_with("paths = ")).collect::<Vec<_>>().join("\n");
    assert_eq!(without_paths(text(&place.path("out"))), without_paths(text(trained())));
}

#[test]
fn keys_of_a_preset_can_be_set() {
    let place = Place::new();
    let preset = |sets: &[&str], parts: &[&str]| {
        let out = place.arg("out");
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["pretrain", "--preset", "nano", "--out", &out].into_iter().chain(sets).collect();
        refused(&args, parts);
        assert!(!place.path("out").exists());
    };
    preset(&["model.num_hidden_layers=0"], &["--set model.num_hidden_layers=0: [model]: num_hidden_layers", "found 0"]);
    preset(&["model.preset=mini"], &["--set model.preset=mini and --preset: expected model.preset to be set once"]);
    preset(&["model.max_position_embeddings=64", "train.seq=65"], &["--set train.seq=65: train.seq = 65"]);
}

#[test]
fn what_cannot_be_set_is_refused() {
    let place = Place::new();
    for (set, parts) in [
        ("train.colour=3", &["--set train.colour=3: unknown field `colour`", "`steps`"][..]),
        ("colour=3", &["--set colour=3: expected a key of a run file, as train.steps"]),
        ("train.steps", &["--set train.steps: expected KEY=VALUE"]),
        ("train.steps=", &["--set train.steps=: expected KEY=VALUE"]),
        ("=3", &["--set =3: expected KEY=VALUE"]),
        ("train.steps=many", &["--set train.steps=many: ", "string \"many\"", "expected u64"]),
        ("data.paths=[\"a\"", &["--set data.paths=[\"a\": expected a TOML value: "]),
        ("train.clip=0", &["--set train.clip=0: train.clip = 0", "> 0"]),
        ("train.mtp_lambda=nan", &["train.mtp_lambda = NaN"]),
        ("data.valid_fraction=2", &["data.valid_fraction = 2", "above 0 and below 1"]),
    ] {
        place.pretrain_refused(&["--set", set], parts);
    }
    let parts = ["--set train.steps=3 and --steps: expected train.steps to be set once"];
    place.pretrain_refused(&["--steps", "2", "--set", "train.steps=3"], &parts);
    place.pretrain_refused(&["--seed", "2", "--set", "train.seed=3"], &["train.seed to be set once"]);
    place.pretrain_refused(&["--set", "train.eps=1e-7", "--set", "train.eps=1e-7"], &["train.eps to be set once"]);
}

/// Where the command runs does not matter to what a file names.
#[test]
fn paths_in_a_file_are_relative_to_it() {
    let place = Place::new();
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    place.write("run.toml", format!("{MODEL}[data]\npaths = [\"text.txt\"]\n{TRAIN}"));
    succeeds(&["pretrain", "--config", &place.arg("run.toml"), "--out", &place.arg("out"), "--steps", "1"]);
    place.write("elsewhere/run.toml", format!("{MODEL}[data]\npaths = [\"text.txt\"]\n{TRAIN}"));
    let args = ["pretrain", "--config", &place.arg("elsewhere/run.toml"), "--out", &place.arg("other")];
    refused(&args, &[&place.arg("elsewhere/text.txt"), "cannot be read"]);
}

#[test]
fn wrong_arguments_are_one_line() {
    for (args, part) in [
        (
            &["pretrain", "--preset", "nano", "--ouy", "x"][..],
            "unexpected argument '--ouy' found; a similar argument exists",
        ),
        (&["pretrain", "--preset", "nano"], "required arguments were not provided: --out <DIR>"),
        (&["pretrain", "--preset", "nano", "--out", "x", "--override"], "not provided: --resume"),
        (&["pretrain", "--preset", "nano", "--config", "x", "--out", "x"], "cannot be used with"),
        (&["insp"], "unrecognized subcommand 'insp'; a similar subcommand exists: 'inspect'"),
    ] {
        let ran = hadal(args);
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(2), 1), "{ran:?}");
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(part), "{ran:?}");
        assert!(ran.stdout.is_empty());
    }
}

#[test]
fn options_without_effect_are_refused() {
    let model = trained().to_str().unwrap();
    refused(&["bench", "gemm", "--list", "--threads", "2"], &["--threads has no effect on hadal bench gemm"]);
    refused(&["inspect", "nano", "--seed", "2"], &["--seed has no effect on hadal inspect"]);
    refused(
        &["logits", model, "--tokens", "1", "--out", "x", "--seed", "2"],
        &["--seed has no effect on hadal logits"],
    );
}

#[test]
fn the_version_names_the_commit() {
    let version = succeeds(&["--version"]).stdout;
    let commit = version.trim_end().strip_prefix(concat!("hadal ", env!("CARGO_PKG_VERSION"), " (")).unwrap();
    let commit = commit.strip_suffix(')').unwrap();
    let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
    let is_hash = hash.len() >= 12 && hash.chars().all(|c| c.is_ascii_hexdigit());
    assert!(is_hash || commit == "unknown", "{version}");
}

#[test]
fn a_model_is_needed() {
    let place = Place::new();
    let out = place.arg("out");
    refused(&["pretrain", "--out", &out], &["expected a model to train", "--preset <P> or --config <F>", "--resume"]);
    let parts = ["expected a run to go on with (run.toml), found none", "--preset <P> or --config <F>"];
    refused(&["pretrain", "--out", &out, "--resume"], &[&parts[..], &[&out]].concat());
    assert!(!place.path("out").exists());
}
