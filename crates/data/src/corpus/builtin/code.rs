//! Small modules of Python and Rust (blocks in `code.txt`), and short programs with the values they compute.

use std::sync::LazyLock;

use super::grammar::{Dice, Grammar, Scene};

static CODE: LazyLock<Grammar> = LazyLock::new(|| Grammar::parse(include_str!("code.txt")));

const NAMES: [&str; 20] = [
    "a", "b", "c", "n", "x", "y", "total", "count", "price", "width", "height", "left", "right", "score", "step",
    "limit", "size", "sum", "rest", "speed",
];

/// A header, one or two functions or types, and a program as in [`trace`].
pub(super) fn module(scene: &mut Scene) -> String {
    let rust = scene.dice.chance(45);
    let (head, blocks) = if rust { ("rs_head", "rs") } else { ("py_head", "py") };
    let mut parts = Vec::new();
    if scene.dice.chance(70) {
        parts.push(CODE.say(head, scene).trim_end().to_owned());
    }
    for _ in 0..=scene.dice.below(2) {
        // Names are bound for one function at a time.
        scene.forget();
        parts.push(CODE.say(blocks, scene));
    }
    parts.push(program(&mut scene.dice, rust, 9));
    parts.join("\n\n")
}

/// A straight-line program; most lines say in a comment what they compute.
pub(super) fn trace(scene: &mut Scene) -> String {
    let rust = scene.dice.chance(40);
    program(&mut scene.dice, rust, 5)
}

/// As [`trace`], of at least `least` lines.
fn program(dice: &mut Dice, rust: bool, least: i64) -> String {
    let mut names = NAMES;
    dice.shuffle(&mut names);
    let mut values: Vec<(&str, i64)> = Vec::new();
    let mut lines = Vec::new();
    for _ in 0..dice.range(least, 13) {
        let (code, value) = expression(dice, &values);
        let fresh = values.len() < 3 || dice.chance(40);
        let name = if fresh { names[values.len()] } else { dice.pick(&values).0 };
        match values.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = value,
            None => values.push((name, value)),
        }
        let (open, end) = match (rust, fresh) {
            (true, true) => ("let mut ", ";"),
            (true, false) => ("", ";"),
            (false, _) => ("", ""),
        };
        let mark = if rust { "//" } else { "#" };
        let note = if dice.chance(75) { format!("  {mark} {name} = {value}") } else { String::new() };
        lines.push(format!("{open}{name} = {code}{end}{note}"));
    }
    let (name, value) = *dice.pick(&values);
    lines.push(if rust { format!("assert_eq!({name}, {value});") } else { format!("print({name})  # {value}") });
    lines.join("\n")
}

/// An expression over the names so far and its value, kept small.
fn expression(dice: &mut Dice, values: &[(&str, i64)]) -> (String, i64) {
    let operand = |dice: &mut Dice| {
        if !values.is_empty() && dice.chance(65) {
            let &(name, value) = dice.pick(values);
            (name.to_owned(), value)
        } else {
            let value = dice.range(1, 400);
            (value.to_string(), value)
        }
    };
    if values.is_empty() {
        let value = dice.range(1, 999);
        return (value.to_string(), value);
    }
    let ((a, x), (b, y)) = (operand(dice), operand(dice));
    match dice.below(5) {
        0 | 1 => (format!("{a} + {b}"), x + y),
        2 => (format!("{a} - {b}"), x - y),
        3 if x.abs() < 1000 && y.abs() < 1000 => (format!("{a} * {b}"), x * y),
        _ => {
            let k = dice.range(2, 40);
            // The remainder of a negative number differs between the languages, so there is none.
            if x >= 0 { (format!("{a} % {k} + {b}"), x % k + y) } else { (format!("{b} - {a}"), y - x) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recomputes each noted value from the values noted or assigned before it.
    #[test]
    fn traces_end_in_the_value_they_compute() {
        for i in 0..200 {
            let mut scene = Scene::new(Dice::new(11, i));
            let text = trace(&mut scene);
            let mut values = std::collections::HashMap::new();
            for line in text.lines() {
                let plain = line.split("  #").next().unwrap().split("  //").next().unwrap();
                let plain = plain.trim_start_matches("let mut ").trim_end_matches(';');
                if let Some((name, code)) = plain.split_once(" = ") {
                    let tokens: Vec<&str> = code.split(' ').collect();
                    let of = |t: &str| t.parse().unwrap_or_else(|_| values[t]);
                    let value: i64 = match tokens[..] {
                        [a] => of(a),
                        [a, "+", b] => of(a) + of(b),
                        [a, "-", b] => of(a) - of(b),
                        [a, "*", b] => of(a) * of(b),
                        [a, "%", k, "+", b] => of(a) % of(k) + of(b),
                        _ => panic!("{line}"),
                    };
                    values.insert(name.to_owned(), value);
                    let note = line.rsplit_once(" = ").unwrap().1;
                    if line.matches(" = ").count() == 2 {
                        assert_eq!(note, value.to_string(), "{text}");
                    }
                } else {
                    let inside = plain.split_once('(').unwrap().1.trim_end_matches(')');
                    let name = inside.split(',').next().unwrap();
                    assert!(line.contains(&values[name].to_string()), "{text}");
                }
            }
        }
    }
}
