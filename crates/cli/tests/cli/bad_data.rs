//! Text and tokenizers that cannot be trained on.

use crate::support::{Place, refused, succeeds, text, trained};

/// A run on these files must be refused and leave nothing.
fn data_refused(place: &Place, files: &[&str], more: &[&str], parts: &[&str]) {
    let (config, out) = (place.arg("run.toml"), place.arg("out"));
    let mut args: Vec<String> = ["pretrain", "--config", &config, "--out", &out, "--data"].map(String::from).into();
    args.extend(files.iter().map(|f| place.arg(f)));
    args.extend(more.iter().map(|s| s.to_string()));
    refused(&args, parts);
    assert!(!place.path("out").exists(), "something was left: {parts:?}");
}

#[test]
fn files_that_are_no_text() {
    let place = Place::new();
    place.write("empty.txt", "");
    place.write("white.txt", " \n\n");
    place.write("latin.txt", [text().as_bytes(), b"caf\xe9\n"].concat());
    let offset = format!("0xe9 at byte offset {}", text().len() + 3);
    data_refused(&place, &["none.txt"], &[], &["none.txt", "cannot be read", "No such file"]);
    data_refused(&place, &["empty.txt"], &[], &["empty.txt", "expected text", "found 0 bytes"]);
    data_refused(&place, &["text.txt", "white.txt"], &[], &["white.txt", "expected text", "found 3 bytes"]);
    data_refused(&place, &["latin.txt"], &[], &["latin.txt", "expected UTF-8", &offset]);
    std::fs::create_dir(place.path("folder")).unwrap();
    data_refused(&place, &["folder"], &[], &["folder", "expected files with text, found none"]);
    place.write("folder/picture", b"\x89PNG\0");
    data_refused(&place, &["folder"], &[], &["folder", "found none: 1 binary files left out"]);
    data_refused(&place, &["folder/picture"], &[], &["folder/picture", "expected text, found a NUL byte"]);
    data_refused(&place, &["text.txt", "*.rst"], &[], &["*.rst", "expected a glob that matches a file, found none"]);
    place.write("run.toml", format!("{}[data]\npaths = []\n", crate::support::MODEL));
    refused(
        &["pretrain", "--config", &place.arg("run.toml"), "--out", &place.arg("out")],
        &["data.paths = []", "at least one text file"],
    );
    assert!(!place.path("out").exists());
}

#[test]
fn too_little_text() {
    let place = Place::new();
    let tokenizer = trained().join("latest");
    let tokenizer = ["--tokenizer", tokenizer.to_str().unwrap()];
    place.write("a.txt", "The river.");
    place.write("b.txt", "The lamp.");
    data_refused(&place, &["a.txt"], &[], &["a.txt", "too short", "at least 2 documents", "found 1"]);
    let parts = ["a.txt and 1 more", "shorter than one sequence", "at least 33 tokens, found "];
    data_refused(&place, &["a.txt", "b.txt"], &[], &parts);
    data_refused(&place, &["a.txt", "b.txt"], &tokenizer, &parts);
}

/// A text with few repeated pieces trains as many ids as it supports, and the run says so.
#[test]
fn a_small_text_is_enough_for_a_run() {
    let place = Place::new();
    place.write("text.txt", "The river carries the lamp.");
    place.write("more.txt", "A garden answers the cloud, and the song follows the river.");
    let mut args = place.pretrain("out", &["--steps", "1", "--seq", "16", "--json"]);
    let at = args.iter().position(|a| a == "--out").unwrap();
    args.insert(at, place.arg("more.txt"));
    let objects = succeeds(&args).objects();
    let phases: Vec<&str> = objects.iter().filter_map(|o| o["phase"].as_str()).collect();
    let told = phases.iter().any(|p| p.starts_with("the text supports 2") && p.contains(" of 320 token ids"));
    assert!(told, "{phases:?}");
}

#[test]
fn tokenizers_that_do_not_fit() {
    let place = Place::new();
    let model = trained().join("latest").to_str().unwrap().to_string();
    let small =
        std::fs::read_to_string(place.path("run.toml")).unwrap().replace("vocab_size = 320", "vocab_size = 300");
    place.write("run.toml", small);
    place.pretrain_refused(&["--tokenizer", &model], &[&model, "at most vocab_size = 300 ids, found 320"]);

    let place = Place::new();
    let (none, broken) = (place.arg("none"), place.arg("broken.json"));
    place.pretrain_refused(&["--tokenizer", &none], &[&none, "cannot be read", "No such file"]);
    place.write("broken.json", "{\n\"version\": 3");
    place.pretrain_refused(&["--tokenizer", &broken], &[&broken, "not a usable tokenizer"]);
    // Without tokenizer_config.json nobody knows how a document ends.
    std::fs::copy(trained().join("latest/tokenizer.json"), place.path("tokenizer.json")).unwrap();
    let nameless = place.arg("tokenizer.json");
    place.pretrain_refused(&["--tokenizer", &nameless], &[&nameless, "expected eos_token in tokenizer_config.json"]);
    place.write("tokenizer_config.json", "{\"eos_token\": \"<none>\"}");
    let parts = ["tokenizer_config.json", "eos_token", "found \"<none>\""];
    place.pretrain_refused(&["--tokenizer", &nameless], &parts);
}
