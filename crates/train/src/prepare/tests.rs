//! Text to tokens, again and again: what is made, what is found, what is refused.

use super::{Prepared, prepare};
use crate::config::{DataSettings, Settings, TrainConfig};
use crate::pretrain::{Observer, Run, Start, pretrain};
use crate::{Build, Metrics, TrainError};
use hadal_files::{Disk, Lock};
use hadal_kernels::Device;
use hadal_model::ModelConfig;
use std::path::{Path, PathBuf};

/// Remembers the phases, and asks for an end when one begins with `stop_at`.
#[derive(Default)]
struct Watch {
    stop_at: Option<&'static str>,
    stop: bool,
    phases: Vec<String>,
}

impl Observer for Watch {
    fn phase(&mut self, what: &str) {
        self.stop |= self.stop_at.is_some_and(|at| what.starts_with(at));
        self.phases.push(what.to_string());
    }
    fn start(&mut self, _: &Start) {}
    fn step(&mut self, _: &Metrics) {}
    fn checkpoint(&mut self, _: &Path) {}
    fn resumed(&mut self, _: &Path, _: u64, _: &[String]) {}
    fn stop(&self) -> bool {
        self.stop
    }
}

fn text(from: usize) -> String {
    (from..from + 600).map(|i| format!("{} and {} make {}.\n\n", i, i * 7 % 10, i + i * 7 % 10)).collect()
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.write("one.txt", &text(0));
        place.write("two.txt", &text(1000));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// A run in directory `out` on a source for each file.
    fn run(&self, out: &str, files: &[&str]) -> Run {
        let table = "preset = \"nano\"\nvocab_size = 300\n".parse().unwrap();
        let model = ModelConfig::from_toml_table(&table).unwrap();
        let settings = Settings { seq: Some(16), eval_tokens: Some(64), ..Settings::default() };
        let config = TrainConfig::resolve(settings, &model).unwrap();
        let source = |f: &&str| crate::SourceSettings { paths: Some(vec![self.path(f)]), ..Default::default() };
        let sources = Some(files.iter().map(source).collect());
        let data = DataSettings { sources, valid_fraction: Some(0.2), ..DataSettings::default() };
        let build = Build { version: "0", commit: "test" };
        Run { model, config, data, out: self.path(out), resume: false, override_saved: false, build }
    }
}

fn go(run: &Run, threads: usize, watch: &mut Watch) -> Result<Prepared, TrainError> {
    let ctx = Device::cpu(Some(threads)).unwrap().ctx();
    prepare(&Disk::new(), &ctx, run, None, watch)
}

fn done(run: &Run) -> Prepared {
    go(run, 2, &mut Watch::default()).unwrap()
}

fn refused(run: &Run) -> String {
    go(run, 2, &mut Watch::default()).err().expect("must be refused").to_string()
}

/// The names in a directory, without the lock.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| name != Lock::NAME).collect();
    names.sort();
    names
}

/// Where the tokens of a source lie.
fn tokens(root: &Path, source: &str) -> PathBuf {
    root.join(names(root).into_iter().find(|name| name.starts_with(&format!("{source}-"))).unwrap())
}

#[test]
fn damaged_tokens_can_be_removed_and_are_made_again() {
    let place = Place::new();
    let run = place.run("out", &["one.txt", "two.txt"]);
    let first = done(&run);
    let directory = tokens(&run.out.join("data"), "two");
    let shard = directory.join("train-00000.tokens");
    let clean = std::fs::read(&shard).unwrap();
    let mut bytes = clean.clone();
    bytes[100] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let error = refused(&run);
    assert!(error.contains("expected checksum "), "{error}");
    assert!(error.ends_with(&format!(" (remove {} to have it made again)", directory.display())), "{error}");
    std::fs::remove_dir_all(&directory).unwrap();
    let mut watch = Watch::default();
    let again = go(&run, 2, &mut watch).unwrap();
    assert_eq!(watch.phases, ["opening the tokens of this run", "reading text", "tokenising two"]);
    assert_eq!(std::fs::read(&shard).unwrap(), clean);
    assert_eq!(again.fingerprint, first.fingerprint);
    assert!((0..50).all(|i| again.train.sample(i).unwrap() == first.train.sample(i).unwrap()));
}

#[test]
fn tokens_are_not_made_again_of_another_text() {
    let place = Place::new();
    let run = place.run("out", &["one.txt", "two.txt"]);
    done(&run);
    // The tokens are there: the text does not count.
    place.write("two.txt", &text(2000));
    done(&run);
    let directory = tokens(&run.out.join("data"), "two");
    std::fs::remove_dir_all(&directory).unwrap();
    let error = refused(&run);
    let expected = format!("{}: {}: the tokens that this run", directory.display(), place.path("two.txt").display());
    assert!(error.starts_with(&expected) && error.contains("expected fingerprint "), "{error}\n{expected}");
    assert!(!directory.exists());
    place.write("two.txt", &text(1000));
    done(&run);
    assert!(directory.exists());
}

#[test]
fn a_cache_that_has_everything_is_only_read() {
    let place = Place::new();
    let cached = |out: &str, files: &[&str]| {
        let run = place.run(out, files);
        Run { data: DataSettings { cache: Some(place.path("cache")), ..run.data }, ..run }
    };
    done(&cached("a", &["one.txt"]));
    let lock = Lock::take(&place.path("cache")).unwrap().unwrap();
    let before = names(&place.path("cache"));
    done(&cached("b", &["one.txt"]));
    done(&cached("a", &["one.txt"]));
    assert_eq!(names(&place.path("cache")), before);
    let other = cached("c", &["two.txt"]);
    let error = refused(&other);
    assert!(error.contains("expected to be alone, found it locked by process "), "{error}");
    drop(lock);
    done(&other);
}

#[test]
fn leftovers_are_swept() {
    let place = Place::new();
    let run = place.run("out", &["one.txt"]);
    let data = run.out.join("data");
    let left = data.join(".other-0123456789abcdef.partial");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("train-00000.tokens"), "half").unwrap();
    done(&run);
    assert_eq!(names(&data).iter().filter(|name| name.starts_with('.')).count(), 0);
}

#[test]
fn other_settings_are_named_alone() {
    let place = Place::new();
    let run = place.run("out", &["one.txt", "two.txt"]);
    done(&run);
    let mut asked = run.clone();
    asked.config.seed = 4;
    asked.model.vocab_size = 301;
    asked.data.valid_fraction = None;
    asked.data.sources.as_mut().unwrap()[1].field = Some("body".into());
    let path = run.out.join("data/prepared.json");
    assert_eq!(
        refused(&asked),
        format!(
            "{}: the data of this run was made for other settings: data.sources[1].field: saved none, asked \"body\"; \
             data.valid_fraction: saved 0.2, asked none; train.seed: saved 0, asked 4; \
             model.vocab_size: saved 300, asked 301",
            path.display()
        )
    );
    asked.clone_from(&run);
    asked.data.sources.as_mut().unwrap().pop();
    let error = refused(&asked);
    assert!(error.contains("data.sources: saved [{") && !error.contains("seed"), "{error}");
}

#[test]
fn a_stop_ends_the_preparation_and_leaves_nothing() {
    let place = Place::new();
    let run = place.run("out", &["one.txt", "two.txt"]);
    for phase in ["reading text", "training a byte-level", "tokenising one", "tokenising two"] {
        // A new directory goes, an empty one stays; either way the same command begins again.
        for there in [false, true] {
            if there {
                std::fs::create_dir(&run.out).unwrap();
            }
            let mut watch = Watch { stop_at: Some(phase), ..Watch::default() };
            let stopped = pretrain(&Device::cpu(Some(2)).unwrap().ctx(), &run, &mut watch);
            assert!(matches!(stopped, Err(TrainError::Stopped)), "{phase}");
            assert!(watch.phases.last().unwrap().starts_with(phase), "{:?}", watch.phases);
            assert_eq!(run.out.exists(), there);
            if there {
                assert_eq!(names(&run.out), [""; 0], "{phase}");
                std::fs::remove_dir_all(&run.out).unwrap();
            }
        }
    }
}

#[test]
fn the_fingerprint_is_of_what_is_read() {
    let place = Place::new();
    let fingerprint = |out: &str, files: &[&str], threads| {
        go(&place.run(out, files), threads, &mut Watch::default()).unwrap().fingerprint
    };
    let one = fingerprint("a", &["one.txt", "two.txt"], 2);
    std::fs::rename(place.path("one.txt"), place.path("moved.txt")).unwrap();
    assert_eq!(fingerprint("b", &["moved.txt", "two.txt"], 5), one, "another name, other threads");
    assert_eq!(done(&place.run("a", &["one.txt", "two.txt"])).fingerprint, one, "opened, not made");
    place.write("two.txt", &text(1001));
    assert_ne!(fingerprint("c", &["moved.txt", "two.txt"], 2), one, "another text");
    place.write("two.txt", &text(1000));
    assert_ne!(fingerprint("d", &["two.txt", "moved.txt"], 2), one, "another order");
    let mut run = place.run("e", &["moved.txt", "two.txt"]);
    run.data.valid_fraction = Some(0.3);
    assert_ne!(done(&run).fingerprint, one, "another split");
}
