//! Arithmetic with worked steps. Numbers and steps are computed here, their wording is `maths.txt`.

use std::sync::LazyLock;

use super::Language;
use super::grammar::{Dice, Grammar, Scene};

static MATHS: LazyLock<Grammar> = LazyLock::new(|| Grammar::parse(include_str!("maths.txt")));

const PLACES: [&str; 8] =
    ["ones", "tens", "hundreds", "thousands", "ten-thousands", "hundred-thousands", "millions", "ten-millions"];
const PLACES_ZH: [&str; 8] = ["个位", "十位", "百位", "千位", "万位", "十万位", "百万位", "千万位"];

/// One problem, or a few short ones.
pub(super) fn document(scene: &mut Scene) -> String {
    let language = Language::draw(&mut scene.dice);
    let mut page = Page { language, scene, lines: Vec::new() };
    let kind = page.scene.dice.below(14);
    let count = if kind < 6 { 1 } else { page.scene.dice.below(3) + 2 };
    for _ in 0..count {
        match kind {
            0 | 1 => page.addition(),
            2 => page.subtraction(),
            3 | 4 => page.multiplication(),
            5 => page.division(),
            6 => page.comparison(),
            7 => page.sorting(),
            8 => page.expression(),
            9..12 => page.word_problem(),
            12 => page.time(),
            _ => page.percent(),
        }
    }
    page.lines.join("\n")
}

struct Page<'a> {
    language: Language,
    scene: &'a mut Scene,
    lines: Vec<String>,
}

impl Page<'_> {
    fn bind(&mut self, name: &str, value: impl ToString) {
        self.scene.bind(name, value);
    }

    fn say(&mut self, section: &str) {
        let line = MATHS.say(&self.language.section(section), self.scene);
        self.lines.push(line);
    }

    fn dice(&mut self) -> &mut Dice {
        &mut self.scene.dice
    }

    /// Binds e and r and says the answer, sometimes with a check.
    fn answer(&mut self, e: String, r: i64, check: String) {
        self.bind("e", e);
        self.bind("r", r);
        self.say("answer");
        if self.dice().chance(30) {
            self.bind("c", check);
            self.say("check");
        }
    }

    fn addition(&mut self) {
        let (m, n) = (self.dice().range(2, 7), self.dice().range(2, 7));
        let (a, b) = (number(self.dice(), m), number(self.dice(), n));
        self.bind("a", a);
        self.bind("b", b);
        self.say("add_intro");
        let (mut x, mut y, mut carry, mut place) = (a, b, 0, 0);
        while x > 0 || y > 0 {
            let s = x % 10 + y % 10 + carry;
            let plus = if carry > 0 { format!(" + {carry}") } else { String::new() };
            carry = s / 10;
            let more = self.language.of(format!(", carry {carry}"), format!("，进{carry}"));
            let carried = if carry > 0 { more } else { String::new() };
            self.bind("place", self.language.of(PLACES, PLACES_ZH)[place]);
            self.bind("x", x % 10);
            self.bind("y", y % 10);
            self.bind("plus", plus);
            self.bind("s", s);
            self.bind("d", s % 10);
            self.bind("carry_w", &carried);
            self.bind("carry_s", carried);
            self.say("add_step");
            (x, y, place) = (x / 10, y / 10, place + 1);
        }
        self.answer(format!("{a} + {b}"), a + b, format!("{} - {b} = {a}", a + b));
    }

    fn subtraction(&mut self) {
        let (m, n) = (self.dice().range(2, 6), self.dice().range(2, 6));
        let (x, y) = (number(self.dice(), m), number(self.dice(), n));
        let (a, b) = (x.max(y), x.min(y));
        self.bind("a", a);
        self.bind("b", b);
        self.say("sub_intro");
        let (mut x, mut y, mut borrow, mut place) = (a, b, 0, 0);
        while x > 0 {
            let (top, bottom) = (x % 10 - borrow, y % 10);
            borrow = i64::from(top < bottom);
            let lent = self.language.of(", having borrowed 1", "（借1）");
            self.bind("place", self.language.of(PLACES, PLACES_ZH)[place]);
            self.bind("x", top + 10 * borrow);
            self.bind("y", bottom);
            self.bind("d", top + 10 * borrow - bottom);
            self.bind("borrow", if borrow > 0 { lent } else { "" });
            self.say("sub_step");
            (x, y, place) = (x / 10, y / 10, place + 1);
        }
        self.answer(format!("{a} - {b}"), a - b, format!("{} + {b} = {a}", a - b));
    }

    fn multiplication(&mut self) {
        let (m, n) = (self.dice().range(1, 4), self.dice().range(2, 3));
        let (a, b) = (number(self.dice(), m) + 1, number(self.dice(), n));
        let parts = parts(b);
        self.bind("a", a);
        self.bind("b", b);
        self.bind("parts", join(&parts, " + "));
        self.say("mul_intro");
        for &p in &parts {
            self.bind("p", p);
            self.bind("q", a * p);
            self.say("mul_step");
        }
        let products: Vec<i64> = parts.iter().map(|p| a * p).collect();
        self.bind("sum", join(&products, " + "));
        self.bind("r", a * b);
        if parts.len() > 1 {
            self.say("mul_sum");
        }
        let times = self.language.of("x", "×");
        let over = self.language.of("/", "÷");
        self.answer(format!("{a} {times} {b}"), a * b, format!("{} {over} {b} = {a}", a * b));
    }

    fn division(&mut self) {
        let digits = self.dice().range(3, 5);
        let (a, b) = (number(self.dice(), digits), self.dice().range(2, 29));
        self.bind("a", a);
        self.bind("b", b);
        self.say("div_intro");
        let mut rest = 0;
        for g in a.to_string().bytes().map(|c| i64::from(c - b'0')) {
            let h = rest * 10 + g;
            // Nothing is written until the first quotient digit.
            if h >= b || rest > 0 {
                for (name, value) in [("g", g), ("h", h), ("k", h / b), ("m", h / b * b), ("n", h % b)] {
                    self.bind(name, value);
                }
                self.say("div_step");
            }
            rest = h % b;
        }
        self.bind("q", a / b);
        self.bind("r", a % b);
        self.say("div_answer");
    }

    fn comparison(&mut self) {
        let m = self.dice().range(2, 7);
        let n = if self.dice().chance(70) { m } else { self.dice().range(2, 7) };
        let a = number(self.dice(), m);
        let mut b = number(self.dice(), n);
        if m == n && self.dice().chance(60) {
            // Share the leading digits, so that the deciding one is not always the first.
            let unit = 10i64.pow(self.dice().range(1, m - 1) as u32);
            b = a / unit * unit + b % unit;
        }
        if a == b {
            b += if b % 10 == 9 { -1 } else { 1 };
        }
        let (text_a, text_b) = (a.to_string(), b.to_string());
        self.bind("a", a);
        self.bind("b", b);
        self.bind("sign", if a < b { "<" } else { ">" });
        self.bind("big", a.max(b));
        self.say("cmp");
        if text_a.len() != text_b.len() {
            self.bind("la", text_a.len());
            self.bind("lb", text_b.len());
            self.say("cmp_len");
            return;
        }
        // They have the same length and are not equal, so some digit differs.
        let pos = text_a.bytes().zip(text_b.bytes()).position(|(x, y)| x != y).expect("the numbers differ");
        self.bind("pos", pos + 1);
        self.bind("x", &text_a[pos..=pos]);
        self.bind("y", &text_b[pos..=pos]);
        self.say("cmp_digit");
    }

    fn sorting(&mut self) {
        let count = self.dice().range(3, 6);
        let digits = self.dice().range(2, 5);
        let mut left: Vec<i64> = Vec::new();
        while left.len() < count as usize {
            let n = number(self.dice(), digits);
            if !left.contains(&n) {
                left.push(n);
            }
        }
        let comma = self.language.of(", ", "、");
        self.bind("list", join(&left, comma));
        self.say("sort");
        let mut sorted = left.clone();
        sorted.sort_unstable();
        for &m in &sorted[..sorted.len() - 1] {
            left.retain(|&n| n != m);
            self.bind("m", m);
            self.bind("rest", join(&left, comma));
            self.say("sort_step");
        }
        self.bind("sorted", join(&sorted, comma));
        self.say("sort_end");
    }

    fn expression(&mut self) {
        let [a, b, c, d] = [40, 40, 200, 200].map(|high| self.dice().range(2, high));
        let times = self.language.of("x", "×");
        let (e, steps, r) = match self.dice().below(4) {
            0 => (format!("{c} + {a} {times} {b}"), vec![format!("{c} + {}", a * b)], c + a * b),
            1 => (format!("({c} + {d}) {times} {a}"), vec![format!("{} {times} {a}", c + d)], (c + d) * a),
            2 => {
                let steps = vec![format!("{} + {c} {times} {d}", a * b), format!("{} + {}", a * b, c * d)];
                (format!("{a} {times} {b} + {c} {times} {d}"), steps, a * b + c * d)
            }
            _ => {
                let steps = vec![format!("{} - {d}", a * (b + c))];
                let first = format!("{a} {times} {} - {d}", b + c);
                (format!("{a} {times} ({b} + {c}) - {d}"), [vec![first], steps].concat(), a * (b + c) - d)
            }
        };
        self.bind("e", &e);
        self.say("eval");
        if self.dice().chance(50) {
            self.say("eval_why");
        }
        let mut line = e.clone();
        for step in steps {
            line = format!("{line} = {step}");
        }
        self.lines.push(format!("{line} = {r}"));
        if self.dice().chance(40) {
            self.bind("r", r);
            self.say("answer");
        }
    }

    fn word_problem(&mut self) {
        for name in ["who", "obj", "box"] {
            MATHS.bind_fresh(&self.language.section(name), name, self.scene);
        }
        let kind = self.dice().below(5);
        let high = *self.dice().pick(&[20, 300, 2000, 9000]);
        let (x, y) = (self.dice().range(2, high), self.dice().range(2, high));
        let (k, m) = (self.dice().range(2, 40), self.dice().range(2, 90));
        let (a, b) = (x.max(y) + 1, x.min(y));
        let r = match kind {
            0 => a + b,
            1 => a - b,
            _ => k * m,
        };
        let paid = r + self.dice().range(1, 40);
        for (name, value) in [("a", a), ("b", b), ("k", k), ("m", m), ("r", r), ("p", paid), ("t", paid - r)] {
            self.bind(name, value);
        }
        self.say(["w1", "w2", "w3", "w4", "w5"][kind]);
        // The next problem has its own people.
        self.scene.forget();
    }

    fn time(&mut self) {
        MATHS.bind_fresh(&self.language.section("who"), "who", self.scene);
        let (h, m, d) = (self.dice().range(0, 20), self.dice().range(0, 59), self.dice().range(5, 175));
        let end = m + d;
        let clock = |h: i64, m: i64| format!("{h}:{m:02}");
        let why = if end < 60 {
            format!("{m} + {d} = {end}")
        } else {
            let hours = self.language.of("h", "小时");
            format!("{m} + {d} = {end} = {} {hours} {}", end / 60, end % 60)
        };
        self.bind("h1", clock(h, m));
        self.bind("h2", clock(h + end / 60, end % 60));
        self.bind("d", d);
        self.bind("why", why);
        self.say("time");
        self.scene.forget();
    }

    fn percent(&mut self) {
        MATHS.bind_fresh(&self.language.section("who"), "who", self.scene);
        let (p, o) = (self.dice().range(1, 99), self.dice().range(1, 60));
        for (name, value) in [("p", p), ("o", o), ("a", 100 * o), ("r", p * o)] {
            self.bind(name, value);
        }
        self.say("frac");
        self.scene.forget();
    }
}

/// A number of exactly `digits` digits (1 to 9 for one digit).
fn number(dice: &mut Dice, digits: i64) -> i64 {
    let low = 10i64.pow(digits as u32 - 1);
    dice.range(low, 10 * low - 1)
}

/// 307 is 300 + 7.
fn parts(n: i64) -> Vec<i64> {
    let units = (0..18).rev().map(|i| 10i64.pow(i));
    units.map(|u| n / u % 10 * u).filter(|&p| p > 0).collect()
}

fn join(numbers: &[i64], between: &str) -> String {
    numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every "x op y = z" with plain numbers, and every chain of sums, is true.
    #[test]
    fn sums_come_out_right() {
        let mut checked = 0;
        for i in 0..400 {
            let text = document(&mut Scene::new(Dice::new(21, i)));
            for line in text.lines() {
                checked += check(line);
            }
        }
        assert!(checked > 500, "{checked}");
    }

    /// Checks the equalities of a line whose left side is a sum, difference or product of plain numbers.
    fn check(line: &str) -> usize {
        let line = line.replace('×', "x").replace('÷', "/");
        let tokens: Vec<&str> = line.split(|c: char| !c.is_ascii() || ",;:()".contains(c)).collect();
        let mut checked = 0;
        for piece in tokens {
            let words: Vec<&str> = piece.split_whitespace().map(|w| w.trim_end_matches('.')).collect();
            for at in 0..words.len() {
                // Only where the expression does not go on to either side.
                let ends = at + 5 >= words.len() || !"+-x/=rpo".contains(words[at + 5].chars().next().unwrap_or('a'));
                let starts = at == 0 || !["+", "-", "x", "/"].contains(&words[at - 1]);
                let [Some(a), Some(op), Some(b), Some("="), Some(c)] =
                    [0, 1, 2, 3, 4].map(|i| words.get(at + i).copied())
                else {
                    continue;
                };
                let (Ok(a), Ok(b), Ok(c)) = (a.parse::<i64>(), b.parse::<i64>(), c.parse::<i64>()) else { continue };
                let expected = match op {
                    "+" => a + b,
                    "-" => a - b,
                    "x" => a * b,
                    _ => continue,
                };
                if ends && starts {
                    assert_eq!(expected, c, "{line}");
                    checked += 1;
                }
            }
        }
        checked
    }

    #[test]
    fn numbers_and_their_parts() {
        assert_eq!(parts(307), [300, 7]);
        assert_eq!(parts(40), [40]);
        let mut dice = Dice::new(0, 0);
        assert!((0..100).all(|_| (100..1000).contains(&number(&mut dice, 3))));
    }
}
