//! Runs the binary on a tiny model and a text that the tests write themselves.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// Every part of V3 at its smallest: a dense and a MoE layer, query latents, groups, a shared expert, MTP.
pub const MODEL: &str = r#"
[model]
family = "v3"
vocab_size = 320
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
n_group = 2
topk_group = 1
norm_topk_prob = true
routed_scaling_factor = 2.5
rms_norm_eps = 1e-6
initializer_range = 0.02
max_position_embeddings = 64
num_nextn_predict_layers = 1

[model.rope]
theta = 10000.0
"#;

/// A few steps of it.
pub const TRAIN: &str = "
[train]
steps = 3
batch = 4
seq = 32
eval_tokens = 128
";

/// What a run of the binary gave.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The lines of stdout, each a JSON object.
    pub fn objects(&self) -> Vec<Value> {
        let object = |line: &str| {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert!(value.is_object(), "{line}");
            value
        };
        self.stdout.lines().map(object).collect()
    }
}

/// Runs `hadal` with these arguments.
pub fn hadal<S: AsRef<str>>(args: &[S]) -> Ran {
    let out = Command::new(env!("CARGO_BIN_EXE_hadal")).args(args.iter().map(AsRef::as_ref)).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

/// What is said of more threads than this machine has cores.
fn notice(args: &[String]) -> Option<String> {
    let cores = std::thread::available_parallelism().unwrap().get();
    let at = args.iter().position(|a| a == "--threads")?;
    let threads: usize = args[at + 1].parse().unwrap();
    (threads > cores)
        .then(|| format!("--threads {threads}: more than the {cores} cores of this machine, which they share"))
}

/// As [`hadal`], which must succeed without a word on stderr but that there are too many threads.
pub fn succeeds<S: AsRef<str>>(args: &[S]) -> Ran {
    let ran = hadal(args);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let noise: Vec<&str> = ran.stderr.lines().filter(|l| !l.starts_with('[')).collect();
    let args: Vec<String> = args.iter().map(|a| a.as_ref().to_string()).collect();
    assert_eq!(noise, notice(&args).iter().collect::<Vec<_>>());
    ran
}

/// Must be refused: exit code 1 and one line on stderr that has all `parts`; the same with --json, and there an object
/// with the error ends stdout.
pub fn refused<S: AsRef<str>>(args: &[S], parts: &[&str]) {
    let mut args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let check = |ran: &Ran| {
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        let line = ran.stderr.trim_end().strip_prefix("error: ").unwrap_or_else(|| panic!("{}", ran.stderr));
        for part in parts {
            assert!(line.contains(part), "{part:?} is not in {line:?}");
        }
        line.to_string()
    };
    let plain = check(&hadal(&args));
    args.push("--json");
    let ran = hadal(&args);
    assert_eq!(check(&ran), plain);
    let last = ran.objects().pop().expect("an object on stdout");
    assert_eq!(last, serde_json::json!({ "error": plain }));
}

/// About 24 KB of text that repeats itself as text does, in paragraphs.
pub fn text() -> String {
    let nouns = ["river", "lamp", "engine", "garden", "letter", "cloud", "table", "song"];
    let verbs = ["carries", "follows", "answers", "covers", "finds", "keeps", "turns"];
    let sentence = |i: usize| {
        let (a, b) = (nouns[i * 7 % 8], nouns[(i * 5 + i / 8) % 8]);
        format!("The {a} {} the {b} at {}. ", verbs[i * 3 % 7], i * 37 % 100)
    };
    let paragraph = |p: usize| (0..5).map(|i| sentence(p * 5 + i)).collect::<String>() + "\n\n";
    (0..130).map(paragraph).collect()
}

/// A directory with `text.txt` and `run.toml`.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        place.write("text.txt", text());
        place.write("run.toml", format!("{MODEL}{TRAIN}"));
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path as an argument.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).unwrap();
    }

    /// Arguments of a run of `run.toml` on `text.txt` into `out`, and then `more`.
    pub fn pretrain(&self, out: &str, more: &[&str]) -> Vec<String> {
        let (config, data, out) = (self.arg("run.toml"), self.arg("text.txt"), self.arg(out));
        let fixed = ["pretrain", "--config", &config, "--data", &data, "--out", &out];
        fixed.iter().chain(more).map(|s| s.to_string()).collect()
    }

    /// A run with these options must be refused and leave nothing at `out`.
    pub fn pretrain_refused(&self, more: &[&str], parts: &[&str]) {
        refused(&self.pretrain("out", more), parts);
        assert!(!self.path("out").exists(), "something was left: {parts:?}");
    }

    /// Copies the shared model to `name`, for a test to damage.
    pub fn copy_model(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(trained().join("step-000003")).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
        to
    }
}

/// The run directory of one fp32 run that several tests read.
pub fn trained() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trained");
        if out.exists() {
            std::fs::remove_dir_all(&out).unwrap();
        }
        let place = Place::new();
        let mut args = place.pretrain("", &["--dtype", "fp32"]);
        let at = args.iter().position(|a| a == "--out").unwrap() + 1;
        args[at] = out.to_str().unwrap().to_string();
        succeeds(&args);
        out
    })
}

/// Lines of metrics.jsonl.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Metrics without what a clock says.
pub fn timeless(run: &Path) -> Vec<Value> {
    let mut lines = metrics(run);
    for line in &mut lines {
        let map = line.as_object_mut().unwrap();
        assert!(map.remove("seconds").is_some() && map.remove("tokens_per_s").is_some());
    }
    lines
}

/// A number of a JSON object.
pub fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("{key} in {object}"))
}
