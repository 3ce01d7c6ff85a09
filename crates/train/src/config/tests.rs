//! Every key of a run: set, resolved, saved, read back, compared.

use super::saved::{self, Build, MAY_CHANGE};
use super::{RunFile, Settings};
use crate::pretrain::Run;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

const BUILD: Build = Build { version: "1.2.3", commit: "0123456789ab" };

fn resolve(sets: &[(&str, &str)]) -> Result<Run, String> {
    let mut file = RunFile::default();
    let set = |file: &mut RunFile, key: &str, value: &str| {
        file.set(key, value.parse().unwrap(), &format!("--set {key}={value}")).map_err(|e| e.to_string())
    };
    for (key, value) in sets {
        set(&mut file, key, value)?;
    }
    file.resolve("out".into(), BUILD).map_err(|e| e.to_string())
}

fn nano(sets: &[(&str, &str)]) -> Run {
    resolve(&[&[("model.preset", "\"nano\"")], sets].concat()).unwrap()
}

/// Writes the run's settings where a run keeps them.
fn save(dir: &Path, run: &Run) -> PathBuf {
    let path = dir.join(saved::RUN_FILE);
    std::fs::write(&path, saved::write(run)).unwrap();
    path
}

/// A value for every key of `[train]`, none of them the default. No `..`: a new key is missed by the compiler here.
fn other() -> Settings {
    Settings {
        steps: Some(500),
        batch: Some(16),
        micro_batch: Some(2),
        seq: Some(100),
        dtype: Some("fp32".into()),
        recompute: Some("all".into()),
        seed: Some(7),
        lr: Some(3e-3),
        min_lr: Some(1e-5),
        warmup: Some(3),
        constant: Some(5),
        beta1: Some(0.8),
        beta2: Some(0.99),
        eps: Some(1e-7),
        weight_decay: Some(0.01),
        clip: Some(f32::INFINITY),
        mtp_lambda: Some(0.1),
        balance_alpha: Some(0.001),
        bias_gamma: Some(0.01),
        ema_decay: Some(0.999),
        eval_every: Some(11),
        eval_tokens: Some(999),
        checkpoint_every: Some(13),
        keep_last: Some(5),
        keep_best: Some(false),
        save_beside: Some(false),
        save_initial: Some(true),
        record_batches: Some("/somewhere/batches".into()),
    }
}

fn keys() -> Table {
    Table::try_from(other()).unwrap()
}

fn train_of(run: &Run) -> Table {
    let table: Table = saved::write(run).parse().unwrap();
    table["train"].as_table().unwrap().clone()
}

#[test]
fn every_key_of_train_can_be_set_and_is_saved() {
    let default = train_of(&nano(&[]));
    for (key, value) in keys() {
        let run = nano(&[(&format!("train.{key}"), &value.to_string())]);
        let saved = train_of(&run);
        assert_eq!(saved[&key], value, "{key}");
        assert_ne!(default.get(&key), Some(&value), "{key}: the default shows nothing");
        // Only what is derived from steps, batch and lr moves with them.
        let moved: Vec<&String> = saved.iter().filter(|(k, v)| default.get(*k) != Some(v)).map(|(k, _)| k).collect();
        let expected: &[&str] = match key.as_str() {
            "steps" => &["checkpoint_every", "constant", "eval_every", "steps", "warmup"],
            "batch" => &["batch", "micro_batch"],
            "lr" => &["lr", "min_lr"],
            one => &[one],
        };
        assert_eq!(moved, expected, "{key}");
    }
}

#[test]
fn every_key_has_a_resolved_value_unless_there_is_none() {
    let saved = train_of(&nano(&[]));
    let missing: Vec<String> = keys().into_iter().map(|(k, _)| k).filter(|k| !saved.contains_key(k)).collect();
    assert_eq!(missing, ["record_batches"]);
}

#[test]
fn a_saved_run_reads_back_as_itself() {
    let all: Vec<(String, String)> =
        keys().iter().map(|(key, value)| (format!("train.{key}"), value.to_string())).collect();
    let all: Vec<(&str, &str)> = all.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let dense = [("model.first_k_dense_replace", "6"), ("model.num_nextn_predict_layers", "0")];
    let cases: [&[(&str, &str)]; 9] = [
        &[],
        &all,
        &dense,
        &[("model.first_k_dense_replace", "0")],
        &[("model.q_lora_rank", "\"none\""), ("model.mtp_hidden", "\"pre_norm\"")],
        &[("train.warmup", "100"), ("train.constant", "300")],
        &[("train.dtype", "\"fp32\""), ("train.eps", "3e-39"), ("train.lr", "0.1")],
        &[("data.paths", "[\"a b.txt\", \"/c\\\"d\"]"), ("data.tokenizer", "\"t\""), ("data.valid_fraction", "0.3")],
        &[("model.rope.yarn", "{ factor = 4.0, mscale_all_dim = 1.0 }")],
    ];
    let dir = tempfile::tempdir().unwrap();
    for sets in cases {
        let run = nano(sets);
        let path = save(dir.path(), &run);
        let again = RunFile::read(&path).unwrap().resolve("out".into(), BUILD).unwrap();
        assert_eq!(format!("{again:?}"), format!("{run:?}"), "{sets:?}");
        assert_eq!(saved::write(&again), saved::write(&run));
        assert_eq!(saved::check(&path, &run).unwrap(), Vec::<String>::new());
    }
    for preset in hadal_model::PRESETS {
        let run = resolve(&[("model.preset", &format!("{preset:?}"))]).unwrap();
        let again = RunFile::read(&save(dir.path(), &run)).unwrap().resolve("out".into(), BUILD).unwrap();
        assert_eq!(format!("{again:?}"), format!("{run:?}"), "{preset}");
    }
}

#[test]
fn numbers_are_saved_as_they_are_written() {
    let text = saved::write(&nano(&[("train.beta1", "0.8"), ("train.ema_decay", "0.999")]));
    for line in ["version = \"1.2.3\"", "commit = \"0123456789ab\"", "beta1 = 0.8", "beta2 = 0.95", "ema_decay = 0.999"]
    {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[test]
fn paths_are_relative_to_the_file_or_to_the_current_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my.toml");
    let text = "[model]\npreset = \"nano\"\n[data]\npaths = [\"a\", \"/b\"]\ntokenizer = \"t\"\n[train]\nrecord_batches = \"r\"\n";
    std::fs::write(&path, text).unwrap();
    let read = || RunFile::read(&path).unwrap();
    let run = read().resolve("out".into(), BUILD).unwrap();
    let below = |name: &str| std::path::absolute(dir.path().join(name)).unwrap();
    assert_eq!(run.data.paths, Some(vec![below("a"), "/b".into()]));
    assert_eq!((run.data.tokenizer, run.config.record_batches), (Some(below("t")), Some(below("r"))));
    let mut file = read();
    file.set("data.tokenizer", "here".into(), "--tokenizer").unwrap();
    let run = file.resolve("out".into(), BUILD).unwrap();
    assert_eq!(run.data.tokenizer, Some(std::env::current_dir().unwrap().join("here")));
    assert_eq!(run.data.paths, Some(vec![below("a"), "/b".into()]), "the file's stay");
}

#[test]
fn wrong_keys_are_blamed_on_whoever_set_them() {
    let set =
        |key: &str, value: &str| resolve(&[("model.preset", "\"nano\""), (key, value)]).expect_err("must be refused");
    for (key, value, expected) in [
        ("train.colour", "3", "--set train.colour=3: unknown field `colour`, expected one of `steps`"),
        ("colour.train", "3", "--set colour.train=3: unknown field `colour`, expected one of "),
        ("data.colour", "3", "--set data.colour=3: unknown field `colour`"),
        ("model.colour", "3", "--set model.colour=3: [model]: unknown key colour: expected one of "),
        ("model.rope.colour", "3", "--set model.rope.colour=3: [model]: unknown key rope.colour: "),
        ("train.steps", "\"many\"", "--set train.steps=\"many\": invalid type: string \"many\", expected u64"),
        ("train.steps", "-1", "--set train.steps=-1: invalid value: integer `-1`, expected u64"),
        ("train.keep_best", "1", "--set train.keep_best=1: invalid type: integer `1`, expected a boolean"),
        ("train.steps.more", "1", "--set train.steps.more=1: invalid type: map, expected u64"),
        ("model.hidden_size", "0", "--set model.hidden_size=0: [model]: hidden_size: expected 1 to "),
        ("model.hidden_size.x", "1", "--set model.hidden_size.x=1: [model]: hidden_size: expected an integer"),
        (
            "model.eos_token_ids",
            "[1]",
            "--set model.eos_token_ids=[1]: [model]: eos_token_ids has no effect: the token",
        ),
        ("train.ema_decay", "1", "--set train.ema_decay=1: train.ema_decay = 1: expected a number in [0, 1)"),
        ("train.keep_last", "0", "--set train.keep_last=0: train.keep_last = 0: expected at least 1"),
        ("train.dtype", "\"fp8\"", "--set train.dtype=\"fp8\": train.dtype \"fp8\": expected bf16 or fp32"),
        (
            "train.recompute",
            "\"some\"",
            "--set train.recompute=\"some\": train.recompute \"some\": expected none, paper or all",
        ),
        ("data.tokenizer", "\"\"", "--set data.tokenizer=\"\": path : expected one, found an empty string"),
        ("train", "{}", "--set train={}: expected a key of a run file, as train.steps, found \"train\""),
        ("train..steps", "1", "--set train..steps=1: expected a key of a run file"),
        ("hadal.version", "\"9\"", "--set hadal.version=\"9\": missing field `commit`"),
    ] {
        let error = set(key, value);
        assert!(error.starts_with(expected), "{error}\n{expected}");
    }
    let twice = resolve(&[("train.steps", "3"), ("train.steps", "4")]).unwrap_err();
    assert_eq!(twice, "--set train.steps=4 and --set train.steps=3: expected train.steps to be set once");
    let inside = resolve(&[("model.rope.yarn.factor", "3"), ("model.rope", "{}")]).unwrap_err();
    assert!(inside.ends_with("expected model.rope.yarn.factor and model.rope to be set once"), "{inside}");
    assert_eq!(resolve(&[]).unwrap_err(), "expected a [model] table, found none");
}

/// An item of a list in the file can be reached by its number.
#[test]
fn items_of_lists_are_set_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my.toml");
    let text = "[model]\npreset = \"nano\"\n[[data.sources]]\npaths = [\"a\", \"b\"]\nweight = 1\n\
                [[data.sources]]\nbuiltin = true\nweight = 1\n";
    std::fs::write(&path, text).unwrap();
    let set = |sets: &[(&str, &str)]| {
        let mut file = RunFile::read(&path).unwrap();
        sets.iter().try_for_each(|(key, value)| file.set(key, value.parse().unwrap(), &format!("--set {key}")))?;
        file.resolve("out".into(), BUILD)
    };
    let sets = [("data.sources.0.weight", "2"), ("data.sources.1.weight", "3.5"), ("data.sources.0.paths.1", "\"/c\"")];
    let sources = set(&sets).unwrap().data.sources.unwrap();
    assert_eq!(sources.iter().map(|s| s.weight).collect::<Vec<_>>(), [Some(2.0), Some(3.5)]);
    let below = std::path::absolute(dir.path().join("a")).unwrap();
    assert_eq!(sources[0].paths, Some(vec![below, "/c".into()]));
    let refused = |sets: &[(&str, &str)]| set(sets).unwrap_err().to_string();
    for (key, value, expected) in [
        (
            "data.sources.2.weight",
            "2",
            "--set data.sources.2.weight: data.sources: expected a list with an item 2, found 2 items, numbered from 0",
        ),
        (
            "data.sources.0.paths.7",
            "\"c\"",
            "--set data.sources.0.paths.7: data.sources.0.paths: expected a list with an",
        ),
        ("data.ignore.0", "\"c\"", "--set data.ignore.0: data.ignore: expected a list with an item 0, found none"),
        ("data.sources.00.weight", "2", "--set data.sources.00.weight: invalid type: map, expected a sequence"),
        ("data.sources.first.weight", "2", "--set data.sources.first.weight: invalid type: map, expected a sequence"),
        ("data.sources.0.colour", "2", "--set data.sources.0.colour: unknown field `colour`"),
        ("data.sources.0.weight", "\"x\"", "--set data.sources.0.weight: invalid type: string \"x\", expected f64"),
        ("train.steps.0", "2", "--set train.steps.0: invalid type: sequence, expected u64"),
    ] {
        let error = refused(&[(key, value)]);
        assert!(error.starts_with(expected), "{error}\n{expected}");
    }
    let twice = refused(&[("data.sources.0.weight", "2"), ("data.sources", "[]")]);
    assert!(twice.ends_with("expected data.sources.0.weight and data.sources to be set once"), "{twice}");
}

#[test]
fn what_may_change_is_known_of_every_key() {
    let fixed = ["seq", "dtype", "seed", "beta1", "beta2", "save_initial", "record_batches"];
    let mut known: Vec<&str> = MAY_CHANGE.iter().chain(&fixed).copied().collect();
    known.sort_unstable();
    let mut all: Vec<String> = keys().into_iter().map(|(key, _)| key).collect();
    all.sort_unstable();
    assert_eq!(known, all);
}

/// What asking `sets` of a saved run says, without and with --override.
fn ask(begun: &[(&str, &str)], sets: &[(&str, &str)]) -> [Result<Vec<String>, String>; 2] {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &nano(begun));
    let prefix = format!("{}: ", path.display());
    [false, true].map(|override_saved| {
        let asked = Run { override_saved, ..nano(sets) };
        saved::check(&path, &asked).map_err(|e| e.to_string().strip_prefix(&prefix).unwrap().to_string())
    })
}

#[test]
fn every_difference_is_named() {
    let begun = [("train.lr", "0.002"), ("train.min_lr", "0.0001")];
    let [plain, over] = ask(&begun, &[("train.lr", "0.001"), ("train.min_lr", "0.0001")]);
    assert_eq!(
        plain.unwrap_err(),
        "the run has 1 other setting: train.lr: saved 0.002, asked 0.001 (--override allows it)"
    );
    assert_eq!(over.unwrap(), ["train.lr: 0.002 -> 0.001"]);
    let [plain, over] = ask(&[], &[("model.hidden_size", "128"), ("train.keep_last", "1"), ("train.seed", "4")]);
    assert_eq!(
        plain.unwrap_err(),
        "the run has 3 other settings: model.hidden_size: saved 256, asked 128; train.keep_last: saved 3, asked 1; \
         train.seed: saved 0, asked 4 (--override allows all but model.hidden_size, train.seed)"
    );
    assert_eq!(
        over.unwrap_err(),
        "not within a run, even with --override: model.hidden_size: saved 256, asked 128; train.seed: saved 0, asked 4"
    );
    let [plain, _] = ask(&[], &[("data.paths", "[\"/a\"]")]);
    assert_eq!(
        plain.unwrap_err(),
        "the run has 1 other setting: data.paths: saved none, asked [\"/a\"] (a run cannot change it; take another --out)"
    );
}

#[test]
fn some_changes_depend_on_the_run() {
    let ema = |x| [("train.ema_decay", x)];
    assert!(ask(&ema("0.99"), &ema("0.999"))[1].is_ok());
    assert!(ask(&ema("0.99"), &ema("0"))[1].is_err());
    assert!(ask(&ema("0"), &ema("0.99"))[1].is_err());
    let recorded = [("train.record_batches", "\"/r\"")];
    assert!(ask(&recorded, &[])[1].is_ok());
    assert!(ask(&[], &recorded)[1].is_err());
    assert_eq!(ask(&[], &[("data.valid_fraction", "0.05")])[0], Ok(vec![]), "the default, said aloud");
}

#[test]
fn another_build_is_told_and_a_file_of_no_run_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &nano(&[]));
    let newer = Run { build: Build { version: "1.3.0", commit: "unknown" }, ..nano(&[]) };
    let told = saved::check(&path, &newer).unwrap();
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("1.2.3 (0123456789ab)") && told[0].contains("1.3.0 (unknown)"), "{told:?}");
    std::fs::write(&path, "[model]\npreset = \"nano\"\n").unwrap();
    assert!(saved::check(&path, &newer).unwrap_err().to_string().contains("with a table [hadal]; found"));
    let later = saved::write(&newer).replace("[train]\n", "[train]\nnew_key = 3\n");
    std::fs::write(&path, later).unwrap();
    let told = saved::check(&path, &nano(&[])).unwrap_err().to_string();
    assert!(told.contains("unknown field `new_key`") && told.contains("written by hadal 1.3.0"), "{told}");
}

/// A phase that a changed key takes away takes its key along, since nobody asked for it.
#[test]
fn a_saved_floor_goes_with_the_phase_that_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), &nano(&[]));
    let steps = |n: i64| {
        let mut file = RunFile::read(&path).unwrap();
        file.set("train.steps", Value::from(n), "--steps").unwrap();
        file
    };
    let run = steps(650).resolve("out".into(), BUILD).unwrap();
    assert!(!train_of(&run).contains_key("min_lr"));
    assert!(train_of(&steps(651).resolve("out".into(), BUILD).unwrap()).contains_key("min_lr"));
    let mut file = steps(650);
    file.set("train.min_lr", Value::from(1e-4), "--set train.min_lr=1e-4").unwrap();
    let error = file.resolve("out".into(), BUILD).unwrap_err().to_string();
    assert!(error.starts_with("--set train.min_lr=1e-4: train.min_lr has no effect"), "{error}");
}
