//! Where a text is cut into documents: at blank lines, into about 4 KiB, so that the split into training and validation
//! has something to split. It depends on the text alone.

/// A document ends at the first blank line after this many bytes.
const TARGET: usize = 4 << 10;
/// Text without blank lines is cut at the first line end after this many bytes.
const LIMIT: usize = 16 << 10;
/// What is left at the end of a file is a document of its own from this many bytes on, else part of the one before.
const LEAST: usize = 1 << 10;

/// Takes a text line by line and gives documents; the last one waits for the end of the text.
#[derive(Default)]
pub(super) struct Cutter {
    before: Option<Piece>,
    current: Piece,
}

/// A document, with the white space around it.
#[derive(Default)]
pub(super) struct Piece {
    text: String,
    bytes: usize,
    /// A line of it could not be read.
    pub spoilt: bool,
}

impl Cutter {
    /// Adds a line of `bytes` bytes (None: one that cannot be read) and gives what it finishes.
    pub fn line(&mut self, line: Option<&str>, bytes: usize) -> Option<Piece> {
        let piece = &mut self.current;
        piece.text += line.unwrap_or_default();
        piece.spoilt |= line.is_none();
        piece.bytes += bytes;
        let blank = line.is_some_and(|line| line.trim().is_empty());
        if (piece.bytes >= TARGET && blank) || piece.bytes >= LIMIT {
            return self.before.replace(std::mem::take(&mut self.current));
        }
        None
    }

    /// What is left at the end of the text.
    pub fn finish(self) -> impl Iterator<Item = Piece> {
        let (before, last) = match (self.before, self.current) {
            (Some(mut before), tail) if tail.text.trim().len() < LEAST => {
                before.text += &tail.text;
                before.spoilt |= tail.spoilt;
                (None, before)
            }
            both => both,
        };
        before.into_iter().chain([last])
    }
}

impl Piece {
    /// The document: without the white space after its last line and the blank lines before its first.
    pub fn text(&self) -> &str {
        let mut text = self.text.as_str();
        while let Some((line, rest)) = text.split_once('\n')
            && line.trim().is_empty()
        {
            text = rest;
        }
        text.trim_end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<String> {
        let mut cutter = Cutter::default();
        let mut pieces: Vec<Piece> =
            text.split_inclusive('\n').filter_map(|line| cutter.line(Some(line), line.len())).collect();
        pieces.extend(cutter.finish());
        pieces.iter().map(|p| p.text().to_owned()).filter(|t| !t.is_empty()).collect()
    }

    fn paragraphs(count: usize) -> String {
        (0..count).map(|i| format!("    paragraph {i}\nwith {}\n\n", "words ".repeat(i % 90))).collect()
    }

    #[test]
    fn long_texts_are_cut_at_blank_lines() {
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
    fn short_texts_and_tails_are_not_cut() {
        assert_eq!(cut("\n \nshort\n\ntext\n\n"), ["short\n\ntext"]);
        let long = "word ".repeat(1000) + "\n\n";
        assert_eq!(cut(&format!("{long}tail\n")), [format!("{long}tail")]);
        assert_eq!(cut(&long.repeat(2)).len(), 2);
        assert!(cut("").is_empty());
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
}
