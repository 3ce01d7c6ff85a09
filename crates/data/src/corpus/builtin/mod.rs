//! Our own corpus, generated: English and Chinese prose, code, arithmetic and puzzles with worked steps.
//!
//! It exists so that a first run needs no download and so that its text holds something learnable at every size of
//! model: spelling, grammar, names that stay the same through a story, sums that come out right. It is not natural
//! text: its facts are few and its stories mean little. By bytes it is about half prose, a fifth code and the rest
//! worked problems; the default size compresses about 4.8:1 with `xz -9`.
//!
//! Document i is a function of (seed, i): longer corpora begin with the shorter ones.

mod arithmetic;
mod code;
mod drill;
mod grammar;
mod logic;
mod prose;
mod story;
#[cfg(test)]
mod tests;

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
            0..18 => Self::English,
            18..31 => Self::Chinese,
            31..41 => Self::Module,
            41..54 => Self::Trace,
            54..77 => Self::Drill,
            77..92 => Self::Arithmetic,
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
