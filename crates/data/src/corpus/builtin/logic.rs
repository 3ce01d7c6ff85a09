//! Small logic puzzles with worked steps. The puzzle and its solution are computed here, the wording is `puzzles.txt`.

use std::sync::LazyLock;

use super::Language;
use super::grammar::{Dice, Grammar, Scene};

static PUZZLES: LazyLock<Grammar> = LazyLock::new(|| Grammar::parse(include_str!("puzzles.txt")));

const WORDS: [&str; 40] = [
    "banana",
    "committee",
    "mississippi",
    "strawberry",
    "letter",
    "balloon",
    "assess",
    "bookkeeper",
    "parallel",
    "cinnamon",
    "tomorrow",
    "necessary",
    "pepper",
    "coffee",
    "umbrella",
    "grasshopper",
    "butterfly",
    "bottle",
    "sleeplessness",
    "engineer",
    "refrigerator",
    "accommodation",
    "little",
    "happiness",
    "mammal",
    "occurrence",
    "possess",
    "referee",
    "tattoo",
    "villa",
    "whippoorwill",
    "yellow",
    "zigzag",
    "kayak",
    "level",
    "nanny",
    "onion",
    "queue",
    "rabbit",
    "success",
];

/// One puzzle, or a few short ones of a kind.
pub(super) fn document(scene: &mut Scene) -> String {
    let language = Language::draw(&mut scene.dice);
    let mut page = Page { language, scene, lines: Vec::new() };
    match page.scene.dice.below(10) {
        0 | 1 => page.ordering(),
        2 => page.knights(),
        3 | 4 => page.sequences(),
        5 => page.owners(),
        6 => page.cups(),
        7 => page.letters(),
        _ => page.counting(),
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

    fn bind_all<const N: usize>(&mut self, pairs: [(&str, &str); N]) {
        for (name, value) in pairs {
            self.bind(name, value);
        }
    }

    fn text(&mut self, section: &str) -> String {
        PUZZLES.say(&self.language.section(section), self.scene)
    }

    fn say(&mut self, section: &str) {
        let line = self.text(section);
        self.lines.push(line);
    }

    fn dice(&mut self) -> &mut Dice {
        &mut self.scene.dice
    }

    /// `count` different words of a section.
    fn draw(&mut self, section: &str, count: usize) -> Vec<String> {
        PUZZLES.say_some(&self.language.section(section), count, self.scene)
    }

    fn ordering(&mut self) {
        let count = self.dice().range(3, 6) as usize;
        let people = self.draw("who", count);
        let relation = self.draw("rel", 1).remove(0);
        let words: Vec<&str> = relation.split('/').collect();
        self.bind("more", words[0]);
        self.bind("less", words[1]);
        self.bind("top", words.get(2).unwrap_or(&words[0]));
        self.bind("bottom", words.get(3).unwrap_or(&words[1]));
        let mut clues: Vec<usize> = (0..count - 1).collect();
        self.dice().shuffle(&mut clues);
        let mut told = Vec::new();
        for i in clues {
            self.bind("x", &people[i]);
            self.bind("y", &people[i + 1]);
            told.push(self.text("ord_clue"));
        }
        told.push(self.text("ord_ask"));
        let space = self.language.of(" ", "");
        self.lines.push(told.join(space));
        for i in 0..count - 1 {
            self.bind("x", &people[i]);
            self.bind("y", &people[i + 1]);
            self.bind("chain", people[..i + 2].join(" > "));
            self.say("ord_step");
        }
        self.bind("first", &people[0]);
        self.bind("last", &people[count - 1]);
        self.bind("all", people.join("、"));
        self.say("ord_end");
    }

    /// Two speakers, each a knight or a knave; only puzzles with one solution are told.
    fn knights(&mut self) {
        let people = self.draw("who", 2);
        self.bind("A", &people[0]);
        self.bind("B", &people[1]);
        let (claims, solution) = loop {
            let claims = [0, 1].map(|_| self.dice().below(CLAIMS));
            let solutions: Vec<[bool; 2]> = CASES.into_iter().filter(|&case| broken(claims, case).is_none()).collect();
            if let [solution] = solutions[..] {
                break (claims, solution);
            }
        };
        let said = [0, 1].map(|i| self.claim(claims[i], &people[i], &people[1 - i]));
        self.bind("sa", &said[0]);
        self.bind("sb", &said[1]);
        self.say("kk_intro");
        let mut cases = CASES;
        self.dice().shuffle(&mut cases);
        for case in cases {
            self.bind_kinds(case);
            match broken(claims, case) {
                None => self.say("kk_good"),
                Some(liar) => {
                    let truth = if case[liar] {
                        self.language.of("false", "假话")
                    } else {
                        self.language.of("true", "真话")
                    };
                    self.bind_all([("s", &said[liar]), ("who", &people[liar]), ("truth", truth)]);
                    self.bind("k", kind(self.language, case[liar]));
                    self.say("kk_bad");
                }
            }
        }
        self.bind_kinds(solution);
        self.say("kk_end");
    }

    fn bind_kinds(&mut self, case: [bool; 2]) {
        self.bind("ka", kind(self.language, case[0]));
        self.bind("kb", kind(self.language, case[1]));
    }

    fn claim(&mut self, claim: usize, me: &str, other: &str) -> String {
        let english = [
            format!("{other} is a knight."),
            format!("{other} is a knave."),
            "We are both knaves.".to_owned(),
            "At least one of us is a knave.".to_owned(),
            "We are of the same kind.".to_owned(),
            format!("Exactly one of {me} and {other} is a knight."),
            "We are both knights.".to_owned(),
        ];
        let chinese = [
            format!("{other}是骑士。"),
            format!("{other}是无赖。"),
            "我们俩都是无赖。".to_owned(),
            "我们当中至少有一个无赖。".to_owned(),
            "我们是同一种人。".to_owned(),
            format!("{me}和{other}里正好有一个骑士。"),
            "我们俩都是骑士。".to_owned(),
        ];
        self.language.of(english, chinese)[claim].clone()
    }

    fn sequences(&mut self) {
        for _ in 0..self.dice().range(2, 3) {
            self.sequence();
        }
    }

    fn sequence(&mut self) {
        let shown = self.dice().range(4, 6) as usize;
        let (start, d, e) = (self.dice().range(1, 800), self.dice().range(2, 120), self.dice().range(1, 30));
        let kind = self.dice().below(6);
        let term = |i: i64| match kind {
            0 => start + d * i,
            1 => 700 + start - d * i,
            2 => (start % 9 + 1) * (e % 3 + 2).pow(i as u32),
            3 => (i + e) * (i + e),
            4 => start + d * i + e * i * (i - 1) / 2,
            _ => start + (d + e) * (i / 2) + d * (i % 2),
        };
        let terms: Vec<i64> = (0..=shown as i64).map(term).collect();
        let (r, last) = (terms[shown], terms[shown - 1]);
        let comma = self.language.of(", ", "，");
        let step = r - last;
        let signed = if step < 0 { format!("{last} - {}", -step) } else { format!("{last} + {step}") };
        let ratio = e % 3 + 2;
        let how = if kind == 2 { format!("{last} {} {ratio}", self.language.of("x", "×")) } else { signed };
        let rule = match kind {
            0 => self.language.of(format!("each step adds {d}"), format!("每次加{d}")),
            1 => self.language.of(format!("each step takes away {d}"), format!("每次减{d}")),
            2 => self.language.of(format!("each number is {ratio} times the one before"), format!("每次乘{ratio}")),
            3 => self.language.of("these are squares".to_owned(), "这些是平方数".to_owned()),
            4 => self.language.of(format!("the steps grow by {e}"), format!("每步的差增加{e}")),
            _ => self.language.of(format!("{d} and {e} are added in turn"), format!("轮流加{d}和{e}")),
        };
        self.bind("list", list(&terms[..shown], comma));
        let diffs: Vec<i64> = terms[..shown].windows(2).map(|w| w[1] - w[0]).collect();
        self.bind("diffs", list(&diffs, comma));
        self.bind("rule", rule);
        self.bind("how", how);
        self.bind("r", r);
        self.say("seq");
        self.say("seq_diff");
        self.say("seq_end");
    }

    /// Three owners: two clues exclude two animals for one person, a third settles the other two.
    fn owners(&mut self) {
        let (people, pets) = (self.draw("who", 3), self.draw("pet", 3));
        // Person i owns pet i; the names are told in another order.
        let clue = |page: &mut Self, person: usize, pet: usize| {
            page.bind("x", &people[person]);
            page.bind("y", &pets[pet]);
            page.text("own_not")
        };
        let mut clues = vec![clue(self, 0, 1), clue(self, 0, 2), clue(self, 1, 2)];
        self.dice().shuffle(&mut clues);
        let (mut names, mut animals) = (people.clone(), pets.clone());
        self.dice().shuffle(&mut names);
        self.dice().shuffle(&mut animals);
        self.bind_all([("a", &names[0]), ("b", &names[1]), ("c", &names[2])]);
        self.bind_all([("p", &animals[0]), ("q", &animals[1]), ("s", &animals[2])]);
        self.bind("clues", clues.join(self.language.of(" ", "")));
        self.say("own");
        self.bind_all([("x", &people[0]), ("u", &pets[1]), ("v", &pets[2]), ("w", &pets[0])]);
        self.say("own_step");
        self.bind_all([("x", &people[1]), ("y", &people[2]), ("u", &pets[2]), ("v", &pets[1])]);
        self.say("own_mid");
    }

    fn cups(&mut self) {
        let mut cups = self.draw("col", 3);
        let ball = self.dice().pick(&cups).clone();
        self.bind("c0", &ball);
        self.bind_cups(&cups, &ball);
        self.say("swap");
        for _ in 0..self.dice().range(2, 6) {
            let i = self.dice().below(3);
            let j = (i + 1 + self.dice().below(2)) % 3;
            cups.swap(i, j);
            self.bind("i", i.min(j) + 1);
            self.bind("j", i.max(j) + 1);
            self.bind_cups(&cups, &ball);
            self.say("swap_step");
        }
        self.say("swap_end");
    }

    fn bind_cups(&mut self, cups: &[String], ball: &str) {
        self.bind_all([("c1", &cups[0]), ("c2", &cups[1]), ("c3", &cups[2])]);
        let at = cups.iter().position(|cup| cup == ball).expect("the ball is under one of the cups");
        self.bind("at", at + 1);
    }

    fn letters(&mut self) {
        for _ in 0..self.dice().range(2, 4) {
            let word = *self.dice().pick(&WORDS);
            let letter = char::from(word.as_bytes()[self.dice().below(word.len())]);
            let places: Vec<i64> = word.chars().zip(1..).filter(|(c, _)| *c == letter).map(|(_, i)| i).collect();
            self.bind("l", letter);
            self.bind("w", word);
            self.bind("spell", word.chars().map(String::from).collect::<Vec<_>>().join("-"));
            self.bind("where", list(&places, self.language.of(", ", "、")));
            self.bind("r", places.len());
            self.say("count");
            self.say("count_step");
        }
    }

    fn counting(&mut self) {
        for _ in 0..self.dice().range(2, 4) {
            match self.dice().below(3) {
                0 => {
                    let n = self.dice().range(3, 9);
                    let fewer: Vec<i64> = (1..n).rev().collect();
                    self.bind("n", n);
                    self.bind("m", n - 1);
                    self.bind("sum", list(&fewer, " + "));
                    self.bind("r", n * (n - 1) / 2);
                    self.say("pairs");
                }
                1 => {
                    let [x, y, c, rest] = [30, 30, 15, 20].map(|high| self.dice().range(1, high));
                    let (a, b, u) = (x + c, y + c, x + y + c);
                    for (name, value) in [("a", a), ("b", b), ("c", c), ("u", u), ("n", u + rest), ("r", rest)] {
                        self.bind(name, value);
                    }
                    self.say("set");
                }
                _ => {
                    let (h, g) = (self.dice().range(1, 40), self.dice().range(1, 40));
                    let (n, r) = (h + g, 2 * h + 4 * g);
                    for (name, value) in [("h", h), ("g", g), ("n", n), ("r", r), ("s", 2 * n), ("t", r - 2 * n)] {
                        self.bind(name, value);
                    }
                    self.say("leg");
                }
            }
        }
    }
}

/// Who is a knight, of the two speakers.
const CASES: [[bool; 2]; 4] = [[true, true], [true, false], [false, true], [false, false]];

/// Number of things a speaker may claim; see [`holds`].
const CLAIMS: usize = 7;

/// Whether `claim`, made by speaker `me`, is true in `case`.
fn holds(claim: usize, me: usize, case: [bool; 2]) -> bool {
    let knights = case.iter().filter(|&&knight| knight).count();
    match claim {
        0 => case[1 - me],
        1 => !case[1 - me],
        2 => knights == 0,
        3 => knights < 2,
        4 => knights != 1,
        5 => knights == 1,
        _ => knights == 2,
    }
}

/// The first speaker whose words do not fit who they are in `case`.
fn broken(claims: [usize; 2], case: [bool; 2]) -> Option<usize> {
    (0..2).find(|&i| holds(claims[i], i, case) != case[i])
}

fn kind(language: Language, knight: bool) -> &'static str {
    if knight { language.of("knight", "骑士") } else { language.of("knave", "无赖") }
}

fn list(numbers: &[i64], between: &str) -> String {
    numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_by_hand() {
        // "We are both knaves" cannot be said by a knight and is false of a knave with a knight.
        assert_eq!(broken([2, 0], [true, true]), Some(0));
        assert_eq!(broken([2, 1], [false, true]), None);
        assert_eq!(broken([2, 1], [false, false]), Some(0));
        assert!(holds(5, 0, [true, false]) && !holds(4, 1, [true, false]) && holds(3, 1, [false, false]));
    }

    /// The sentence that names the solution of a sequence gives the number that its arithmetic gives.
    #[test]
    fn sequences_continue_by_their_own_arithmetic() {
        let mut checked = 0;
        for i in 0..300 {
            let mut scene = Scene::new(Dice::new(5, i));
            let mut page = Page { language: Language::English, scene: &mut scene, lines: Vec::new() };
            page.sequence();
            let end = page.lines[2].clone();
            let words: Vec<&str> = end.split([' ', '.', ';', ',']).collect();
            let at = words.iter().rposition(|&w| w == "=").unwrap();
            let [a, b, r] = [at - 3, at - 1, at + 1].map(|i| words[i].parse::<i64>().unwrap());
            let expected = match words[at - 2] {
                "+" => a + b,
                "-" => a - b,
                _ => a * b,
            };
            assert_eq!(expected, r, "{end}");
            checked += 1;
        }
        assert_eq!(checked, 300);
    }

    #[test]
    fn knights_have_one_solution_told_last() {
        for i in 0..100 {
            let mut scene = Scene::new(Dice::new(6, i));
            let mut page = Page { language: Language::English, scene: &mut scene, lines: Vec::new() };
            page.knights();
            assert_eq!(page.lines.len(), 6, "intro, four cases, solution");
        }
    }
}
