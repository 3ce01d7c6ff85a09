//! Tells the binary which commit it is built from. Without git, or in a copy of the sources that is no clone, it is
//! "unknown".

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."));
    let sources = sources(root);
    for path in sources.iter().chain(&moves(root)).filter(|p| p.exists()) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    println!("cargo::rustc-env=HADAL_COMMIT={}", commit(root, &sources).unwrap_or("unknown".into()));
}

/// What goes into the binary.
fn sources(root: &Path) -> Vec<PathBuf> {
    let crates = std::fs::read_dir(root.join("crates")).into_iter().flatten().flatten().map(|entry| entry.path());
    let of = |path: PathBuf| ["src", "Cargo.toml", "build.rs"].map(|name| path.join(name));
    let mut all: Vec<PathBuf> = crates.flat_map(of).chain([root.join("Cargo.toml"), root.join("Cargo.lock")]).collect();
    all.retain(|path| path.exists());
    all.sort();
    all
}

/// What changes when another commit is checked out or made: the log of HEAD also when its branch is packed.
fn moves(root: &Path) -> Vec<PathBuf> {
    let branch = git(root, &["symbolic-ref", "--quiet", "HEAD"]);
    let names = ["HEAD", "logs/HEAD", "packed-refs"].map(String::from).into_iter().chain(branch);
    let path = |name: String| git(root, &["rev-parse", "--git-path", &name]).map(|path| root.join(path));
    names.filter_map(path).collect()
}

/// The commit, marked if the sources differ from it.
fn commit(root: &Path, sources: &[PathBuf]) -> Option<String> {
    let top = PathBuf::from(git(root, &["rev-parse", "--show-toplevel"])?);
    // Sources unpacked inside somebody's repository are not of its commit.
    if top.canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    let commit = git(root, &["rev-parse", "--short=12", "HEAD"])?;
    let sources: Vec<&str> = sources.iter().filter_map(|path| path.to_str()).collect();
    let changed = git(root, &[&["status", "--porcelain", "--"], &sources[..]].concat())?;
    Some(if changed.is_empty() { commit } else { format!("{commit}-dirty") })
}

fn git(root: &Path, args: &[&str]) -> Option<String> {
    // No lock is taken: another git may be at work.
    let out = Command::new("git").arg("-C").arg(root).arg("--no-optional-locks").args(args).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
}
