//! Text files as documents. A file is cut at blank lines into documents of about 4 KiB, so that the split into
//! training and validation has something to split; where it is cut depends on its content alone.

use std::path::Path;

use crate::DataError;

/// A document ends at the first blank line after this many bytes.
const TARGET: usize = 4 << 10;
/// Text without blank lines is cut at the first line end after this many bytes.
const LIMIT: usize = 16 << 10;
/// What is left at the end of a file is a document of its own from this many bytes on, else part of the one before.
const LEAST: usize = 1 << 10;

/// The documents of `paths` in order: UTF-8 text files (a byte order mark is dropped), each at least one document.
pub fn read_text<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<String>, DataError> {
    let mut documents = Vec::new();
    for path in paths {
        documents.extend(cut(&read_file(path.as_ref())?).into_iter().map(str::to_owned));
    }
    if documents.is_empty() {
        return Err(DataError::EmptyCorpus);
    }
    Ok(documents)
}

fn read_file(path: &Path) -> Result<String, DataError> {
    let kind = std::fs::metadata(path).map_err(DataError::read(path))?;
    if !kind.is_file() {
        let found = if kind.is_dir() { "a directory" } else { "something else" };
        return Err(DataError::NotAFile { path: path.to_owned(), found });
    }
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        DataError::NotUtf8 { path: path.to_owned(), offset, byte: e.as_bytes()[offset] }
    })?;
    if text.trim_start_matches('\u{feff}').trim().is_empty() {
        return Err(DataError::EmptyFile { path: path.to_owned(), bytes: text.len() });
    }
    Ok(text)
}

/// Documents of one file: without the white space after their last line and the blank lines before their first.
fn cut(text: &str) -> Vec<&str> {
    let text = text.trim_start_matches('\u{feff}');
    let mut starts = vec![0];
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        at += line.len();
        let size = at - start;
        if (size >= TARGET && line.trim().is_empty()) || size >= LIMIT {
            starts.push(at);
            start = at;
        }
    }
    if starts.len() > 1 && text[start..].trim().len() < LEAST {
        starts.pop();
    }
    let ends = starts[1..].iter().copied().chain([text.len()]);
    let pieces = starts.iter().zip(ends).map(|(&a, b)| strip_blank_lines(&text[a..b]));
    pieces.filter(|piece| !piece.is_empty()).collect()
}

fn strip_blank_lines(mut text: &str) -> &str {
    while let Some((line, rest)) = text.split_once('\n')
        && line.trim().is_empty()
    {
        text = rest;
    }
    text.trim_end()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn paragraphs(count: usize) -> String {
        (0..count).map(|i| format!("    paragraph {i}\nwith {}\n\n", "words ".repeat(i % 90))).collect()
    }

    #[test]
    fn long_files_are_cut_at_blank_lines() {
        let text = paragraphs(200);
        let documents = cut(&text);
        assert!(documents.len() > 8);
        for document in &documents {
            assert!((LEAST..2 * TARGET).contains(&document.len()), "{}", document.len());
            assert!(document.starts_with("    paragraph"));
        }
        // Nothing but white space at the cuts is lost.
        let words = |s: &str| s.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&documents.join("\n")), words(&text));
    }

    #[test]
    fn files_keep_their_order_and_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (file(&dir, "a", paragraphs(90).as_bytes()), file(&dir, "b", b"\xef\xbb\xbf\nshort\n\nfile\n"));
        let both = read_text(&[&b, &a, &b]).unwrap();
        let long = read_text(&[&a]).unwrap();
        assert_eq!(both[0], "short\n\nfile");
        assert_eq!(both[1..both.len() - 1], long);
        assert_eq!(both[both.len() - 1], both[0]);
    }

    #[test]
    fn text_without_blank_lines_is_cut_at_line_ends() {
        let text = "a line of text\n".repeat(4000);
        let documents = cut(&text);
        assert_eq!(documents.len(), 60_000usize.div_ceil(LIMIT));
        assert!(documents.iter().all(|d| d.starts_with("a line") && d.ends_with("text")));
        let one_line = "x".repeat(50_000);
        assert_eq!(cut(&one_line), [one_line.as_str()]);
    }

    #[test]
    fn errors_name_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| read_text(&[path]).unwrap_err().to_string();
        let bad = error(&file(&dir, "bad.txt", b"ok \xe4\xbd\xff rest"));
        assert!(bad.contains("bad.txt: expected UTF-8") && bad.contains("0xe4 at byte offset 3"), "{bad}");
        assert!(error(&dir.path().join("none.txt")).contains("none.txt: cannot be read"));
        assert!(error(dir.path()).contains("expected a regular text file, found a directory"));
        let empty = error(&file(&dir, "empty.txt", b" \n\n"));
        assert!(empty.contains("empty.txt: expected text, found 3 bytes"), "{empty}");
        assert!(matches!(read_text::<&Path>(&[]), Err(DataError::EmptyCorpus)));
    }
}
