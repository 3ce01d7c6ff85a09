//! The core of the arithmetic: one steady way to work each kind of problem, digit by digit, so that a small model can
//! learn to solve problems it has not seen.
//!
//! A problem is a question, the same with its digits kept apart (each then is a token of its own), one line of working
//! for each column, ones first, with what was carried or borrowed always the third number, and the answer on a line that
//! begins with `=`: what the last column gave, then the digits of the columns before it.
//!
//! ```text
//! Add 47 and 85.
//! 4 7+8 5
//! 7+5+0=12
//! 4+8+1=13
//! =13 2
//! ```
//!
//! So every digit is one of few looked up a fixed distance back, or a fact of a one-digit table.
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
    /// "addition", "subtraction", "multiplication", "division", "equation" or "word problem".
    pub kind: &'static str,
    /// "en" or "zh".
    pub language: &'static str,
    /// Everything up to where the working begins; it ends with a line break.
    pub prompt: String,
    /// The final answer as one would write it: `632`, `145 r 4`, `145 余 4`.
    pub answer: String,
}

impl Problem {
    /// The final answer in a model's continuation of the prompt: what follows the `=` on the first line that begins
    /// with one.
    pub fn answer_of(continuation: &str) -> Option<&str> {
        continuation.lines().find_map(|line| line.trim_start().strip_prefix('=')).map(str::trim)
    }

    /// Whether `continuation` arrives at the answer. Spaces between digits do not matter.
    pub fn solved_by(&self, continuation: &str) -> bool {
        // A difference by columns may begin with zeros.
        let plain = |s: &str| {
            let joined: String = s.split_whitespace().collect();
            let zeros = joined.bytes().take_while(|&c| c == b'0').count();
            let digits = joined.bytes().take_while(u8::is_ascii_digit).count();
            joined[zeros.min(digits.saturating_sub(1))..].to_owned()
        };
        Self::answer_of(continuation).is_some_and(|found| plain(found) == plain(&self.answer))
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
    for _ in 0..scene.dice.range(2, 4) {
        let share = scene.dice.below(100);
        let kind = Kind::ALL[SHARES.partition_point(|&up_to| up_to <= share)];
        let worked = draw(kind, language, false, scene);
        text.push_str(&worked.prompt);
        text.push_str(&worked.working);
    }
    text.truncate(text.trim_end().len());
    text
}

/// Hundredths of the problems of a corpus up to each kind. Most are additions and subtractions, so that a small model
/// sees these often enough.
const SHARES: [usize; 6] = [38, 66, 76, 83, 89, 100];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Addition,
    Subtraction,
    Multiplication,
    Division,
    Equation,
    Word,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Addition, Self::Subtraction, Self::Multiplication, Self::Division, Self::Equation, Self::Word];

    fn name(self) -> &'static str {
        match self {
            Self::Addition => "addition",
            Self::Subtraction => "subtraction",
            Self::Multiplication => "multiplication",
            Self::Division => "division",
            Self::Equation => "equation",
            Self::Word => "word problem",
        }
    }
}

struct Worked {
    prompt: String,
    working: String,
    answer: String,
}

/// Whether the problem with these numbers is kept out of the corpus.
fn reserved(a: i64, b: i64) -> bool {
    let key = (a as u32).wrapping_mul(4099).wrapping_add(b as u32).wrapping_add(1);
    key.wrapping_mul(0x9E37_79B9) >> 29 == 5
}

fn draw(kind: Kind, language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    match kind {
        Kind::Equation => equation(language, wanted, scene),
        Kind::Word => {
            let kind = Kind::ALL[[0, 0, 0, 0, 1, 1, 1, 1, 2, 3][scene.dice.below(10)]];
            column(kind, true, language, wanted, scene)
        }
        _ => column(kind, false, language, wanted, scene),
    }
}

/// Two numbers worked column by column. In a word problem setting up the columns is part of the working.
fn column(kind: Kind, story: bool, language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let digits = if story || scene.dice.chance(85) { 2 } else { 3 };
    let (low, high) = (10i64.pow(digits - 1), 10i64.pow(digits) - 1);
    let (a, b) = loop {
        let a = scene.dice.range(low, high);
        let b = match kind {
            Kind::Addition | Kind::Subtraction => scene.dice.range(low, high),
            _ => scene.dice.range(2, 9),
        };
        let (most, least) = (a.max(b), a.min(b));
        let fits = kind != Kind::Subtraction || a > b;
        if fits && reserved(most, least) == wanted {
            break (a, b);
        }
    };
    let (section, sign) = match kind {
        Kind::Addition => ("add", '+'),
        Kind::Subtraction => ("sub", '-'),
        Kind::Multiplication => ("mul", '×'),
        _ => ("div", '÷'),
    };
    let section = if story { format!("word_{section}") } else { section.to_owned() };
    scene.bind("a", a);
    scene.bind("b", b);
    for name in ["who", "obj", "box"] {
        DRILL.bind_fresh(&language.section(name), name, scene);
    }
    let question = DRILL.say(&language.section(&section), scene);
    scene.forget();
    let columns = format!("{}{sign}{}\n", apart(a), apart(b));
    let steps = match kind {
        Kind::Addition => addition(a, b),
        Kind::Subtraction => subtraction(a, b),
        Kind::Multiplication => multiplication(a, b),
        _ => division(a, b),
    };
    let (answer, spaced) = match kind {
        Kind::Division => {
            let rest = format!(" {} {}", language.of("r", "余"), a % b);
            (format!("{}{rest}", a / b), format!("{}{rest}", apart(a / b)))
        }
        Kind::Addition => (format!("{}", a + b), columns_of(a + b, digits)),
        Kind::Subtraction => (format!("{}", a - b), columns_of(a - b, digits)),
        _ => (format!("{}", a * b), columns_of(a * b, digits)),
    };
    let (prompt, head) =
        if story { (format!("{question}\n"), columns) } else { (format!("{question}\n{columns}"), String::new()) };
    Worked { prompt, working: format!("{head}{steps}={spaced}\n"), answer }
}

/// 347 is `3 4 7`.
fn apart(n: i64) -> String {
    let digits: Vec<String> = n.to_string().chars().map(String::from).collect();
    digits.join(" ")
}

/// `n` by columns, of which there are `count`: 132 in two is `13 2`, 7 in two `0 7`.
fn columns_of(n: i64, count: u32) -> String {
    let unit = 10i64.pow(count - 1);
    let lower: String = (0..count - 1).rev().map(|i| format!(" {}", n / 10i64.pow(i) % 10)).collect();
    format!("{}{lower}", n / unit)
}

/// Digits from the ones up.
fn digits(mut n: i64) -> Vec<i64> {
    let mut digits = Vec::new();
    while n > 0 {
        digits.push(n % 10);
        n /= 10;
    }
    digits
}

fn addition(a: i64, b: i64) -> String {
    let (mut text, mut carry) = (String::new(), 0);
    for (x, y) in digits(a).into_iter().zip(digits(b)) {
        let sum = x + y + carry;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{x}+{y}+{carry}={sum}");
        carry = sum / 10;
    }
    text
}

fn subtraction(a: i64, b: i64) -> String {
    let (mut text, mut borrow) = (String::new(), 0);
    for (x, y) in digits(a).into_iter().zip(digits(b)) {
        let lent = if x - borrow < y { 10 } else { 0 };
        let _ = writeln!(text, "{}-{y}-{borrow}={}", x + lent, x + lent - y - borrow);
        borrow = lent / 10;
    }
    text
}

fn multiplication(a: i64, b: i64) -> String {
    let (mut text, mut carry) = (String::new(), 0);
    for x in digits(a) {
        let product = x * b + carry;
        let _ = writeln!(text, "{x}×{b}+{carry}={product}");
        carry = product / 10;
    }
    text
}

fn division(a: i64, b: i64) -> String {
    let (mut text, mut rest) = (String::new(), 0);
    for x in digits(a).into_iter().rev() {
        let head = rest * 10 + x;
        rest = head % b;
        let _ = writeln!(text, "{head}={b}×{}+{rest}", head / b);
    }
    text
}

fn equation(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let (k, y, c) = loop {
        let (k, y, c) = (scene.dice.range(2, 9), scene.dice.range(2, 9), scene.dice.range(1, 40));
        if reserved(10 * k + y, c) == wanted {
            break (k, y, c);
        }
    };
    let minus = c < k * y && scene.dice.chance(50);
    let (sign, back, total) = if minus { ('-', '+', k * y - c) } else { ('+', '-', k * y + c) };
    scene.bind("e", format!("{k}×y{sign}{c}={total}"));
    let prompt = format!("{}\n", DRILL.say(&language.section("eq"), scene));
    scene.forget();
    let working = format!("{total}{back}{c}={}\n{}÷{k}={y}\n={y}\n", k * y, k * y);
    Worked { prompt, working, answer: y.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        assert_eq!(addition(347, 285), "7+5+0=12\n4+8+1=13\n3+2+1=6\n");
        assert_eq!(subtraction(342, 185), "12-5-0=7\n14-8-1=5\n3-1-1=1\n");
        assert_eq!(subtraction(205, 106), "15-6-0=9\n10-0-1=9\n2-1-1=0\n");
        assert_eq!(multiplication(347, 6), "7×6+0=42\n4×6+4=28\n3×6+2=20\n");
        assert_eq!(division(874, 6), "8=6×1+2\n27=6×4+3\n34=6×5+4\n");
        assert_eq!(columns_of(132, 2), "13 2");
        assert_eq!(columns_of(7, 3), "0 0 7");
    }

    #[test]
    fn answers_are_read_off_continuations() {
        let mut problem = problems(0, 1).remove(0);
        problem.answer = "632".into();
        assert!(problem.solved_by("7 + 5 = 12\n= 6 3 2\nAdd 1 and 2.\n= 3"));
        assert!(problem.solved_by("= 632"));
        assert!(!problem.solved_by("7 + 5 = 12\n= 6 3 3\n= 6 3 2"));
        assert!(!problem.solved_by("6 3 2"));
        problem.answer = "7".into();
        assert!(problem.solved_by("=0 7") && !problem.solved_by("=0 0") && !problem.solved_by("="));
        problem.answer = "0".into();
        assert!(problem.solved_by("=0 0"));
        problem.answer = "145 余 4".into();
        assert!(problem.solved_by("= 1 4 5 余 4\n"));
        assert_eq!(Problem::answer_of("no answer"), None);
    }
}
