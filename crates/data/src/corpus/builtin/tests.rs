//! What the corpus promises: sizes, shares, how far it compresses, what validation shares with training, and that its
//! arithmetic is right.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::Write;

use lzma_rust2::{XzOptions, XzWriter};

use super::*;
use crate::split;

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

/// Bytes of `text` after XZ at its highest preset, as `xz -9` gives.
fn xz_size(text: &str) -> usize {
    let mut writer = XzWriter::new(Vec::new(), XzOptions::with_preset(9)).unwrap();
    writer.write_all(text.as_bytes()).unwrap();
    writer.finish().unwrap().len()
}

/// Five to one is the limit; we keep a distance from it. Shown by kind with `--nocapture`.
#[test]
fn the_corpus_does_not_compress_far() {
    let documents = documents(0, DEFAULT_BYTES);
    let mut kinds: BTreeMap<&str, String> = BTreeMap::new();
    for (i, document) in documents.iter().enumerate() {
        *kinds.entry(kind(0, i as u64)).or_default() += &format!("{document}\n\n");
    }
    for (kind, text) in &kinds {
        println!("{kind}: {} bytes, xz {:.2}:1", text.len(), text.len() as f64 / xz_size(text) as f64);
    }
    let whole = documents.join("\n\n");
    assert!(whole.len() >= 3_000_000, "{}", whole.len());
    let ratio = whole.len() as f64 / xz_size(&whole) as f64;
    println!("whole: {} bytes, xz {ratio:.2}:1", whole.len());
    assert!(ratio < 4.85, "{ratio:.3}:1");
}

/// What shingles are counted in: a word is a run of letters and digits, but each Chinese character is one by itself.
/// So English and code are counted by words, Chinese by characters, and a document that mixes them by both.
fn words(text: &str) -> Vec<&str> {
    let chinese = |c: char| ('\u{3400}'..'\u{a000}').contains(&c);
    let mut words = Vec::new();
    let mut start = None;
    for (at, c) in text.char_indices() {
        let inside = c.is_alphanumeric() && !chinese(c);
        match (start, inside) {
            (None, true) => start = Some(at),
            (Some(from), false) => {
                words.push(&text[from..at]);
                start = None;
            }
            _ => {}
        }
        if chinese(c) {
            words.push(&text[at..at + c.len_utf8()]);
        }
    }
    words.extend(start.map(|from| &text[from..]));
    words
}

/// Different runs of eight words; a shorter document is one shingle.
fn shingles(text: &str) -> HashSet<Vec<&str>> {
    let words = words(text);
    if words.len() < 8 {
        return HashSet::from([words]);
    }
    words.windows(8).map(<[&str]>::to_vec).collect()
}

#[test]
fn words_by_hand() {
    assert_eq!(words("4 7+85, it's 小明有3个"), ["4", "7", "85", "it", "s", "小", "明", "有", "3", "个"]);
    assert_eq!(shingles("a b c d e f g h i").len(), 2);
    assert_eq!(shingles("a b").len(), 1);
}

/// No held-out document shares over half of its shingles with training, over the real split of the real corpus.
#[test]
fn validation_is_not_in_training() {
    for seed in 0..3 {
        let documents = documents(seed, DEFAULT_BYTES);
        let split = split(documents.len(), 0.05, seed).unwrap();
        let held: Vec<HashSet<Vec<&str>>> = split.validation.iter().map(|&i| shingles(&documents[i])).collect();
        let asked: HashSet<&Vec<&str>> = held.iter().flatten().collect();
        let mut seen: HashSet<Vec<&str>> = HashSet::new();
        for &i in &split.train {
            seen.extend(shingles(&documents[i]).into_iter().filter(|s| asked.contains(s)));
        }
        let mut shares: BTreeMap<&str, Vec<(f64, usize)>> = BTreeMap::new();
        for (shingles, &i) in held.iter().zip(&split.validation) {
            let shared = shingles.iter().filter(|s| seen.contains(*s)).count();
            let share = shared as f64 / shingles.len() as f64;
            shares.entry(kind(seed, i as u64)).or_default().push((share, i));
        }
        for (kind, shares) in &shares {
            let worst = shares.iter().fold((0.0, 0), |a, &b| if b.0 > a.0 { b } else { a });
            let mean = shares.iter().map(|s| s.0).sum::<f64>() / shares.len() as f64;
            println!("seed {seed}, {kind}: {} documents, worst {:.3}, mean {mean:.3}", shares.len(), worst.0);
        }
        for &(share, i) in shares.values().flatten() {
            assert!(share <= 0.5, "seed {seed}, document {i} shares {share:.2}:\n{}", documents[i]);
        }
    }
}

/// Unseen problems are in the corpus's format but not in it, and their answers are right.
#[test]
fn problems_are_unseen_and_openings_too() {
    for seed in 0..2 {
        let corpus = documents(seed, DEFAULT_BYTES).join("\n");
        let problems = problems(seed, 240);
        for problem in &problems {
            assert!(!corpus.contains(&problem.prompt), "{problem:?}");
            assert!(problem.prompt.ends_with('\n') && !problem.answer.is_empty(), "{problem:?}");
        }
        for language in ["en", "zh"] {
            for kind in ["running sum", "product and sum", "addition", "subtraction", "equation", "word problem"] {
                let count = problems.iter().filter(|p| p.kind == kind && p.language == language).count();
                assert_eq!(count, 20, "{kind} {language}");
            }
        }
        let openings = openings(seed);
        assert_eq!(openings.len(), 6);
        for (_, text) in openings {
            assert!(text.len() >= 20 && !corpus.contains(&text), "{text}");
        }
    }
}

/// The values of "a+b-c" and the like, multiplication and division first; None if `text` is no such expression.
fn value(text: &str) -> Option<i64> {
    let text: String = text.replace(['×', '*'], "*").replace('÷', "/").split_whitespace().collect();
    let mut total = 0;
    let mut rest = text.as_str();
    let mut sign = 1;
    loop {
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let mut factors = rest[..end].split('*');
        let mut product = quotient(factors.next()?)?;
        for factor in factors {
            product *= quotient(factor)?;
        }
        total += sign * product;
        match rest.as_bytes().get(end) {
            None => return Some(total),
            Some(b'+') => sign = 1,
            Some(_) => sign = -1,
        }
        rest = &rest[end + 1..];
    }
}

fn quotient(text: &str) -> Option<i64> {
    match text.split_once('/') {
        Some((a, b)) => {
            let (a, b): (i64, i64) = (a.parse().ok()?, b.parse().ok()?);
            (b != 0 && a % b == 0).then(|| a / b)
        }
        None => text.parse().ok(),
    }
}

/// Every line of working is a true equation that goes on from the one before, and every answer is what its question
/// asks for, worked out here from the text.
#[test]
fn worked_arithmetic_is_right() {
    let (mut lines, mut answers) = (0, [0; 4]);
    for i in 0..6000 {
        let mut scene = Scene::new(Dice::new(3, i));
        let Part::Drill = Part::draw(&mut scene.dice) else { continue };
        let text = document(3, i).0;
        let (mut asked, mut operands, mut last) = (None, Vec::new(), 0);
        for line in text.lines() {
            if let Some(found) = line.strip_prefix('=') {
                let found: i64 = found.split_whitespace().collect::<String>().parse().unwrap();
                match asked.take() {
                    Some(Asked::Number(kind, n)) => {
                        assert_eq!(found, n, "{text}");
                        answers[kind] += 1;
                    }
                    Some(Asked::Story(numbers)) => {
                        assert_eq!((found, &operands), (last, &numbers), "{text}");
                        answers[3] += 1;
                    }
                    None => panic!("an answer without a question: {text}"),
                }
                operands.clear();
            } else if let Some((left, right)) =
                line.split_once('=').filter(|(left, right)| value(left).is_some() && value(right).is_some())
            {
                assert_eq!(value(left), value(right), "{line} in\n{text}");
                let numbers = numbers(left);
                if operands.is_empty() {
                    operands.push(numbers[0]);
                }
                operands.push(numbers[1]);
                last = value(right).unwrap();
                lines += 1;
            } else if let Some(question) = question(line) {
                asked = Some(question);
            }
        }
        assert!(asked.is_none(), "a question without an answer: {text}");
    }
    assert!(answers.iter().all(|&n| n > 500) && lines > 6000, "{answers:?}, {lines}");
}

#[derive(Debug)]
enum Asked {
    /// 0 an expression, 1 columns, 2 an equation; and what it comes to.
    Number(usize, i64),
    /// A story with these numbers.
    Story(Vec<i64>),
}

fn numbers(text: &str) -> Vec<i64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

fn question(line: &str) -> Option<Asked> {
    if let Some(n) = unknown(line) {
        return Some(Asked::Number(2, n));
    }
    if let Some(n) = columns(line) {
        return Some(Asked::Number(1, n));
    }
    // "Add 4 7 and 8 5" comes with its columns on the next line.
    let mut expressions =
        line.split(|c: char| !(c.is_ascii_digit() || "+-×".contains(c))).filter(|e| numbers(e).len() > 2);
    match expressions.next() {
        Some(e) => Some(Asked::Number(0, value(e)?)),
        None => (numbers(line).len() == 4).then(|| Asked::Story(numbers(line))),
    }
}

/// What a line such as "4 7+8 5" comes to.
fn columns(line: &str) -> Option<i64> {
    let mark = line.find(['+', '-'])?;
    let number = |s: &str| s.split(' ').collect::<String>().parse::<i64>().ok().filter(|_| s.contains(' '));
    let (a, b) = (number(&line[..mark])?, number(&line[mark + 1..])?);
    Some(if line.as_bytes()[mark] == b'+' { a + b } else { a - b })
}

/// The y of a line that holds an equation such as "3×y+4=19".
fn unknown(line: &str) -> Option<i64> {
    let at = line.find("×y")?;
    let start = line[..at]
        .rfind(|c: char| !c.is_ascii_digit())
        .map_or(0, |i| i + line[i..].chars().next().map_or(0, char::len_utf8));
    let factor: i64 = line[start..at].parse().ok()?;
    let (constant, total) = line[at + "×y".len()..].split_once('=')?;
    let digits = total.find(|c: char| !c.is_ascii_digit()).unwrap_or(total.len());
    let product = total[..digits].parse::<i64>().ok()? - constant.parse::<i64>().ok()?;
    (product % factor == 0).then_some(product / factor)
}
