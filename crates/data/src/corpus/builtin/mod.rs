//! Our own corpus, generated: English and Chinese prose, code, arithmetic and puzzles with worked steps.
//!
//! It exists so that a first run needs no download and so that its text holds something learnable at every size of
//! model: spelling, grammar, names that stay the same through a story, sums that come out right. It is not natural
//! text: its facts are few and its stories mean little. By bytes it is about half prose, a sixth code and the rest
//! worked problems; the default size compresses about 5:1 with `xz -9`.
//!
//! Document i is a function of (seed, i): longer corpora begin with the shorter ones.

mod arithmetic;
mod code;
mod drill;
mod grammar;
mod logic;
mod prose;

pub use drill::{Problem, problems};
use grammar::{Dice, Scene};

/// Size of the default corpus.
pub const DEFAULT_BYTES: usize = 3_000_000;

/// Generated documents until they have at least `bytes` bytes together (one document if `bytes` is 0).
pub fn documents(seed: u64, bytes: usize) -> Vec<String> {
    let mut total = 0;
    let mut documents = Vec::new();
    while total < bytes || documents.is_empty() {
        let (document, _) = document(seed, documents.len() as u64);
        total += document.len();
        documents.push(document);
    }
    documents
}

/// What document `index` is: "English", "Chinese", "code", "arithmetic" or "puzzles".
pub fn kind(seed: u64, index: u64) -> &'static str {
    Part::draw(&mut Dice::new(seed, index)).kind()
}

/// Document number `index`, and what it was made with.
fn document(seed: u64, index: u64) -> (String, Scene) {
    let mut scene = Scene::new(Dice::new(seed, index));
    let text = match Part::draw(&mut scene.dice) {
        Part::English => prose::english(&mut scene),
        Part::Chinese => prose::chinese(&mut scene),
        Part::Module => code::module(&mut scene),
        Part::Trace => code::trace(&mut scene),
        Part::Drill => drill::document(&mut scene),
        Part::Arithmetic => arithmetic::document(&mut scene),
        Part::Logic => logic::document(&mut scene),
    };
    (text, scene)
}

/// What writes a document.
#[derive(Clone, Copy)]
enum Part {
    English,
    Chinese,
    Module,
    Trace,
    Drill,
    Arithmetic,
    Logic,
}

impl Part {
    /// The first draw of a document.
    fn draw(dice: &mut Dice) -> Self {
        match dice.below(100) {
            0..19 => Self::English,
            19..32 => Self::Chinese,
            32..39 => Self::Module,
            39..48 => Self::Trace,
            48..76 => Self::Drill,
            76..84 => Self::Arithmetic,
            _ => Self::Logic,
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::English => "English",
            Self::Chinese => "Chinese",
            Self::Module | Self::Trace => "code",
            Self::Drill | Self::Arithmetic => "arithmetic",
            Self::Logic => "puzzles",
        }
    }
}

/// Beginnings of documents that no corpus holds, to be continued by a model: what it is ("English", "Chinese", "code"),
/// and the first lines or sentences. Two of each.
pub fn openings(seed: u64) -> Vec<(&'static str, String)> {
    let mut openings = Vec::new();
    for (stream, name) in (0..).zip(["English", "English", "Chinese", "Chinese", "code", "code"]) {
        // Apart from the numbers of documents and of problems.
        let mut scene = Scene::new(Dice::new(seed, stream | 3 << 62));
        let text = match name {
            "English" => prose::english(&mut scene),
            "Chinese" => prose::chinese(&mut scene),
            _ => code::module(&mut scene),
        };
        openings.push((name, beginning(&text)));
    }
    openings
}

/// Two lines of code or about two sentences.
fn beginning(text: &str) -> String {
    let ends: Vec<usize> = text.match_indices(['.', '。', '\n']).map(|(at, mark)| at + mark.len()).collect();
    let end = ends.into_iter().find(|&end| end >= 60).unwrap_or(text.len());
    text[..end].to_owned()
}

/// The two languages of worked problems; section names begin with the prefix.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Language {
    English,
    Chinese,
}

impl Language {
    fn draw(dice: &mut Dice) -> Self {
        if dice.chance(60) { Self::English } else { Self::Chinese }
    }

    fn section(self, name: &str) -> String {
        match self {
            Self::English => format!("en_{name}"),
            Self::Chinese => format!("zh_{name}"),
        }
    }

    /// `english` or `chinese`.
    fn of<T>(self, english: T, chinese: T) -> T {
        match self {
            Self::English => english,
            Self::Chinese => chinese,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use super::*;

    const SAMPLE: u64 = 4000;

    #[test]
    fn a_document_depends_on_seed_and_number_alone() {
        let short = documents(1, 20_000);
        let long = documents(1, 60_000);
        assert_eq!(short, long[..short.len()]);
        assert_ne!(short[0], documents(2, 1)[0]);
        assert!(long.iter().map(String::len).sum::<usize>() >= 60_000);
        assert_eq!(documents(1, 0).len(), 1);
    }

    #[test]
    fn documents_differ_and_are_clean() {
        let all: Vec<String> = (0..SAMPLE).map(|i| document(4, i).0).collect();
        // Two short documents may coincide, such as two three-line functions.
        let different = all.iter().collect::<BTreeSet<_>>().len();
        assert!(different * 1000 >= all.len() * 995, "{different} of {}", all.len());
        for document in &all {
            assert!((20..6000).contains(&document.len()), "{document}");
            assert!(!document.contains('$') && !document.contains("a(n) "), "{document}");
            assert_eq!(document.trim(), document);
        }
    }

    /// No template makes more than 1 % of the lines.
    #[test]
    fn no_template_dominates() {
        let mut lines: HashMap<(&str, usize), usize> = HashMap::new();
        for i in 0..SAMPLE {
            for u in document(9, i).1.uses {
                *lines.entry((u.section, u.entry)).or_default() += u.lines;
            }
        }
        let total: usize = lines.values().sum();
        let (worst, &most) = lines.iter().max_by_key(|(_, n)| **n).unwrap();
        assert!(most * 100 <= total, "{worst:?}: {most} of {total}");
        assert!(lines.len() > 600, "{}", lines.len());
    }

    /// The same seen from outside: of the lines, numbers aside, none is more than 1 %. Lines without a letter (braces,
    /// sums written out) are form, not template.
    #[test]
    fn no_line_dominates() {
        let mut lines: HashMap<String, usize> = HashMap::new();
        let mut total = 0;
        for i in 0..SAMPLE {
            for line in document(9, i).0.lines().filter(|line| line.chars().any(char::is_alphabetic)) {
                let line = line.trim().replace(|c: char| c.is_ascii_digit(), "0");
                *lines.entry(line).or_default() += 1;
                total += 1;
            }
        }
        let (worst, &most) = lines.iter().max_by_key(|(_, n)| **n).unwrap();
        assert!(most * 100 <= total, "{worst:?}: {most} of {total}");
    }
}
