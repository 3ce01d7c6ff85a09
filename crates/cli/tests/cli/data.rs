//! Sources, their shards, and the verb that makes tokenizers.

use crate::support::{MODEL, Place, Ran, TRAIN, hadal, metrics, refused, succeeds, text, timeless, trained};
use std::path::PathBuf;

impl Place {
    /// Arguments of a run into `out` with this `[data]`.
    fn run(&self, data: &str, out: &str, more: &[&str]) -> Vec<String> {
        self.write("run.toml", format!("{MODEL}{data}\n{TRAIN}"));
        let fixed = ["pretrain", "--config", &self.arg("run.toml"), "--out", &self.arg(out)].map(String::from);
        fixed.into_iter().chain(more.iter().map(|s| s.to_string())).collect()
    }

    /// A run with this `[data]` must be refused and leave nothing.
    fn data_refused(&self, data: &str, parts: &[&str]) {
        refused(&self.run(data, "out", &[]), parts);
        assert!(!self.path("out").exists(), "something was left: {parts:?}");
    }

    /// The directory of a source's shards.
    fn shards(&self, root: &str, name: &str) -> PathBuf {
        let mut found = std::fs::read_dir(self.path(root)).unwrap().map(|e| e.unwrap().path());
        let own = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}-"));
        found.find(own).unwrap_or_else(|| panic!("no shards of {name} in {root}"))
    }

    /// 200 JSON lines with `field`.
    fn lines(&self, name: &str, field: &str) {
        let line = |i: usize| format!("{{\"{field}\": \"Letter {i} follows the garden {}.\"}}\n", i * i);
        self.write(name, (0..200).map(line).collect::<String>());
    }
}

const SOURCES: &str = "
[[data.sources]]
paths = [\"books\"]
ignore = [\"*.md\"]
weight = 3
[[data.sources]]
name = \"letters\"
paths = [\"*.jsonl\"]
field = \"body\"
weight = 1
";

fn with_sources() -> Place {
    let place = Place::new();
    std::fs::create_dir(place.path("books")).unwrap();
    place.write("books/a.txt", text());
    place.write("books/b.md", "not read");
    place.lines("letters.jsonl", "body");
    place
}

#[test]
fn several_sources_are_mixed_and_a_run_goes_on_with_their_tokens() {
    let place = with_sources();
    let more = ["--checkpoint-every", "1", "--steps", "2"];
    succeeds(&place.run(SOURCES, "whole", &["--threads", "1"]));
    succeeds(&place.run(SOURCES, "out", &["--threads", "2"]));
    assert_eq!(timeless(&place.path("whole")), timeless(&place.path("out")));
    for name in ["books", "letters"] {
        assert!(place.shards("out/data", name).join("manifest.json").exists());
    }
    // The text is gone when the run goes on: its tokens are what they were.
    succeeds(&place.run(SOURCES, "part", &more));
    std::fs::remove_dir_all(place.path("books")).unwrap();
    let resume = ["--resume", "--override", "--steps", "3"];
    let objects = succeeds(&place.run(SOURCES, "part", &[&resume[..], &["--json"]].concat())).objects();
    assert!(objects.iter().any(|o| o["phase"] == "opening the tokens of this run"), "{objects:?}");
    assert_eq!(metrics(&place.path("part")).len(), 3);
}

#[test]
fn damaged_shards_are_refused_when_a_run_goes_on() {
    let place = with_sources();
    succeeds(&place.run(SOURCES, "out", &["--checkpoint-every", "1", "--steps", "2"]));
    let resume = place.run(SOURCES, "out", &["--checkpoint-every", "1", "--steps", "2", "--resume"]);
    let books = place.shards("out/data", "books");
    let shard = books.join("train-00000.tokens");
    let clean = std::fs::read(&shard).unwrap();
    let damaged = |f: &dyn Fn(&mut Vec<u8>), parts: &[&str]| {
        let mut bytes = clean.clone();
        f(&mut bytes);
        std::fs::write(&shard, bytes).unwrap();
        refused(&resume, &[parts, &["train-00000.tokens", "expected ", "found "]].concat());
    };
    damaged(&|bytes| bytes[100] ^= 1, &["block 0 of 1: expected checksum "]);
    damaged(&|bytes| bytes[33] ^= 1, &["header: expected checksum "]);
    damaged(&|bytes| bytes.truncate(1000), &[" bytes for ", "found 1000"]);
    damaged(&|bytes| bytes.clear(), &["expected a header"]);
    std::fs::write(&shard, clean).unwrap();
    // Without what is written last the tokens are none, and are made again of the same text.
    std::fs::remove_file(books.join("manifest.json")).unwrap();
    succeeds(&resume);
    assert!(books.join("manifest.json").exists());
    // Shards of another source in its place.
    let letters = place.shards("out/data", "letters");
    std::fs::rename(&books, place.path("aside")).unwrap();
    std::fs::rename(&letters, &books).unwrap();
    refused(&resume, &["manifest.json", "expected tokens of source ", "found those of source "]);
}

#[test]
fn shards_are_shared_through_a_cache_and_belong_to_a_tokenizer() {
    let place = Place::new();
    let data = "[data]\npaths = [\"text.txt\"]\ncache = \"cache\"\n";
    let phases = |ran: Ran| -> Vec<String> {
        ran.objects().iter().filter_map(|o| Some(o["phase"].as_str()?.to_owned())).collect()
    };
    let told = |phases: &[String], what: &str| phases.iter().any(|p| p == what);
    assert!(told(&phases(succeeds(&place.run(data, "first", &["--json"]))), "tokenising text"));
    assert!(told(&phases(succeeds(&place.run(data, "second", &["--json"]))), "text is tokenised already"));
    assert_eq!(timeless(&place.path("first")), timeless(&place.path("second")));
    // Other text is tokenised anew; the old shards stay for the runs that use them.
    place.write("text.txt", text() + "More text.");
    assert!(told(&phases(succeeds(&place.run(data, "third", &["--json"]))), "tokenising text"));
    assert_eq!(std::fs::read_dir(place.path("cache")).unwrap().count(), 3, "two sets of shards and the lock");
    // The tokens of one run's tokenizer in the place of another's.
    place.write("text.txt", text());
    let other = place.arg("other");
    succeeds(&["tokenizer", "train", "--data", &place.arg("text.txt"), "--vocab-size", "300", "--out", &other]);
    let args = place.run(data, "fourth", &["--tokenizer", &other]);
    succeeds(&args);
    let shards = |run: &str| {
        let kept = std::fs::read_to_string(place.path(run).join("data/prepared.json")).unwrap();
        let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
        PathBuf::from(kept["sources"][0]["directory"].as_str().unwrap())
    };
    let (own, its) = (shards("fourth"), shards("first"));
    assert_ne!(own, its);
    std::fs::rename(&own, place.path("aside")).unwrap();
    std::fs::rename(&its, &own).unwrap();
    let resume: Vec<String> = args.into_iter().chain(["--resume".into()]).collect();
    refused(&resume, &["manifest.json", "expected tokens of tokenizer ", "found those of tokenizer "]);
}

#[test]
fn sources_that_cannot_be_are_refused() {
    let place = with_sources();
    let with = |from: &str, to: &str| {
        assert!(SOURCES.contains(from), "{from}");
        SOURCES.replace(from, to)
    };
    for weight in ["0", "-1", "nan", "inf"] {
        let parts = ["data.sources[1].weight = ", "expected a finite number above 0"];
        place.data_refused(&with("weight = 1", &format!("weight = {weight}")), &parts);
    }
    let parts = ["source letters", "expected a weight that gives it one sample in 4096, found 0.00001"];
    place.data_refused(&with("weight = 1", "weight = 1e-5"), &parts);
    place.data_refused(&with("weight = 1", ""), &["source letters", "expected a weight", "found none"]);
    place.data_refused(&with("weight = 1", "colour = 1"), &["run.toml:", "unknown field `colour`"]);
    place.data_refused("[data]\ncolour = 1\n", &["run.toml:", "unknown field `colour`"]);
    place.data_refused(&with("field = \"body\"", ""), &["letters.jsonl:1: ", "field \"text\"", "found \"body\""]);
    place.data_refused(&with("*.jsonl", "*.rst"), &["*.rst", "expected a glob that matches a file, found none"]);
    place.data_refused(&with("name = \"letters\"", "name = \"a/b\""), &["data.sources[1].name = \"a/b\""]);
    place.data_refused(&with("field = \"body\"", "builtin = true"), &["data.sources[1]", "found both"]);
    place.data_refused("[[data.sources]]\nname = \"x\"\n", &["data.sources[0]", "found neither"]);
    place.data_refused(&format!("[data]\nfield = \"x\"\n{SOURCES}"), &["[[data.sources]]", "found it in [data]"]);
    place.data_refused("[data]\nfield = \"x\"\n", &["data.field has no effect", "built-in corpus"]);
    let text = |more: &str| format!("[data]\npaths = [\"text.txt\"]\n{more}\n");
    place.data_refused(&text("field = \"x\""), &["field has no effect", "JSON lines"]);
    place.data_refused(&text("ignore = [\"x\"]"), &["ignore has no effect", "folders and globs"]);
    place.data_refused(&text("format = \"csv\""), &["data.format = \"csv\"", "\"text\" or \"jsonl\""]);
    place.data_refused(&text("invalid_utf8 = \"hide\""), &["data.invalid_utf8 = \"hide\"", "\"replace\""]);
}

#[test]
fn invalid_utf8_follows_the_policy() {
    let place = Place::new();
    place.write("text.txt", [text().as_bytes(), b"\n\ncaf\xe9\n\n", text().as_bytes()].concat());
    let data = |policy: &str| format!("[data]\npaths = [\"text.txt\"]\ninvalid_utf8 = \"{policy}\"\n");
    place.data_refused(&data("error"), &["text.txt", "expected UTF-8 text", "0xe9"]);
    for (policy, told) in
        [("replace", "1 places with invalid UTF-8 replaced"), ("skip", "1 documents with invalid UTF-8 left out")]
    {
        let ran = succeeds(&place.run(&data(policy), policy, &["--steps", "1"]));
        assert!(ran.stdout.contains(told), "{}", ran.stdout);
    }
}

#[test]
fn tokenizers_are_trained_used_and_inspected() {
    let place = with_sources();
    let out = place.arg("made");
    let train = ["tokenizer", "train", "--data", &place.arg("books"), "--vocab-size", "300", "--out", &out];
    assert!(succeeds(&train).stdout.contains("300 token ids"));
    refused(&train, &["made", "expected a directory without a tokenizer, found one"]);

    let text = "The river 你好\n";
    place.write("some.txt", text);
    let ids = succeeds(&["tokenizer", "encode", &out, "--file", &place.arg("some.txt")]).stdout;
    assert_eq!(ids, succeeds(&["tokenizer", "encode", &out, text]).stdout);
    let decode: Vec<&str> = ["tokenizer", "decode", &out].into_iter().chain(ids.split_whitespace()).collect();
    assert_eq!(succeeds(&decode).stdout, text);
    let objects = succeeds(&["tokenizer", "encode", &out, text, "--json"]).objects();
    assert_eq!(objects[0]["ids"].as_array().unwrap().len(), ids.split_whitespace().count());

    let run = trained().to_str().unwrap();
    let report =
        succeeds(&["tokenizer", "inspect", run, "--data", &place.arg("text.txt"), &place.arg("books"), "--json"]);
    let report = &report.objects()[0];
    assert_eq!((&report["vocab_size"], report["special_tokens"].as_array().unwrap().len()), (&320.into(), 10));
    let measured = report["text"].as_array().unwrap();
    assert_eq!(measured.len(), 2);
    assert!(measured[0]["text"].as_str().unwrap().ends_with("text.txt"));
    assert!(measured.iter().all(|m| m["bytes_per_token"].as_f64().unwrap() > 1.0), "{measured:?}");
    let plain = hadal(&["tokenizer", "inspect", &out]).stdout;
    for kind in ["English", "Chinese", "code", "arithmetic"] {
        assert!(plain.contains(&format!("{kind} (built-in)")), "{plain}");
    }
}

#[test]
fn tokenizer_arguments_that_cannot_be_are_refused() {
    let place = Place::new();
    let run = trained().to_str().unwrap();
    let (out, data) = (place.arg("made"), place.arg("text.txt"));
    refused(&["tokenizer", "decode", run, "7", "320"], &["expected token ids from 0 to 319, found \"320\""]);
    refused(&["tokenizer", "decode", run, "x"], &["found \"x\""]);
    refused(&["tokenizer", "encode", &place.arg("none"), "x"], &["none", "cannot be read"]);
    refused(&["tokenizer", "encode", run, "--file", &place.arg("none")], &["none", "No such file"]);
    let train = |more: &[&'static str]| {
        let fixed = ["tokenizer", "train", "--data", &data, "--out", &out].map(String::from);
        fixed.into_iter().chain(more.iter().map(|s| s.to_string())).collect::<Vec<_>>()
    };
    refused(&train(&["--vocab-size", "100"]), &["vocab_size", "at least 266 ids", "found 100"]);
    refused(&train(&["--vocab-size", "300", "--field", "x"]), &["field has no effect"]);
    refused(&train(&["--vocab-size", "300", "--invalid-utf8", "x"]), &["--invalid-utf8 x", "error, replace or skip"]);
    assert!(!place.path("made").exists());
}
