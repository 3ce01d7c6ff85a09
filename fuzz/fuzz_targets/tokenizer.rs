#![no_main]
//! Any bytes as `tokenizer.json`, and behind a zero byte as `tokenizer_config.json`: loaded, and if that succeeds, used
//! on a fixed text and written again.

use hadal_data::Tokenizer;
use hadal_fuzz::{Dice, json, one_line, put, words};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("TMPDIR can be written"));
static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| words(include_str!("../dict/tokenizer.dict")));

/// Words, digits, Chinese, an accent as a character of its own, white space, special tokens spelled out.
const TEXT: &str = "The ring sings: 1234567 + 8. 今天天气很好，\u{1f600} e\u{301}te\u{301}\r\n\n\t  <think>a  </think>\
                    <｜end▁of▁sentence｜> don't aaaaaaaa   b\u{0}\u{feff}";

fuzz_target!(|data: &[u8]| {
    let (file, config) = parts(data);
    write("tokenizer.json", file);
    match config {
        Some(config) => write("tokenizer_config.json", config),
        None => drop(std::fs::remove_file(DIR.path().join("tokenizer_config.json"))),
    }
    // The tokenizers crate caches words by thread and tokenizer for as long as the thread lives.
    std::thread::scope(|s| s.spawn(|| exercise(DIR.path())).join()).expect("a panic has ended the process");
});

fn write(name: &str, bytes: &[u8]) {
    std::fs::write(DIR.path().join(name), bytes).expect("TMPDIR can be written");
}

fn parts(data: &[u8]) -> (&[u8], Option<&[u8]>) {
    match data.iter().position(|&b| b == 0) {
        Some(at) => (&data[..at], Some(&data[at + 1..])),
        None => (data, None),
    }
}

fn exercise(dir: &Path) {
    let tokenizer = match Tokenizer::load(dir) {
        Ok(tokenizer) => tokenizer,
        Err(e) => return one_line(&e),
    };
    let ids = tokenizer.encode(TEXT);
    let lengths = tokenizer.token_byte_lengths();
    assert_eq!(lengths.len(), tokenizer.vocab_size());
    assert!(ids.iter().all(|&id| (id as usize) < lengths.len()), "ids are in the vocabulary");
    let special = [tokenizer.bos(), tokenizer.eos(), tokenizer.pad()];
    assert!(special.iter().flatten().all(|&id| (id as usize) < lengths.len()), "so are the special ones");
    let _ = tokenizer.decode(&ids, true);
    let _ = tokenizer.decode(&(0..lengths.len().min(400) as u32).rev().collect::<Vec<_>>(), false);
    for (name, bytes) in tokenizer.files() {
        std::fs::write(dir.join(name), bytes).expect("TMPDIR can be written");
    }
    let again = Tokenizer::load(dir).unwrap_or_else(|e| panic!("what was written does not load: {e}"));
    assert_eq!(again.encode(TEXT), ids, "what was written encodes the same");
    assert_eq!([again.bos(), again.eos(), again.pad()], special);
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut dice = Dice::new(seed);
    let (file, config) = parts(&data[..size]);
    let new = match (dice.below(8), config) {
        (0, _) => None,
        (1, Some(c)) => json::mutate_text(c, &mut dice, &WORDS).map(|c| [file, b"\0", &c].concat()),
        (_, Some(c)) => json::mutate_text(file, &mut dice, &WORDS).map(|f| [&f, &b"\0"[..], c].concat()),
        (_, None) => json::mutate_text(file, &mut dice, &WORDS),
    };
    new.and_then(|new| put(&new, data, max_size)).unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
});
