//! The bundle for GPU machines.

use crate::root;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What runs all of it.
pub const SCRIPT: &str = "run.sh";
/// Most bytes of a bundle: it travels.
const LIMIT: u64 = 40 << 20;
/// Test binaries: the package, what selects the binary, its name in the bundle.
const TESTS: &[(&str, &[&str], &str)] = &[
    ("hadal-kernels", &["--lib"], "kernels"),
    ("hadal-engine", &["--lib"], "engine"),
    ("hadal-train", &["--test", "parity"], "train"),
];

/// Builds and collects, in a new folder that replaces an old bundle.
pub fn make(folder: &Path) -> Result<()> {
    if folder.exists() && !folder.join(SCRIPT).is_file() {
        bail!("{}: expected a bundle or nothing, found something else", folder.display());
    }
    let _ = std::fs::remove_dir_all(folder);
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).with_context(|| bin.display().to_string())?;
    // No relocations, and equal functions once: Rust's own linker can do that, which it uses on this platform alone.
    let smaller: &[&str] = if cfg!(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")) {
        &["--", "-C", "relocation-model=static", "-C", "link-arg=-Wl,--icf=all"]
    } else {
        &[]
    };
    for (package, select, name) in TESTS {
        let build = [&["rustc", "--profile", "test", "--package", package], *select, smaller].concat();
        strip(&executable(&build)?, &bin.join(name))?;
    }
    let build = [&["rustc", "--release", "--package", "hadal", "--bin", "hadal"], smaller].concat();
    strip(&executable(&build)?, &bin.join("hadal"))?;
    copy_goldens(&folder.join("goldens"))?;
    let script = folder.join(SCRIPT);
    std::fs::write(&script, include_str!("run.sh").replace("@COMMIT@", &commit()?))?;
    executable_bit(&script)?;
    let bytes = size(folder)?;
    if bytes > LIMIT {
        bail!("{}: {bytes} bytes, expected at most {LIMIT}", folder.display());
    }
    println!("{}: {:.1} MiB; on the GPU machine run {SCRIPT}", folder.display(), bytes as f64 / f64::from(1 << 20));
    Ok(())
}

/// Runs cargo and finds the one executable that it made.
fn executable(args: &[&str]) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(cargo)
        .current_dir(root())
        .args(&args[..1])
        .arg("--message-format=json-render-diagnostics")
        .args(&args[1..])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !out.status.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    let text = String::from_utf8(out.stdout)?;
    let made = |line: &str| -> Option<PathBuf> {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(message["executable"].as_str()?.into())
    };
    let mut found: Vec<PathBuf> = text.lines().filter_map(made).collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => bail!("cargo {}: expected one executable", args.join(" ")),
    }
}

/// A copy without symbols, which are most of a binary.
fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status().context("strip (of binutils)")?;
    if !status.success() {
        bail!("strip {} failed", from.display());
    }
    Ok(())
}

fn copy_goldens(to: &Path) -> Result<()> {
    let from = root().join("goldens");
    for entry in files(&from)? {
        let name = entry.strip_prefix(&from)?;
        if name.extension().is_some_and(|e| e == "safetensors" || e == "json") {
            let copy = to.join(name);
            std::fs::create_dir_all(copy.parent().context("a file lies in a folder")?)?;
            std::fs::copy(&entry, copy)?;
        }
    }
    Ok(())
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

fn size(dir: &Path) -> Result<u64> {
    files(dir)?.iter().map(|f| Ok(f.metadata()?.len())).sum()
}

fn commit() -> Result<String> {
    let out = Command::new("git").current_dir(root()).args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    Ok(out
        .ok()
        .filter(|o| o.status.success())
        .map_or("unknown".into(), |o| String::from_utf8_lossy(&o.stdout).trim().to_string()))
}

fn executable_bit(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    let _ = path;
    Ok(())
}
