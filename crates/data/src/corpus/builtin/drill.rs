//! The core of the arithmetic: one steady way to work each kind of problem, in steps so small that a small model can
//! learn to solve problems it has not seen.
//!
//! A problem is a question on one line, a line for each step, and the answer on a line that begins with `=`. Running sums
//! take the numbers one after the other, and so do word problems:
//!
//! ```text
//! Mira has 4 pears; then finds 3, buys 5, sells 6. How many now?
//! 4+3=7
//! 7+5=12
//! 12-6=6
//! =6
//! ```
//!
//! Sums by columns have their digits kept apart (each then is a token of its own), ones first, with what was carried or
//! borrowed always the third number; the answer is what the last column gave, then the digits of those before it:
//!
//! ```text
//! Add 47 and 85.
//! 4 7+8 5
//! 7+5+0=12
//! 4+8+1=13
//! =13 2
//! ```
//!
//! So every number is one of few looked up a little way back, or a fact of a small table.
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
    /// "running sum", "product and sum", "addition", "subtraction", "equation" or "word problem".
    pub kind: &'static str,
    /// "en" or "zh".
    pub language: &'static str,
    /// Everything up to where the working begins; it ends with a line break.
    pub prompt: String,
    /// The final answer as one would write it: `132`.
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
    for _ in 0..scene.dice.range(3, 6) {
        let share = scene.dice.below(100);
        let kind = Kind::ALL[SHARES.partition_point(|&up_to| up_to <= share)];
        let worked = draw(kind, language, false, scene);
        text.push_str(&worked.prompt);
        text.push_str(&worked.working);
    }
    text.truncate(text.trim_end().len());
    text
}

/// Digits of the numbers worked by columns: always as many, so that what a step looks up is always as far back.
const COLUMNS: u32 = 2;
/// Numbers added to or taken from the first in a running sum.
const TERMS: usize = 3;
/// What a running sum stays within.
const MOST: i64 = 18;

/// Hundredths of the problems of a corpus up to each kind.
const SHARES: [usize; 6] = [28, 42, 58, 70, 78, 100];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Sum,
    Product,
    Addition,
    Subtraction,
    Equation,
    Word,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Sum, Self::Product, Self::Addition, Self::Subtraction, Self::Equation, Self::Word];

    fn name(self) -> &'static str {
        match self {
            Self::Sum => "running sum",
            Self::Product => "product and sum",
            Self::Addition => "addition",
            Self::Subtraction => "subtraction",
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
        Kind::Addition | Kind::Subtraction => column(kind, language, wanted, scene),
    }
}

/// A first number and signed ones after it, whose sums stay between 0 and [`MOST`].
fn terms(wanted: bool, scene: &mut Scene) -> Vec<i64> {
    loop {
        let mut terms = vec![scene.dice.range(1, 9)];
        let mut sum = terms[0];
        while terms.len() <= TERMS {
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
    let (mut text, mut sum) = (String::new(), terms[0]);
    for term in &terms[1..] {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{sum}{term:+}={}", sum + term);
        sum += term;
    }
    (text, sum)
}

fn worked(question: &str, working: String, answer: i64) -> Worked {
    Worked { prompt: format!("{question}\n"), working: format!("{working}={answer}\n"), answer: answer.to_string() }
}

fn running_sum(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let terms = terms(wanted, scene);
    let expression: String = terms[1..].iter().fold(terms[0].to_string(), |text, term| format!("{text}{term:+}"));
    scene.bind("e", expression);
    let question = DRILL.say(&language.section("sum"), scene);
    scene.forget();
    let (working, answer) = steps(&terms);
    worked(&question, working, answer)
}

fn word_problem(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let terms = terms(wanted, scene);
    let mut events = Vec::new();
    for (i, term) in terms[1..].iter().enumerate() {
        scene.bind("n", term.abs());
        let section = language.section(if *term > 0 { "more" } else { "less" });
        events.push(DRILL.bind_fresh(&section, &format!("event{i}"), scene));
    }
    scene.bind("n", terms[0]);
    scene.bind("steps", events.join(language.of(", ", "，")));
    for name in ["who", "obj"] {
        DRILL.bind_fresh(&language.section(name), name, scene);
    }
    let question = DRILL.say(&language.section("word"), scene);
    scene.forget();
    let (working, answer) = steps(&terms);
    worked(&question, working, answer)
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
    scene.bind("e", format!("{a}×{b}{c:+}"));
    let question = DRILL.say(&language.section("sum"), scene);
    scene.forget();
    let working = format!("{a}×{b}={}\n{}{c:+}={}\n", a * b, a * b, a * b + c);
    worked(&question, working, a * b + c)
}

/// Two numbers worked column by column.
fn column(kind: Kind, language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let (low, high) = (10i64.pow(COLUMNS - 1), 10i64.pow(COLUMNS) - 1);
    let (a, b) = loop {
        let (a, b) = (scene.dice.range(low, high), scene.dice.range(low, high));
        let fits = kind != Kind::Subtraction || a > b;
        if fits && reserved(&[a.max(b), a.min(b)]) == wanted {
            break (a, b);
        }
    };
    scene.bind("a", a);
    scene.bind("b", b);
    let (section, sign) = if kind == Kind::Addition { ("add", '+') } else { ("sub", '-') };
    let question = DRILL.say(&language.section(section), scene);
    scene.forget();
    let (working, answer) = if kind == Kind::Addition { (addition(a, b), a + b) } else { (subtraction(a, b), a - b) };
    let prompt = format!("{question}\n{}{sign}{}\n", apart(a), apart(b));
    let working = format!("{working}={}\n", columns_of(answer, COLUMNS));
    Worked { prompt, working, answer: answer.to_string() }
}

/// 47 is `4 7`.
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

fn equation(language: Language, wanted: bool, scene: &mut Scene) -> Worked {
    let (k, y, c) = loop {
        let (k, y, c) = (scene.dice.range(2, 9), scene.dice.range(2, 9), scene.dice.range(1, 40));
        if reserved(&[k, y, c]) == wanted {
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
        assert_eq!(steps(&[4, 3, 5, -6]), ("4+3=7\n7+5=12\n12-6=6\n".into(), 6));
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
        assert_eq!(Problem::answer_of("no answer"), None);
    }
}
