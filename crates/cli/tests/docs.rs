//! The documents name files that exist: a path in backticks or a relative link that leads nowhere fails, as does a test
//! command that the README and CI do not share.

use std::path::{Path, PathBuf};

/// Ends of names that can only be files of the repository; `config.json` and the like belong to checkpoints.
const ENDS: [&str; 5] = [".rs", ".md", ".py", ".toml", ".sh"];
/// The file of that kind that belongs to runs.
const OF_RUNS: &str = "run.toml";
/// Folders of the repository: what begins with one is a path in it, whatever its end.
const FOLDERS: [&str; 6] = ["crates/", "goldens/", "docs/", "dev/", "runs/", ".ci/"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every file below `dir`, relative to the root and with forward slashes.
fn files(dir: &Path, prefix: &str, out: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            files(&entry.path(), &format!("{name}/"), out);
        } else {
            out.push(name);
        }
    }
}

fn documents() -> Vec<PathBuf> {
    let top = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "goldens/README.md", "fuzz/README.md"];
    let mut all: Vec<PathBuf> = top.iter().map(|name| root().join(name)).collect();
    for folder in ["docs", "docs/kernels"] {
        let docs = std::fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap().path());
        all.extend(docs.filter(|p| p.extension().is_some_and(|e| e == "md")));
    }
    all
}

/// The text between backticks outside code blocks.
fn quoted(text: &str) -> Vec<&str> {
    let mut block = false;
    let mut out = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            block = !block;
        } else if !block {
            out.extend(line.split('`').skip(1).step_by(2));
        }
    }
    out
}

/// Targets of `[..](..)` that are files, without what follows `#`.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    let paths = targets.filter_map(|(target, _)| target.split('#').next());
    paths.filter(|t| !t.is_empty() && !t.contains("://")).collect()
}

/// What a quotation says about the repository: the path, up to its first placeholder.
fn path_of(quotation: &str) -> Option<&str> {
    let path = quotation.split(['*', '<', '{']).next().unwrap_or_default();
    let whole = path.len() == quotation.len();
    let path = if whole { path } else { &path[..=path.rfind('/')?] };
    let named = path.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let ours = FOLDERS.iter().any(|f| path.starts_with(f))
        || (whole && !path.ends_with(OF_RUNS) && ENDS.iter().any(|e| path.ends_with(e)));
    // `.rs` alone is an end, not a file.
    (named && ours && path.len() > 4).then_some(path)
}

/// True if there is such a path from the root, or a file whose path ends with it (`params.rs`, `stages/mlp.rs`).
fn exists(path: &str, files: &[String]) -> bool {
    let from_root = FOLDERS.iter().any(|f| path.starts_with(f));
    root().join(path).exists() || (!from_root && files.iter().any(|f| f.ends_with(&format!("/{path}"))))
}

#[test]
fn named_paths_exist() {
    let mut all = Vec::new();
    for folder in FOLDERS {
        files(&root().join(folder), folder, &mut all);
    }
    let (mut checked, mut missing) = (0, Vec::new());
    for document in documents() {
        let text = read(&document);
        let name = document.strip_prefix(root()).unwrap().display().to_string();
        for path in quoted(&text).into_iter().filter_map(path_of) {
            checked += 1;
            if !exists(path, &all) {
                missing.push(format!("{name}: `{path}`"));
            }
        }
        for link in links(&text) {
            checked += 1;
            if !document.parent().unwrap().join(link).exists() {
                missing.push(format!("{name}: link to {link}"));
            }
        }
    }
    assert!(missing.is_empty(), "documents name what is not there:\n{}", missing.join("\n"));
    assert!(checked > 50, "{checked} paths found: has the documents' form changed?");
}

#[test]
fn paths_are_told_from_other_quotations() {
    for (quotation, path) in [
        ("crates/model/src/params.rs", Some("crates/model/src/params.rs")),
        ("crates/kernels/src/ops/<op>/mod.rs", Some("crates/kernels/src/ops/")),
        ("crates/*/src", Some("crates/")),
        ("stages/mlp.rs", Some("stages/mlp.rs")),
        ("docs/", Some("docs/")),
        ("cargo test --workspace", None),
        ("first-run/latest", None),
        ("step-NNNNNN/config.json", None),
        ("<case>/golden.safetensors", None),
        (".rs", None),
        ("DIR/run.toml", None),
    ] {
        assert_eq!(path_of(quotation), path, "{quotation}");
    }
    assert_eq!(quoted("a `b` c\n```\n`d`\n```\n`e`"), ["b", "e"]);
    assert_eq!(links("[a](b.md#c) [d](https://e.f) [g](#h)"), ["b.md"]);
}

#[test]
fn ci_runs_the_test_command_of_the_readme() {
    let command = "cargo test --workspace";
    let readme = read(&root().join("README.md"));
    assert!(readme.lines().any(|l| l.trim() == command), "README.md: no line \"{command}\"");
    let ci = read(&root().join(".ci/run"));
    let run = format!("step {command} 2>&1 | tee \"$log\"");
    assert!(ci.lines().any(|l| l == run), ".ci/run: no line \"{run}\"");
}
