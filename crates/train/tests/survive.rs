//! A run that is interrupted anywhere and resumed equals one that was not, to the bit: every number of its record, every
//! byte of its checkpoints. Faults are planned at every file operation in turn.

use hadal_files::{Disk, Fault, Faults};
use hadal_kernels::{Ctx, Device};
use hadal_model::{Checkpoint, ModelConfig, Precision};
use hadal_train::{
    Build, DataSettings, Metrics, Observer, Outcome, Run, Settings, Start, TrainConfig, TrainError, pretrain_on,
};
use std::collections::BTreeMap;
use std::io::ErrorKind::StorageFull;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MODEL: &str = "
    preset = \"nano\"
    vocab_size = 280
    hidden_size = 16
    intermediate_size = 24
    moe_intermediate_size = 8
    num_hidden_layers = 2
    first_k_dense_replace = 1
    num_attention_heads = 2
    q_lora_rank = 8
    kv_lora_rank = 8
    qk_nope_head_dim = 8
    qk_rope_head_dim = 4
    v_head_dim = 8
    n_routed_experts = 4
    num_experts_per_tok = 2
    n_group = 2
    topk_group = 1
    max_position_embeddings = 32
";

/// Stops a run after a step, or ends it in the midst of one, or never.
#[derive(Default)]
struct Watch {
    stop_after: Option<u64>,
    /// Panics in that step, as a GPU's failure does.
    fail_at: Option<u64>,
    step: u64,
    resumed: Option<(u64, Vec<String>)>,
    saved: Vec<PathBuf>,
}

impl Observer for Watch {
    fn phase(&mut self, _: &str) {}
    fn start(&mut self, _: &Start) {}
    fn step(&mut self, m: &Metrics) {
        self.step = m.step;
        if self.fail_at == Some(m.step) {
            panic!("a failure of the device in step {}", m.step);
        }
    }
    fn checkpoint(&mut self, path: &Path) {
        self.saved.push(path.to_path_buf());
    }
    fn resumed(&mut self, _: &Path, step: u64, remarks: &[String]) {
        self.resumed = Some((step, remarks.to_vec()));
    }
    fn stop(&self) -> bool {
        self.stop_after.is_some_and(|n| self.step >= n)
    }
}

fn settings() -> Settings {
    Settings {
        steps: Some(6),
        batch: Some(2),
        seq: Some(16),
        warmup: Some(1),
        eval_every: Some(2),
        eval_tokens: Some(64),
        checkpoint_every: Some(2),
        keep_last: Some(2),
        ema_decay: Some(0.75),
        ..Settings::default()
    }
}

/// A text, and runs on it in directories beside it.
struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        // In memory where the system offers it: thousands of flushes, and none is what the test is about.
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let line = |i: usize| format!("{} and {} make {}.\n{}", i, i * 7 % 10, i + i * 7 % 10, ["", "\n"][i % 2]);
        std::fs::write(root.path().join("text"), (0..900).map(line).collect::<String>()).unwrap();
        Self { root }
    }

    /// Leaves a tokenizer for the runs to come, which saves most of their time.
    fn train_tokenizer(&self, settings: &Settings) {
        let run = self.run("first", Settings { steps: Some(1), warmup: Some(0), ..settings.clone() }, false);
        let done = go(&run, &Disk::new(), &mut Watch::default()).unwrap();
        std::fs::rename(done.checkpoint, self.root.path().join("tokenizer")).unwrap();
    }

    fn run(&self, name: &str, settings: Settings, resume: bool) -> Run {
        let model = ModelConfig::from_toml_table(&MODEL.parse().unwrap()).unwrap();
        let config = TrainConfig::resolve(settings, &model).unwrap();
        let paths = Some(vec![self.root.path().join("text")]);
        let tokenizer = Some(self.root.path().join("tokenizer")).filter(|t| t.exists());
        let data = DataSettings { paths, tokenizer, valid_fraction: Some(0.05), ..DataSettings::default() };
        let build = Build { version: "0", commit: "test" };
        Run { model, config, data, out: self.root.path().join(name), resume, override_saved: false, build }
    }
}

fn ctx() -> Ctx {
    Device::cpu(Some(2)).unwrap().ctx()
}

fn go(run: &Run, disk: &Disk, watch: &mut Watch) -> Result<Outcome, TrainError> {
    pretrain_on(disk, &ctx(), run, watch)
}

/// The record without wall times, numbers as they are written.
fn curve(out: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let cut = |line: &str| {
        let mut m: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
        m.remove("seconds");
        m.remove("tokens_per_s");
        serde_json::to_string(&m).unwrap()
    };
    text.lines().map(cut).collect()
}

/// Every file below `dir` with its bytes.
fn bytes(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(next) = todo.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => todo.push(path),
                false => {
                    let name = path.strip_prefix(dir).unwrap().display().to_string();
                    found.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
    }
    found
}

fn steps(out: &Path) -> Vec<String> {
    let names = std::fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<String> = names.filter(|n| n.starts_with("step-")).collect();
    steps.sort_unstable();
    steps
}

#[track_caller]
fn assert_same_run(a: &Path, b: &Path) {
    assert_eq!(curve(a), curve(b));
    assert_eq!(steps(a), steps(b));
    for step in steps(a) {
        let (x, y) = (bytes(&a.join(&step)), bytes(&b.join(&step)));
        assert_eq!(x.keys().collect::<Vec<_>>(), y.keys().collect::<Vec<_>>());
        x.iter().for_each(|(name, bytes)| assert!(y[name] == *bytes, "{step}/{name} differs"));
    }
    for link in ["latest", "best"] {
        assert_eq!(
            std::fs::canonicalize(a.join(link)).unwrap().file_name(),
            std::fs::canonicalize(b.join(link)).unwrap().file_name()
        );
    }
}

/// Whatever has a checkpoint's name opens, with every tensor; the rest is files of a run or hidden.
#[track_caller]
fn assert_whole_or_hidden(run: &Run) {
    for entry in std::fs::read_dir(&run.out).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("step-") {
            let layout = Arc::new(hadal_model::Layout::new(&run.model, hadal_model::Scope::whole(&run.model)));
            for dir in [entry.path(), entry.path().join("ema")] {
                Checkpoint::open(&dir).unwrap().load(&ctx(), &run.model, layout.clone(), Precision::Bf16).unwrap();
            }
            assert!(entry.path().join("state/state.json").is_file());
        } else {
            let known = ["run.toml", "metrics.jsonl", "data", "latest", "best"];
            assert!(name.starts_with('.') || known.contains(&name.as_str()), "{name}");
        }
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let place = Place::new();
    for (i, (dtype, beside)) in [("fp32", true), ("bf16", true), ("bf16", false)].into_iter().enumerate() {
        let s = || Settings { dtype: Some(dtype.into()), save_beside: Some(beside), ..settings() };
        let alone = place.run(&format!("alone{i}"), s(), false);
        let done = go(&alone, &Disk::new(), &mut Watch::default()).unwrap();
        assert!(done.finished && done.step == 6 && done.last.step == 6);
        let run = place.run(&format!("stopped{i}"), s(), true);
        for stop_after in [1, 3, 4] {
            let mut watch = Watch { stop_after: Some(stop_after), ..Watch::default() };
            let done = go(&run, &Disk::new(), &mut watch).unwrap();
            assert!(!done.finished && done.step == stop_after && done.checkpoint.is_dir());
        }
        let mut watch = Watch::default();
        assert!(go(&run, &Disk::new(), &mut watch).unwrap().finished);
        assert_eq!(watch.resumed, Some((4, vec![])));
        assert_eq!(curve(&alone.out), curve(&run.out));
        assert_eq!(bytes(&alone.out.join("step-000006")), bytes(&run.out.join("step-000006")));
        // A finished run has nothing left to do, and says how it ended.
        let again = go(&run, &Disk::new(), &mut Watch::default()).unwrap();
        assert_eq!((again.last.loss, again.step, again.finished), (done.last.loss, 6, true));
    }
}

/// `fault` at every file operation of a run of its own in turn (or every third, which saves beside its steps), after
/// which the run is resumed.
fn faults_everywhere(fault: Fault, beside: bool) {
    let place = Place::new();
    // Three saves, the last of which removes the one before: every operation that a save ever does. In the foreground
    // their numbers are the same from run to run.
    let s = || Settings {
        save_beside: Some(beside),
        save_initial: Some(true),
        steps: Some(2),
        eval_every: Some(1),
        checkpoint_every: Some(1),
        keep_last: Some(1),
        ..settings()
    };
    place.train_tokenizer(&s());
    let alone = place.run("alone", s(), false);
    let count = Arc::new(Faults::none());
    go(&alone, &Disk::with(count.clone()), &mut Watch::default()).unwrap();
    let mut failed = 0;
    for at in (0..count.count()).step_by(if beside { 3 } else { 1 }) {
        let run = place.run("run", s(), true);
        let faults = Arc::new(Faults::at(at, fault));
        match go(&run, &Disk::with(faults), &mut Watch::default()) {
            Ok(done) => assert!(done.finished),
            Err(e) => {
                failed += 1;
                assert!(!e.to_string().contains('\n'), "{e}");
            }
        }
        if run.out.exists() {
            assert_whole_or_hidden(&run);
        }
        assert!(go(&run, &Disk::new(), &mut Watch::default()).unwrap().finished);
        assert_same_run(&alone.out, &run.out);
        std::fs::remove_dir_all(&run.out).unwrap();
    }
    let (of, saves) = if beside { ("every third", "beside training") } else { ("each", "in the foreground") };
    eprintln!(
        "survive: {fault:?} at {of} of {} file operations, saves {saves}: {failed} runs failed and were resumed",
        count.count()
    );
    assert!(count.count() > 60 && failed > 40, "{failed} of {}", count.count());
}

#[test]
fn death_at_every_file_operation() {
    faults_everywhere(Fault::Death, false);
}

#[test]
fn death_while_saving_beside_training() {
    faults_everywhere(Fault::Death, true);
}

#[test]
fn full_disk_from_every_file_operation_on() {
    faults_everywhere(Fault::Full, false);
}

#[test]
fn an_error_at_every_file_operation() {
    faults_everywhere(Fault::Once(StorageFull), false);
}

/// A device that fails ends a run by a panic, wherever its step is. What was saved before is whole, what was about to be
/// is finished, and the run goes on from there.
#[test]
fn a_device_that_fails_leaves_the_checkpoints_before() {
    let place = Place::new();
    for beside in [true, false] {
        let s = || Settings { save_beside: Some(beside), checkpoint_every: Some(1), keep_last: Some(6), ..settings() };
        let alone = place.run(&format!("alone {beside}"), s(), false);
        go(&alone, &Disk::new(), &mut Watch::default()).unwrap();
        for fail_at in 1..=6 {
            let run = place.run("run", s(), true);
            let mut watch = Watch { fail_at: Some(fail_at), ..Watch::default() };
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| go(&run, &Disk::new(), &mut watch)));
            assert!(ended.is_err());
            assert_whole_or_hidden(&run);
            let saved = steps(&run.out);
            assert_eq!(saved.len() as u64, fail_at - 1, "every step before has its checkpoint: {saved:?}");
            for step in &saved {
                assert_eq!(bytes(&alone.out.join(step)), bytes(&run.out.join(step)), "{step}");
            }
            let mut watch = Watch::default();
            assert!(go(&run, &Disk::new(), &mut watch).unwrap().finished);
            assert_eq!(watch.resumed.map(|(step, _)| step), (fail_at > 1).then_some(fail_at - 1));
            assert_same_run(&alone.out, &run.out);
            std::fs::remove_dir_all(&run.out).unwrap();
        }
    }
}

/// A run stopped after step 2, and what resuming it says once `spoil` has been at its directory.
fn spoiled(spoil: impl FnOnce(&Path)) -> String {
    let place = Place::new();
    let run = place.run("run", settings(), true);
    go(&run, &Disk::new(), &mut Watch { stop_after: Some(2), ..Watch::default() }).unwrap();
    spoil(&run.out);
    let error = go(&run, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    assert_eq!(steps(&run.out), ["step-000002"], "nothing is lost");
    error
}

#[test]
fn what_cannot_be_resumed_is_named() {
    let state = "step-000002/state/state.json";
    let edit = |out: &Path, from: &str, to: &str| {
        let text = std::fs::read_to_string(out.join(state)).unwrap();
        assert!(text.contains(from));
        std::fs::write(out.join(state), text.replace(from, to)).unwrap();
    };
    let newer = spoiled(|out| edit(out, "\"format\": 1", "\"format\": 2"));
    assert!(newer.contains(state) && newer.contains("expected a checkpoint of format 1, found 2"), "{newer}");
    let odd = spoiled(|out| edit(out, "\"updates\"", "\"dates\""));
    assert!(odd.contains("state.json: expected a run's state, found missing field `updates`"), "{odd}");
    let flipped = spoiled(|out| {
        let path = out.join("step-000002/state/m.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(path, bytes).unwrap();
    });
    assert!(flipped.contains("state/m.safetensors: expected") && flipped.contains("checksum"), "{flipped}");
    let missing = spoiled(|out| std::fs::remove_file(out.join("step-000002/state/v.safetensors")).unwrap());
    assert!(missing.contains("state/v.safetensors"), "{missing}");
    let holes = spoiled(|out| std::fs::write(out.join("metrics.jsonl"), "").unwrap());
    assert!(holes.contains("metrics.jsonl: line 1: expected the metrics of step 1, found the end"), "{holes}");
}

/// Damage to the newest checkpoint costs the steps since the one before, once its directory is out of the way.
#[test]
fn the_checkpoint_before_serves_when_the_newest_is_gone() {
    let place = Place::new();
    let (alone, run) = (place.run("alone", settings(), false), place.run("run", settings(), true));
    go(&alone, &Disk::new(), &mut Watch::default()).unwrap();
    go(&run, &Disk::new(), &mut Watch { stop_after: Some(4), ..Watch::default() }).unwrap();
    std::fs::remove_dir_all(run.out.join("step-000004")).unwrap();
    let mut watch = Watch::default();
    go(&run, &Disk::new(), &mut watch).unwrap();
    assert_eq!(watch.resumed, Some((2, vec![])));
    assert_same_run(&alone.out, &run.out);
}

#[test]
fn one_run_a_directory() {
    let place = Place::new();
    let run = place.run("run", settings(), true);
    go(&run, &Disk::new(), &mut Watch { stop_after: Some(1), ..Watch::default() }).unwrap();
    let held = hadal_files::Lock::take(&run.out).unwrap().unwrap();
    let error = go(&run, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    let expected = format!("found process {} writing to it", std::process::id());
    assert!(error.contains("expected a directory that no other run writes to") && error.contains(&expected), "{error}");
    drop(held);
    let fresh = Run { resume: false, ..run.clone() };
    let error = go(&fresh, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.ends_with("found a run in it (--resume goes on with it)"), "{error}");
    std::fs::write(place.root.path().join("other"), "x").unwrap();
    let elsewhere = Run { out: place.root.path().to_path_buf(), ..run.clone() };
    let error = go(&elsewhere, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("expected the directory of a run (run.toml), found other files"), "{error}");
    assert!(go(&run, &Disk::new(), &mut Watch::default()).unwrap().finished);
}

/// More steps than were asked for at first: allowed when it is said, and refused when it is not.
#[test]
fn a_finished_run_can_be_given_more_steps() {
    let place = Place::new();
    go(&place.run("run", settings(), false), &Disk::new(), &mut Watch::default()).unwrap();
    let more = place.run("run", Settings { steps: Some(8), constant: Some(3), ..settings() }, true);
    let error = go(&more, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("train.steps: saved 6, asked 8"), "{error}");
    let mut watch = Watch::default();
    let done = go(&Run { override_saved: true, ..more.clone() }, &Disk::new(), &mut watch).unwrap();
    assert_eq!((done.step, curve(&more.out).len()), (8, 8));
    assert_eq!(watch.resumed, Some((6, vec!["train.steps: 6 -> 8".to_string()])));
    // From then on these are the run's settings.
    assert!(go(&more, &Disk::new(), &mut Watch::default()).unwrap().finished);
    let fewer = Run {
        override_saved: true,
        ..place.run("run", Settings { steps: Some(7), constant: Some(3), ..settings() }, true)
    };
    let error = go(&fewer, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("train.steps = 7: expected at least the 8 steps that the run has done"), "{error}");
}

/// Whatever became of the files beside a checkpoint, it goes on as the run that it is of, or not at all.
#[test]
fn another_run_does_not_take_over_a_checkpoint() {
    let place = Place::new();
    let run = place.run("run", settings(), true);
    go(&run, &Disk::new(), &mut Watch { stop_after: Some(2), ..Watch::default() }).unwrap();
    let refused = |run: &Run, expected: &str| {
        std::fs::remove_file(run.out.join("run.toml")).unwrap();
        std::fs::write(run.out.join("run.toml"), hadal_train::saved::write(run)).unwrap();
        let error = go(run, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
        assert!(error.contains("step-000002/state/state.json") && error.contains(expected), "{error}");
    };
    refused(&place.run("run", Settings { beta1: Some(0.5), ..settings() }, true), "train.beta1: saved 0.9, asked 0.5");
    refused(&place.run("run", Settings { seq: Some(8), ..settings() }, true), "train.seq: saved 16, asked 8");
    let none = Settings { ema_decay: Some(0.0), ..settings() };
    refused(&place.run("run", none, true), "train.ema_decay: saved above 0, asked 0");
    std::fs::write(run.out.join("run.toml"), hadal_train::saved::write(&run)).unwrap();
    // Other text in the place of the one that was trained on.
    std::fs::remove_dir_all(run.out.join("data")).unwrap();
    let text = std::fs::read_to_string(place.root.path().join("text")).unwrap();
    std::fs::write(place.root.path().join("text"), text.replace("make", "are")).unwrap();
    let error = go(&run, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("expected the text that the run was trained on"), "{error}");
    std::fs::remove_dir_all(run.out.join("data")).unwrap();
    std::fs::write(place.root.path().join("text"), text).unwrap();
    assert!(go(&run, &Disk::new(), &mut Watch::default()).unwrap().finished);
}

#[test]
fn a_recording_can_be_given_up() {
    let place = Place::new();
    let recorded = place.root.path().join("batches.safetensors");
    let s = || Settings { record_batches: Some(recorded.clone()), save_initial: Some(true), ..settings() };
    let run = place.run("run", s(), true);
    go(&run, &Disk::new(), &mut Watch { stop_after: Some(1), ..Watch::default() }).unwrap();
    let error = go(&run, &Disk::new(), &mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("train.record_batches") && error.contains("--override gives the recording up"), "{error}");
    let done = go(&Run { override_saved: true, ..run.clone() }, &Disk::new(), &mut Watch::default()).unwrap();
    assert!(done.finished && !recorded.exists());
    // The initial weights were asked for, and stay.
    assert_eq!(steps(&run.out), ["step-000000", "step-000004", "step-000006"]);
}

/// The average of the weights is a model of its own beside the weights: between the first and the last.
#[test]
fn the_average_follows_the_weights() {
    let place = Place::new();
    let run = place.run("run", Settings { save_initial: Some(true), keep_last: Some(9), ..settings() }, false);
    go(&run, &Disk::new(), &mut Watch::default()).unwrap();
    let layout = Arc::new(hadal_model::Layout::new(&run.model, hadal_model::Scope::whole(&run.model)));
    let read = |dir: &str| {
        let open = Checkpoint::open(&run.out.join(dir)).unwrap();
        open.load(&ctx(), &run.model, layout.clone(), Precision::Fp32).unwrap().0.master.view().to_f32()
    };
    assert_eq!(bytes(&run.out.join("step-000000/ema")).len(), 4);
    let (first, last, average) = (read("step-000000"), read("step-000006"), read("step-000006/ema"));
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    assert!(distance(&average, &last) > 0.0);
    assert!(
        distance(&average, &last) < distance(&first, &last) && distance(&average, &first) < distance(&first, &last)
    );
}
