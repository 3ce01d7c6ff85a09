//! The core of the arithmetic: one steady way to work each kind of problem, in steps so small that a small model can
//! learn to solve problems it has not seen.
//!
//! A problem is a question on one line and the working on the next, which ends in the answer:
//!
//! ```text
//! What is left in the end? Mira has 4, finds 3, buys 5, sells 6.
//! 4+3=7+5=12-6=6
//! 9 - 4 ; + 8 ; + 2
//! 9-4=5+8=13+2=15
//! ```
//!
//! The working runs on as on a pocket calculator. Wording, if any, comes before the numbers, never after them, and a number
//! takes as many tokens in the question as its step takes in the working (a verb, a space, the number, a comma; a sign,
//! a space, the number, a semicolon; a sign, the number, `=`, the total). So what a step needs from the question is
//! always as far back, which a single head of attention can learn, and the rest are facts of small tables.
//!
//! One problem in eight, chosen by its numbers alone, is kept out of every corpus: [`problems`] draws from those.

use std::fmt::Write;
use std::sync::LazyLock;

use super::Language;
use super::grammar::{Dice, Grammar, Scene};

static DRILL: LazyLock<Grammar> = LazyLock::new(|| Grammar::parse(include_str!("drill.txt")));

/// A worked problem that is in no corpus, in the corpus's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// "running sum", "word problem", "product and sum" or "equation".
    pub kind: &'static str,
    /// "en" or "zh".
    pub language: &'static str,
    /// Everything up to where the working begins; it ends with a line break.
    pub prompt: String,
    /// The final answer as one would write it: `132`.
    pub answer: String,
}

impl Problem {
    /// The final answer in a model's continuation of the prompt: what follows the last `=` of its first line. A line
    /// that did not end gives none.
    pub fn answer_of(continuation: &str) -> Option<&str> {
        let (line, _) = continuation.trim_start().split_once('\n')?;
        line.rsplit_once('=').map(|(_, answer)| answer.trim())
    }

    /// Whether `continuation` arrives at the answer.
    pub fn solved_by(&self, continuation: &str) -> bool {
        Self::answer_of(continuation).is_some_and(|found| found == self.answer)
    }
}

/// `count` problems that no corpus of any seed or size holds, the kinds and languages in turn.
pub fn problems(seed: u64, count: usize) -> Vec<Problem> {
    (0..count as u64)
        .map(|i| {
            // Documents are numbered from 0; no corpus reaches the upper half of the numbers.
            let mut scene = Scene::new(Dice::new(seed, i | 1 << 63));
            let kind = Kind::ALL[i as usize % Kind::ALL.len()];
            let turn = i as usize / Kind::ALL.len();
            let language = if turn.is_multiple_of(2) { Language::English } else { Language::Chinese };
            let worked = draw(kind, language, true, &mut scene);
            Problem {
                kind: kind.name(),
                language: language.of("en", "zh"),
                prompt: worked.prompt,
                answer: worked.answer,
            }
        })
        .collect()
}

/// A few problems of one language.
pub(super) fn document(scene: &mut Scene) -> String {
    let language = Language::draw(&mut scene.dice);
    let mut text = String::new();
    for _ in 0..scene.dice.range(5, 9) {
        let share = scene.dice.below(100);
        let kind = Kind::ALL[SHARES.partition_point(|&up_to| up_to <= share)];
        let worked = draw(kind, language, false, scene);
        text.push_str(&worked.prompt);
        text.push_str(&worked.working);
    }
    text.truncate(text.trim_end().len());
    text
}

/// Numbers added to or taken from the first in a running sum, fewest and most.
const TERMS: [i64; 2] = [3, 4];
/// What a running sum stays within.
const MOST: i64 = 18;

/// Hundredths of the problems of a corpus up to each kind.
const SHARES: [usize; 4] = [42, 79, 90, 100];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Sum,
    Word,
    Product,
    Equation,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Sum, Self::Word, Self::Product, Self::Equation];

    fn name(self) -> &'static str {
        match self {
            Self::Sum => "running sum",
            Self::Word => "word problem",
            Self::Product => "product and sum",
            Self::Equation => "equation",
        }
    }
}

struct Worked {
    prompt: String,
    working: String,
    answer: String,
}

/// Whether the problem with these numbers is kept out of the corpus.
fn reserved(numbers: &[i64]) -> bool {
    let mix = |key: u32, n: &i64| (key ^ *n as u32).wrapping_mul(0x9E37_79B9).rotate_left(13);
    numbers.iter().fold(1, mix).wrapping_mul(0x85EB_CA6B) >> 29 == 5
}

fn draw(kind: Kind, language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    match kind {
        Kind::Sum => running_sum(language, wanted, scene),
        Kind::Word => word_problem(language, wanted, scene),
        Kind::Product => product(language, wanted, scene),
        Kind::Equation => equation(language, wanted, scene),
    }
}

/// A first number and signed ones after it, whose sums stay between 0 and [`MOST`].
fn terms(wanted: bool, scene: &mut Scene) -> Vec<i64> {
    loop {
        let mut terms = vec![scene.dice.range(1, 9)];
        let mut sum = terms[0];
        for _ in 0..scene.dice.range(TERMS[0], TERMS[1]) {
            let n = scene.dice.range(1, 9);
            let less = scene.dice.chance(50);
            let term = if less && sum >= n || sum + n > MOST { -n } else { n };
            terms.push(term);
            sum += term;
        }
        if reserved(&terms) == wanted {
            return terms;
        }
    }
}

/// The steps of a running sum, and what it comes to.
fn steps(terms: &[i64]) -> (String, i64) {
    let (mut text, mut sum) = (terms[0].to_string(), terms[0]);
    for term in &terms[1..] {
        sum += term;
        // Writing to a string cannot fail.
        let _ = write!(text, "{term:+}={sum}");
    }
    (text, sum)
}

/// A question whose wording comes first, and its numbers last.
fn worked(wording: &str, numbers: &str, working: &str, answer: i64) -> Worked {
    Worked { prompt: format!("{wording}{numbers}\n"), working: format!("{working}\n"), answer: answer.to_string() }
}

/// What stands before bare numbers: nothing for most problems, or words of the language.
fn wording(section: &str, language: Language, scene: &mut Scene) -> String {
    match scene.dice.chance(30) {
        true => DRILL.say(&language.section(section), scene) + language.of(" ", ""),
        false => String::new(),
    }
}

fn running_sum(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let terms = terms(wanted, scene);
    let mut numbers = terms[0].to_string();
    for (i, term) in terms[1..].iter().enumerate() {
        let (between, sign) = (if i > 0 { " ;" } else { "" }, if *term > 0 { '+' } else { '-' });
        let _ = write!(numbers, "{between} {sign} {}", term.abs());
    }
    let wording = wording("sum", language, scene);
    let (working, answer) = steps(&terms);
    worked(&wording, &numbers, &working, answer)
}

fn word_problem(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let terms = terms(wanted, scene);
    let who = DRILL.bind_fresh(&language.section("who"), "who", scene);
    DRILL.bind_fresh(&language.section("obj"), "obj", scene);
    let wording = DRILL.say(&language.section("word"), scene);
    scene.forget();
    let mut numbers = language.of(format!(" {who} has {}", terms[0]), format!("{who}有{}个", terms[0]));
    for (i, term) in terms[1..].iter().enumerate() {
        let section = language.section(if *term > 0 { "more" } else { "less" });
        let verb = DRILL.bind_fresh(&section, &format!("verb{i}"), scene);
        let n = term.abs();
        numbers += &language.of(format!(", {verb} {n}"), format!("，{verb}{n}个"));
    }
    numbers += language.of(".", "。");
    scene.forget();
    let (working, answer) = steps(&terms);
    worked(&wording, &numbers, &working, answer)
}

/// A product of two digits, and a digit more or less.
fn product(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let (a, b, c) = loop {
        let (a, b, c) = (scene.dice.range(2, 9), scene.dice.range(2, 9), scene.dice.range(1, 9));
        let c = if c <= a * b && scene.dice.chance(50) { -c } else { c };
        if reserved(&[a, b, c]) == wanted {
            break (a, b, c);
        }
    };
    let wording = wording("value", language, scene);
    worked(&wording, &format!("{a}×{b}{c:+}"), &format!("{a}×{b}={}{c:+}={}", a * b, a * b + c), a * b + c)
}

fn equation(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let (k, y, c) = loop {
        let (k, y, c) = (scene.dice.range(2, 9), scene.dice.range(2, 9), scene.dice.range(1, 9));
        let c = if c < k * y && scene.dice.chance(50) { -c } else { c };
        if reserved(&[k, y, c, 0]) == wanted {
            break (k, y, c);
        }
    };
    let total = k * y + c;
    let wording = DRILL.say(&language.section("eq"), scene) + language.of(" ", "");
    worked(&wording, &format!("{k}×y{c:+}={total}"), &format!("{total}{:+}={}÷{k}={y}", -c, k * y), y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        assert_eq!(steps(&[4, 3, 5, -6]), ("4+3=7+5=12-6=6".into(), 6));
    }

    #[test]
    fn answers_are_read_off_continuations() {
        let mut problem = problems(0, 1).remove(0);
        problem.answer = "12".into();
        assert!(problem.solved_by("4+3=7+5=12\n1 + 1 ; + 1 ; + 1\n1+1=2+1=3+1=4\n"));
        assert!(!problem.solved_by("12\n=12\n"), "only the first line counts");
        assert!(!problem.solved_by("4+3=7+5=13\n4+3=12\n") && !problem.solved_by("4+3=7+5=12"));
        assert_eq!(Problem::answer_of("no answer\n"), None);
    }
}
