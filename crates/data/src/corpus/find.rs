//! From paths to files: what a folder holds, what a glob matches, what is left out. The order depends on names alone.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ignore::WalkBuilder;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::Files;
use crate::DataError;

/// A folder's own list of what is no text, in the syntax of a .gitignore.
const IGNORE_FILE: &str = ".hadalignore";

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub path: PathBuf,
    /// Named by the user rather than found in a folder: then it has to be text.
    pub named: bool,
}

/// The files that `files.paths` stand for, in the order of the paths and within a folder by name. A file found twice is
/// taken once.
pub(super) fn find(files: &Files) -> Result<Vec<Found>, DataError> {
    let mut found = Vec::new();
    let mut walked = false;
    for path in &files.paths {
        let pattern = path.to_string_lossy();
        if path.is_dir() {
            walked = true;
            walk(path, None, &files.ignore, &mut found)?;
        } else if !path.exists() && pattern.contains(['*', '?', '[', '{']) {
            walked = true;
            let before = found.len();
            let (base, rest) = base(path);
            walk(&base, Some(&rest), &files.ignore, &mut found)?;
            if found.len() == before {
                return Err(DataError::NoMatch { pattern: path.clone() });
            }
        } else {
            named(path)?;
            found.push(Found { path: path.clone(), named: true });
        }
    }
    if !walked && !files.ignore.is_empty() {
        return Err(DataError::NoEffect { key: "ignore", why: "it is for folders and globs, and there is none" });
    }
    let mut seen = HashSet::new();
    found.retain(|f| seen.insert(f.path.clone()));
    Ok(found)
}

/// What the user names must be a file.
fn named(path: &Path) -> Result<(), DataError> {
    let kind = std::fs::metadata(path).map_err(DataError::read(path))?;
    if kind.is_file() { Ok(()) } else { Err(DataError::NotAFile { path: path.to_owned() }) }
}

/// The folder that a glob begins in, and the glob from there on.
fn base(pattern: &Path) -> (PathBuf, String) {
    let (mut base, mut rest) = (PathBuf::new(), String::new());
    for part in pattern.components() {
        let name = part.as_os_str().to_string_lossy();
        if rest.is_empty() && !name.contains(['*', '?', '[', '{']) {
            base.push(part);
        } else {
            rest += "/";
            rest += &name;
        }
    }
    if base.as_os_str().is_empty() {
        base.push(".");
    }
    (base, rest)
}

fn walk(root: &Path, glob: Option<&str>, ignore: &[String], found: &mut Vec<Found>) -> Result<(), DataError> {
    let ignored = rules(root, ignore.iter().map(String::as_str))?;
    let wanted = glob.map(|glob| rules(root, [glob])).transpose()?;
    // Without `**` a glob is as deep as it has parts.
    let depth = glob.filter(|g| !g.contains("**")).map(|g| g.matches('/').count());
    let mut walk = WalkBuilder::new(root);
    walk.standard_filters(false).hidden(true).git_ignore(true).require_git(false);
    walk.add_custom_ignore_filename(IGNORE_FILE).follow_links(true).max_depth(depth);
    walk.sort_by_file_name(Ord::cmp);
    walk.filter_entry(move |e| e.depth() == 0 || !ignored.matched(e.path(), is_dir(e)).is_ignore());
    for entry in walk.build() {
        let entry = entry.map_err(|e| DataError::Walk { path: root.to_owned(), why: e.to_string() })?;
        let path = entry.path();
        let file = entry.file_type().is_some_and(|t| t.is_file());
        if file && wanted.as_ref().is_none_or(|w| w.matched(path, false).is_ignore()) {
            let path = path.strip_prefix("./").unwrap_or(path).to_owned();
            found.push(Found { path, named: false });
        }
    }
    Ok(())
}

fn is_dir(entry: &ignore::DirEntry) -> bool {
    entry.file_type().is_some_and(|t| t.is_dir())
}

/// Lines of a .gitignore at `root`.
fn rules<'a>(root: &Path, lines: impl IntoIterator<Item = &'a str>) -> Result<Gitignore, DataError> {
    let mut builder = GitignoreBuilder::new(root);
    for line in lines {
        let bad = |e: ignore::Error| DataError::Pattern { pattern: line.to_owned(), why: e.to_string() };
        builder.add_line(None, line).map_err(bad)?;
    }
    builder.build().map_err(|e| DataError::Walk { path: root.to_owned(), why: e.to_string() })
}
