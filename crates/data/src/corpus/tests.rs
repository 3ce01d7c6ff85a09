use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::DataError;
use crate::pack::Sides;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn files(&self, paths: &[&str]) -> Files {
        Files { paths: paths.iter().map(|p| self.path(p)).collect(), ..Files::default() }
    }
}

fn survey(files: Files) -> Result<Survey, DataError> {
    Survey::new(&Source::Files(files))
}

fn documents(files: Files) -> Vec<String> {
    let survey = survey(files).unwrap();
    let mut documents = Vec::new();
    let take = |i: u64, text: &str| {
        assert_eq!(i, documents.len() as u64);
        documents.push(text.to_owned());
        Ok(())
    };
    survey.each(take).unwrap();
    assert_eq!(survey.documents(), documents.len() as u64);
    assert_eq!(survey.text_bytes(), documents.iter().map(|d| d.len() as u64).sum::<u64>());
    documents
}

fn error(files: Files) -> String {
    survey(files).err().expect("must be refused").to_string()
}

#[test]
fn folders_are_read_in_the_order_of_names_without_what_is_ignored() {
    let place = Place::new();
    for name in ["a/2.txt", "a/1.txt", "a/b/3.txt", "a/b/skip.log", "a/z.txt", "a/.hidden/no.txt", "a/.no.txt"] {
        place.write(name, name);
    }
    place.write("a/c/draft.txt", "a/c/draft.txt");
    place.write("a/c/.hadalignore", "draft.*\n");
    place.write("a/.gitignore", "z.txt\n");
    place.write("a/blob", b"\x89PNG\r\n\x1a\n\x00\x00");
    place.write("a/empty.txt", " \n");
    let all = Files { ignore: vec!["*.log".into()], ..place.files(&["a"]) };
    assert_eq!(documents(all.clone()), ["a/1.txt", "a/2.txt", "a/b/3.txt"]);
    let skipped = survey(all.clone()).unwrap().skipped();
    assert_eq!(skipped, Skipped { binary: 1, empty: 1, ..Skipped::default() });
    assert_eq!(skipped.to_string(), "1 binary files left out, 1 files without text left out");
    let anchored = Files { ignore: vec!["/2.txt".into(), "b/".into()], ..place.files(&["a"]) };
    assert_eq!(documents(anchored), ["a/1.txt"]);
    // What is named is read, whatever rules say; what is found twice is read once.
    let twice = Files { ignore: all.ignore, ..place.files(&["a/z.txt", "a", "a/1.txt", "a/b/skip.log"]) };
    assert_eq!(documents(twice), ["a/z.txt", "a/1.txt", "a/2.txt", "a/b/3.txt", "a/b/skip.log"]);
}

#[test]
fn globs_match_as_in_gitignore() {
    let place = Place::new();
    for name in ["a/1.txt", "a/2.md", "a/b/3.txt", "a/b/c/4.txt", "a/odd[1].txt"] {
        place.write(name, name);
    }
    let found = |glob: &str| documents(place.files(&[glob]));
    assert_eq!(found("a/*.txt"), ["a/1.txt", "a/odd[1].txt"]);
    assert_eq!(found("a/**/*.txt"), ["a/1.txt", "a/b/3.txt", "a/b/c/4.txt", "a/odd[1].txt"]);
    assert_eq!(found("a/*/?.txt"), ["a/b/3.txt"]);
    assert_eq!(found("a/[12].{txt,md}"), ["a/1.txt", "a/2.md"]);
    assert_eq!(found("a/odd[1].txt"), ["a/odd[1].txt"]);
    assert!(error(place.files(&["a/*.rst"])).contains("a/*.rst: expected a glob that matches a file, found none"));
    assert!(error(place.files(&["a/{1,2.txt"])).contains("expected a glob as in .gitignore"));
    assert!(error(place.files(&["none/*.txt"])).contains("none: cannot be walked"));
}

#[test]
fn files_keep_their_order_and_do_not_mix() {
    let place = Place::new();
    let long = "word ".repeat(900) + "\n\n";
    place.write("a", long.repeat(3));
    place.write("b", b"\xef\xbb\xbf\nshort\n\nfile\n");
    let alone = documents(place.files(&["a"]));
    assert_eq!(alone.len(), 3);
    let both = documents(place.files(&["b", "a"]));
    assert_eq!(both[0], "short\n\nfile");
    assert_eq!(both[1..], alone);
}

#[test]
fn json_lines_are_documents() {
    let place = Place::new();
    let lines =
        "\u{feff}{\"text\": \"one\\ntwo\", \"n\": 1}\n\n{\"n\": {}, \"text\": \"  three  \"}\r\n{\"text\": \" \"}";
    place.write("a.jsonl", lines);
    place.write("b.NDJSON", "{\"text\": \"four\"}");
    assert_eq!(documents(place.files(&["a.jsonl", "b.NDJSON"])), ["one\ntwo", "  three  ", "four"]);
    place.write("c.txt", "{\"body\": \"five\"}\n");
    let body = Files { format: Some(Format::Jsonl), field: Some("body".into()), ..place.files(&["c.txt"]) };
    assert_eq!(documents(body), ["five"]);
    let text = Files { format: Some(Format::Text), ..place.files(&["b.NDJSON"]) };
    assert_eq!(documents(text), ["{\"text\": \"four\"}"]);
}

#[test]
fn a_bad_json_line_is_named() {
    let place = Place::new();
    for (line, expected) in [
        ("{\"n\": 1}", "expected a field \"text\", found \"n\""),
        ("{}", "expected a field \"text\", found no fields"),
        ("{\"text\": 3}", "expected a string in field \"text\", found a number"),
        ("{\"text\": null}", "expected a string in field \"text\", found null"),
        ("[1]", "expected a JSON object, found a list"),
        ("{\"text\": \"x\"", "expected a JSON object, found broken JSON at column "),
        ("text", "expected a JSON object, found broken JSON at column 2: "),
    ] {
        place.write("bad.jsonl", format!("{{\"text\": \"fine\"}}\n\n{line}\n"));
        let found = error(place.files(&["bad.jsonl"]));
        assert!(found.contains(&format!("bad.jsonl:3: {expected}")), "{found}");
    }
}

#[test]
fn invalid_utf8_is_refused_replaced_or_skipped() {
    let place = Place::new();
    let long = "good ".repeat(900);
    let text = [b"caf\xe9 \xff\xfe\n", long.as_bytes(), b"\n\n", long.as_bytes()].concat();
    place.write("a.txt", &text);
    place.write("b.jsonl", b"{\"text\": \"caf\xe9\"}\n{\"text\": \"fine\"}\n");
    let with = |invalid, name: &str| Files { invalid, ..place.files(&[name]) };
    let refused = error(with(InvalidUtf8::Error, "a.txt"));
    assert!(refused.contains("a.txt: expected UTF-8 text, found an invalid byte 0xe9 at byte offset 3"), "{refused}");
    assert!(error(with(InvalidUtf8::Error, "b.jsonl")).contains("0xe9 at byte offset 13"));

    let replaced = documents(with(InvalidUtf8::Replace, "a.txt"));
    assert!(replaced[0].starts_with("caf\u{fffd} \u{fffd}\u{fffd}\ngood"), "{}", &replaced[0][..20]);
    assert_eq!(survey(with(InvalidUtf8::Replace, "a.txt")).unwrap().skipped().replaced, 3);
    assert_eq!(documents(with(InvalidUtf8::Replace, "b.jsonl")), ["caf\u{fffd}", "fine"]);

    assert_eq!(documents(with(InvalidUtf8::Skip, "a.txt")), [long.trim_end()]);
    assert_eq!(survey(with(InvalidUtf8::Skip, "a.txt")).unwrap().skipped().dropped, 1);
    assert_eq!(documents(with(InvalidUtf8::Skip, "b.jsonl")), ["fine"]);
}

#[test]
fn errors_name_the_path() {
    let place = Place::new();
    place.write("empty.txt", " \n\n");
    place.write("nul.txt", b"text\0text");
    assert!(error(place.files(&["none.txt"])).contains("none.txt: cannot be read"));
    assert!(error(place.files(&["empty.txt"])).contains("empty.txt: expected text, found 3 bytes"));
    assert!(error(place.files(&["nul.txt"])).contains("nul.txt: expected text, found a NUL byte at byte offset 4"));
    place.write("folder/nul", b"\0");
    let nothing = error(place.files(&["folder"]));
    assert!(nothing.contains("folder: expected files with text, found none: 1 binary files left out"), "{nothing}");
    let field = Files { field: Some("text".into()), ..place.files(&["empty.txt"]) };
    place.write("empty.txt", "text");
    assert!(error(field).contains("field has no effect: no file is read as JSON lines"));
    let ignore = Files { ignore: vec!["*.md".into()], ..place.files(&["empty.txt"]) };
    assert!(error(ignore).contains("ignore has no effect"));
}

#[test]
fn a_file_that_changes_is_noticed() {
    let place = Place::new();
    place.write("a.txt", "some text");
    let survey = survey(place.files(&["a.txt"])).unwrap();
    place.write("a.txt", "other txt");
    let error = survey.each(|_, _| Ok(())).unwrap_err().to_string();
    assert!(error.contains("a.txt: changed while it was being read"), "{error}");
}

#[test]
fn fingerprints_follow_content_and_reading_not_names() {
    let place = Place::new();
    let of = |files: Files| survey(files).unwrap().fingerprint();
    place.write("a.txt", "one");
    place.write("b.txt", "two");
    place.write("c.txt", "one");
    assert_eq!(of(place.files(&["a.txt", "b.txt"])), of(place.files(&["c.txt", "b.txt"])));
    assert_ne!(of(place.files(&["a.txt", "b.txt"])), of(place.files(&["b.txt", "a.txt"])));
    let skip = Files { invalid: InvalidUtf8::Skip, ..place.files(&["a.txt", "b.txt"]) };
    assert_ne!(of(place.files(&["a.txt", "b.txt"])), of(skip));
    let generated = |seed, bytes| Survey::new(&Source::Builtin { seed, bytes }).unwrap().fingerprint();
    assert_ne!(generated(1, 20_000), generated(2, 20_000));
    assert_eq!(generated(1, 20_000), generated(1, 20_000));
}

#[test]
fn a_tokenizer_sees_a_bounded_sample_of_the_training_side() {
    let survey = Survey::new(&Source::Builtin { seed: 1, bytes: 200_000 }).unwrap();
    let sides = Sides::new(survey.documents(), 0.3, 1, 0).unwrap();
    let all = sample(&[(&survey, Some(&sides))], 1 << 20).unwrap();
    assert_eq!(all.len() as u64, survey.documents() - sides.held_count());
    let both = [(&survey, Some(&sides)), (&survey, Some(&sides))];
    let some = sample(&both, 100_000).unwrap();
    let bytes: usize = some.iter().map(String::len).sum();
    assert!((40_000..110_000).contains(&bytes), "{bytes}");
    assert!(some.iter().all(|text| all.contains(text)));
    assert_eq!(some, sample(&both, 100_000).unwrap());
    assert_eq!(sample(&[(&survey, None)], 1 << 20).unwrap().len() as u64, survey.documents());
}

#[test]
fn a_source_is_described_by_its_paths() {
    let files =
        |paths: &[&str]| Source::Files(Files { paths: paths.iter().map(PathBuf::from).collect(), ..Files::default() });
    assert_eq!(files(&["a/b.txt"]).describe(), "a/b.txt");
    assert_eq!(files(&["a/b.txt", "c", "d"]).describe(), "a/b.txt and 2 more");
    assert_eq!(Source::Builtin { seed: 0, bytes: 0 }.describe(), "built-in corpus");
}
