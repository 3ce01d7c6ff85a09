use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use hadal_files::Disk;
use tempfile::TempDir;

use super::*;
use crate::DataError;
use crate::corpus::Source;

const SEED: u64 = 3;

/// The generated corpus, tokenised into small shards.
struct Made {
    dir: TempDir,
    survey: Survey,
    sides: Sides,
    tokenizer: Tokenizer,
    identity: Identity,
}

impl Made {
    fn new(threads: usize) -> Self {
        let survey = Survey::new(&Source::Builtin { seed: SEED, bytes: 24_000 }).unwrap();
        let sides = Sides::new(survey.documents(), 0.2, SEED, 0).unwrap();
        let text = crate::corpus::sample(&[(&survey, Some(&sides))], 1 << 20).unwrap();
        let tokenizer = Tokenizer::train(&text, 400).unwrap();
        let identity = Identity::new(&survey, &sides, &tokenizer);
        let made = Self { dir: tempfile::tempdir().unwrap(), survey, sides, tokenizer, identity };
        made.store(&Disk::new(), threads).unwrap();
        made
    }

    fn store(&self, disk: &Disk, threads: usize) -> Result<(), DataError> {
        let Self { survey, sides, tokenizer, identity, .. } = self;
        let job = Job { name: "text", survey, sides, tokenizer, identity: *identity };
        let workers = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let pool = |f: &mut (dyn FnMut() + Send)| workers.install(f);
        let mut last = 0;
        let mut progress = |done: u64| {
            assert!(done >= last);
            last = done;
            ControlFlow::Continue(())
        };
        store::store(disk, self.dir.path(), &job, &pool, &mut progress, 2000)?;
        assert_eq!(last, survey.text_bytes());
        Ok(())
    }

    fn directory(&self) -> PathBuf {
        self.dir.path().join(self.identity.directory("text"))
    }

    fn open(&self) -> Result<Stored, DataError> {
        Stored::open(&self.directory(), self.identity, self.tokenizer.vocab_size())
    }

    fn error(&self) -> String {
        self.open().err().expect("must be refused").to_string()
    }

    fn damage(&self, name: &str, f: impl FnOnce(&mut Vec<u8>)) {
        let path = self.directory().join(name);
        let mut bytes = fs::read(&path).unwrap();
        f(&mut bytes);
        fs::write(&path, bytes).unwrap();
    }
}

fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    let mut all: Vec<_> =
        entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect();
    all.sort();
    all
}

#[test]
fn shards_hold_the_documents_of_their_side() {
    let made = Made::new(2);
    let stored = made.open().unwrap();
    let files: Vec<String> = contents(&made.directory()).into_iter().map(|(name, _)| name).collect();
    assert!(files.contains(&"train-00001.tokens".to_owned()) && files.contains(&"valid-00000.tokens".to_owned()));
    let (mut train, mut valid, mut bytes) = (Vec::new(), Vec::new(), 0);
    let eos = made.tokenizer.eos().unwrap();
    made.survey
        .each(|i, text| {
            let side = if made.sides.held(i) { &mut valid } else { &mut train };
            side.extend(made.tokenizer.encode(text));
            side.push(eos);
            bytes += text.len() as u64;
            Ok(())
        })
        .unwrap();
    let all = |side: &Side| side.read(0, side.tokens() as usize).unwrap();
    assert!(all(&stored.train) == train && all(&stored.valid) == valid);
    assert_eq!(stored.train.bytes() + stored.valid.bytes(), bytes);
    let manifest: Manifest = serde_json::from_slice(&fs::read(made.directory().join(MANIFEST)).unwrap()).unwrap();
    assert_eq!(manifest.valid.documents, made.sides.held_count());
    // Reads that begin, end and go over the ends of shards.
    for (start, count) in [(1990, 20), (2000, 2000), (1999, 1), (1999, 2002), (0, 0), (train.len() - 1, 1)] {
        assert_eq!(stored.train.read(start as u64, count).unwrap(), train[start..start + count]);
    }
    assert_eq!(stored.beginnings.len(), 5);
}

#[test]
fn shards_do_not_depend_on_threads() {
    let [one, two, five] = [1, 2, 5].map(|threads| contents(&Made::new(threads).directory()));
    assert!(one == two && two == five);
}

#[test]
fn any_flipped_bit_is_an_error() {
    let made = Made::new(2);
    let name = "train-00001.tokens";
    let clean = fs::read(made.directory().join(name)).unwrap();
    made.damage(name, |bytes| bytes[64 + 999] ^= 4);
    let error = made.error();
    assert!(
        error.contains("train-00001.tokens: not a usable token shard: block 0 of 1: expected checksum "),
        "{error}"
    );
    let hint = format!(" (remove {} to have it made again)", made.directory().display());
    assert!(error.contains(", found ") && error.ends_with(&hint), "{error}");
    for at in (0..64).chain([clean.len() - 8, clean.len() - 1]) {
        made.damage(name, |bytes| {
            bytes.clone_from(&clean);
            bytes[at] ^= 1;
        });
        assert!(made.error().contains(name), "byte {at}");
    }
    made.damage(name, |bytes| bytes.clone_from(&clean));
    made.open().unwrap();
}

#[test]
fn shards_of_another_length_are_errors() {
    let made = Made::new(2);
    let name = "valid-00000.tokens";
    let clean = fs::read(made.directory().join(name)).unwrap();
    let mut lengths: Vec<usize> = vec![0, 1, 63, 64, 65, clean.len() - 8, clean.len() - 1];
    lengths.push(clean.len() + 1);
    for length in lengths {
        made.damage(name, |bytes| {
            bytes.clone_from(&clean);
            bytes.resize(length, 0);
        });
        let error = made.error();
        assert!(error.contains(name) && error.contains("expected ") && error.contains("found "), "{error}");
    }
    fs::remove_file(made.directory().join(name)).unwrap();
    assert!(made.error().contains("valid-00000.tokens: cannot be read"));
    // Another shard in its place is whole and has another number of tokens.
    fs::copy(made.directory().join("train-00000.tokens"), made.directory().join(name)).unwrap();
    let error = made.error();
    assert!(error.contains("valid-00000.tokens") && error.contains("as its manifest says, found "), "{error}");
}

#[test]
fn manifests_that_are_not_ours_are_errors() {
    let made = Made::new(2);
    let clean = fs::read_to_string(made.directory().join(MANIFEST)).unwrap();
    let with = |from: &str, to: &str| {
        assert!(clean.contains(from), "{from}");
        made.damage(MANIFEST, |bytes| *bytes = clean.replace(from, to).into_bytes());
        made.error()
    };
    assert!(
        with("\"version\": 1", "\"version\": 2")
            .contains("manifest.json: not a usable token shard: expected version 1, found 2")
    );
    assert!(with("\"source\"", "\"colour\"").contains("unknown field `colour`"));
    assert!(
        with("valid-00000", "../valid-00000").contains("expected names of shards, found \"../valid-00000.tokens\"")
    );
    assert!(with("{", "").contains("manifest.json"));
    fs::remove_file(made.directory().join(MANIFEST)).unwrap();
    assert!(!Stored::is_whole(&made.directory()));
    assert!(
        made.error().contains("manifest.json: not a usable token shard: expected the manifest that is written last")
    );
    // What has no manifest is made again.
    made.store(&Disk::new(), 2).unwrap();
    made.open().unwrap();
}

#[test]
fn tokens_of_another_tokenizer_or_text_are_errors() {
    let made = Made::new(2);
    let (own, other) = (made.identity, 0xabc);
    for identity in [Identity { tokenizer: other, ..own }, Identity { source: other, ..own }] {
        let what = if identity.tokenizer == other { "tokenizer" } else { "source" };
        let found = if identity.tokenizer == other { own.tokenizer } else { own.source };
        let parts = format!("expected tokens of {what} 0000000000000abc, found those of {what} {found:016x}");
        let error = Stored::open(&made.directory(), identity, 400).err().unwrap().to_string();
        assert!(error.contains("manifest.json") && error.contains(&parts), "{error}");
        // The same in the header of a shard.
        let entry = ShardEntry { file: "train-00000.tokens".into(), tokens: 2000, checksum: String::new() };
        let entry = SideEntry { tokens: 2000, shards: vec![entry], ..SideEntry::default() };
        let error = Side::open(&made.directory(), &entry, identity, 400).err().unwrap().to_string();
        assert!(error.contains("train-00000.tokens") && error.contains(&parts), "{error}");
    }
    assert_ne!(made.identity.directory("text"), Identity { tokenizer: other, ..own }.directory("text"));
}

#[test]
fn ids_that_the_tokenizer_lacks_are_errors() {
    let made = Made::new(2);
    let error = Stored::open(&made.directory(), made.identity, 300).err().unwrap().to_string();
    assert!(error.contains("block 0: expected ids below 300, found 3"), "{error}");
}

/// Ids from 65536 on take four bytes; blocks are a mebibyte.
#[test]
fn wide_ids_and_several_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide");
    let identity = Identity { tokenizer: 1, source: 2 };
    let tokens: Vec<u32> = (0..600_000).map(|i| (i * 7) % 100_000).collect();
    assert_eq!((file::width(1 << 16), file::width((1 << 16) + 1)), (2, 4));
    let checksum = hex(file::write(&Disk::new(), &path, &tokens, 4, 99, identity).unwrap());
    let entry = ShardEntry { file: "wide".into(), tokens: 600_000, checksum };
    let open = || file::Shard::open(&path, &entry, identity, 100_000).unwrap();
    let shard = open();
    assert_eq!((shard.blocks(), shard.tokens()), (3, 600_000));
    let mut read = Vec::new();
    shard.read(262_140, 262_150, &mut read).unwrap();
    assert_eq!(read, tokens[262_140..262_150]);
    // A block is checked when it is first read, and only then.
    let mut bytes = fs::read(&path).unwrap();
    bytes[64 + (2 << 20) + 5] ^= 1;
    fs::write(&path, bytes).unwrap();
    let shard = open();
    shard.read(0, 524_288, &mut read).unwrap();
    let error = shard.read(524_287, 524_289, &mut read).unwrap_err().to_string();
    assert!(error.contains("block 2 of 3: expected checksum"), "{error}");
}

/// Whatever operation fails, there is no directory that looks whole, and the next attempt succeeds.
#[test]
fn a_failed_tokenisation_leaves_nothing_that_counts() {
    use hadal_files::{Fault, Faults};
    use std::sync::Arc;
    let made = Made::new(2);
    let counted = Arc::new(Faults::none());
    fs::remove_dir_all(made.directory()).unwrap();
    made.store(&Disk::with(counted.clone()), 2).unwrap();
    let clean = contents(&made.directory());
    for at in 0..counted.count() {
        for fault in [Fault::Once(std::io::ErrorKind::Other), Fault::Full] {
            fs::remove_dir_all(made.directory()).unwrap();
            let failed = made.store(&Disk::with(Arc::new(Faults::at(at, fault))), 2);
            // A rename that has happened and could not be made durable is told, and there.
            if failed.is_err() && made.directory().exists() {
                assert!(contents(&made.directory()) == clean, "operation {at}");
            }
            made.store(&Disk::new(), 2).unwrap();
            assert!(contents(&made.directory()) == clean, "operation {at}");
        }
    }
}

/// The root may be a directory that the user has other things in.
#[test]
fn only_leftovers_of_tokenisation_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let swept = [".text-0123456789abcdef.partial", ".a-b-00000000000000ff.removed"];
    let stay = ["text-0123456789abcdef", ".text-0123.partial", ".download.partial", ".lock", ".x-0123456789abcdef"];
    for name in swept.iter().chain(&stay) {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("file"), "x").unwrap();
    }
    sweep(&Disk::new(), root).unwrap();
    assert!(swept.iter().all(|name| !root.join(name).exists()));
    assert!(stay.iter().all(|name| root.join(name).join("file").exists()));
}

/// The fingerprint of a run's tokens depends on every source's and on their order.
#[test]
fn a_fingerprint_covers_all_sources() {
    let [a, b, c] = [(1, 2), (1, 3), (4, 2)].map(|(tokenizer, source)| Identity { tokenizer, source });
    let all = [vec![a], vec![b], vec![c], vec![a, b], vec![b, a], vec![a, a]].map(|i| Identity::of_all(&i));
    let distinct: std::collections::BTreeSet<u64> = all.into_iter().collect();
    assert_eq!(distinct.len(), all.len());
    assert_eq!(Identity::of_all(&[a, b]), all[3]);
}
