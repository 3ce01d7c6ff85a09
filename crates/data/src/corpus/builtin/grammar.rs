//! A small template grammar. A file holds sections: `@name` opens sentence templates, one to a line, whose uses are
//! counted; `%name` opens words, separated by `|` or line ends. In a template
//!
//! - `$name` is a random entry of the section `name`, or the value bound to `name`; `$name~` where a letter follows;
//! - `$name:X` also binds the entry to `X`, avoiding values bound already; an entry `a/b/c` binds X, X1, X2 and gives a;
//! - `$name1x` is field 1 of a fresh entry (of `ran` in `run/ran/running`);
//! - `$(a|b)` is one of the alternatives, `\n` a line break;
//! - `a(n)` becomes "a" or "an", and `^` makes the next letter a capital.

use std::collections::HashMap;

use hadal_numerics::{Purpose, Rng};

/// Random draws of one document, in order.
pub(super) struct Dice {
    rng: Rng,
    next: u64,
}

impl Dice {
    pub fn new(seed: u64, document: u64) -> Self {
        Self { rng: Rng::new(seed, Purpose::Corpus, document), next: 0 }
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        self.rng.below(self.next - 1, n as u64) as usize
    }

    /// Uniform in low..=high.
    pub fn range(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as usize) as i64
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

struct Section {
    entries: Vec<&'static str>,
    counted: bool,
}

pub(super) struct Grammar {
    sections: HashMap<&'static str, Section>,
}

/// A counted template: its section and number.
pub(super) type Use = (&'static str, usize);

/// One document in the making: its draws, what is bound, and which templates it has used.
pub(super) struct Scene {
    pub dice: Dice,
    pub uses: Vec<Use>,
    bound: HashMap<String, String>,
}

impl Scene {
    pub fn new(dice: Dice) -> Self {
        Self { dice, uses: Vec::new(), bound: HashMap::new() }
    }

    pub fn bind(&mut self, name: &str, value: impl ToString) {
        self.bound.insert(name.to_owned(), value.to_string());
    }

    pub fn get(&self, name: &str) -> &str {
        self.bound.get(name).unwrap_or_else(|| panic!("nothing is bound to {name}"))
    }
}

impl Grammar {
    pub fn parse(file: &'static str) -> Self {
        let mut sections: HashMap<&'static str, Section> = HashMap::new();
        let mut current = "";
        for line in file.lines().filter(|line| !line.is_empty() && !line.starts_with("# ")) {
            if let Some(name) = line.strip_prefix(['@', '%']) {
                current = name;
                sections.insert(name, Section { entries: Vec::new(), counted: line.starts_with('@') });
                continue;
            }
            let section = sections.get_mut(current).unwrap_or_else(|| panic!("no section above: {line}"));
            if section.counted {
                section.entries.push(line);
            } else {
                section.entries.extend(line.split('|'));
            }
        }
        Self { sections }
    }

    /// A random template of `section`, filled in.
    pub fn say(&self, section: &str, scene: &mut Scene) -> String {
        finish(&self.expand_section(section, scene))
    }

    /// `count` different templates of `section`, filled in.
    pub fn say_some(&self, section: &str, count: usize, scene: &mut Scene) -> Vec<String> {
        let (name, found) = self.section(section);
        let mut order: Vec<usize> = (0..found.entries.len()).collect();
        scene.dice.shuffle(&mut order);
        order.truncate(count);
        order.into_iter().map(|i| finish(&self.expand_entry(name, i, scene))).collect()
    }

    /// Fills in a template that is not of this grammar.
    pub fn fill(&self, template: &str, scene: &mut Scene) -> String {
        finish(&self.expand(template, scene))
    }

    fn section(&self, name: &str) -> (&'static str, &Section) {
        let (name, section) = self.sections.get_key_value(name).unwrap_or_else(|| panic!("no section {name}"));
        (name, section)
    }

    fn expand_section(&self, name: &str, scene: &mut Scene) -> String {
        let (name, section) = self.section(name);
        let i = scene.dice.below(section.entries.len());
        self.expand_entry(name, i, scene)
    }

    fn expand_entry(&self, name: &'static str, i: usize, scene: &mut Scene) -> String {
        let section = &self.sections[name];
        if section.counted {
            scene.uses.push((name, i));
        }
        self.expand(section.entries[i], scene)
    }

    fn expand(&self, template: &str, scene: &mut Scene) -> String {
        let mut out = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('$') {
            out.push_str(before);
            if let Some(inside) = after.strip_prefix('(') {
                let (choices, tail) = inside.split_once(')').unwrap_or_else(|| panic!("no ) in {template}"));
                let choices: Vec<&str> = choices.split('|').collect();
                out.push_str(&self.expand(scene.dice.pick(&choices), scene));
                rest = tail;
                continue;
            }
            let (name, tail) = identifier(after);
            rest = tail;
            let bind_to = tail.strip_prefix(':').map(identifier).filter(|(name, _)| !name.is_empty());
            if let Some((to, tail)) = bind_to {
                out.push_str(&self.bind_fresh(name, to, scene));
                rest = tail;
            } else {
                out.push_str(&self.lookup(name, scene));
                rest = rest.strip_prefix('~').unwrap_or(rest);
            }
        }
        out.push_str(rest);
        out
    }

    fn lookup(&self, name: &str, scene: &mut Scene) -> String {
        if let Some(value) = scene.bound.get(name) {
            return value.clone();
        }
        let (name, field) = match name.strip_suffix('x') {
            Some(short) if short.ends_with(|c: char| c.is_ascii_digit()) => {
                (&short[..short.len() - 1], short[short.len() - 1..].parse().unwrap_or(0))
            }
            _ => (name, 0),
        };
        let value = self.expand_section(name, scene);
        // A sentence may contain slashes; a word with fields is split at them.
        if self.sections[name].counted { value } else { value.split('/').nth(field).unwrap_or(&value).to_owned() }
    }

    fn bind_fresh(&self, name: &str, to: &str, scene: &mut Scene) -> String {
        let mut value = self.expand_section(name, scene);
        for _ in 0..20 {
            let first = value.split('/').next().unwrap_or(&value);
            if !scene.bound.values().any(|bound| bound == first) {
                break;
            }
            value = self.expand_section(name, scene);
        }
        for (i, field) in value.split('/').enumerate() {
            let key = if i == 0 { to.to_owned() } else { format!("{to}{i}") };
            scene.bound.insert(key, field.to_owned());
        }
        value.split('/').next().unwrap_or(&value).to_owned()
    }
}

fn identifier(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    text.split_at(end)
}

/// Articles, capitals and line breaks.
fn finish(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['^', '(', '\\']) {
        let (before, mark) = rest.split_at(at);
        out.push_str(before);
        if let Some(after) = mark.strip_prefix("(n)") {
            if after.trim_start().starts_with(['a', 'e', 'i', 'o', 'u']) {
                out.push('n');
            }
            rest = after;
        } else if let Some(after) = mark.strip_prefix('^') {
            let mut chars = after.chars();
            out.extend(chars.next().map(|c| c.to_ascii_uppercase()));
            rest = chars.as_str();
        } else if let Some(after) = mark.strip_prefix("\\n") {
            out.push('\n');
            rest = after;
        } else {
            out.push_str(&mark[..1]);
            rest = &mark[1..];
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# about\n%verb\nrun/ran\n%who\nAda/she|Bo/he\n@line\n$who:A and $who:B $verb1x.\n@other\n^$A1 ate a(n) $(egg) and a(n) $(pie) f(n).\\nEnd$verb~s";

    #[test]
    fn templates_are_filled_in() {
        let grammar = Grammar::parse(FILE);
        let mut scene = Scene::new(Dice::new(1, 2));
        let line = grammar.say("line", &mut scene);
        assert!(line == "Ada and Bo ran." || line == "Bo and Ada ran.", "{line}");
        scene.bind("A1", "it");
        assert_eq!(grammar.say("other", &mut scene), "It ate an egg and a pie f.\nEndruns");
        assert_eq!(scene.uses, [("line", 0), ("other", 0)]);
        assert_eq!(scene.get("A1"), "it");
    }

    #[test]
    fn dice_cover_their_range() {
        let mut dice = Dice::new(5, 0);
        let draws: std::collections::BTreeSet<i64> = (0..200).map(|_| dice.range(-2, 3)).collect();
        assert_eq!(draws.into_iter().collect::<Vec<_>>(), [-2, -1, 0, 1, 2, 3]);
        let mut order = [0, 1, 2, 3, 4, 5, 6, 7];
        dice.shuffle(&mut order);
        assert_ne!(order, [0, 1, 2, 3, 4, 5, 6, 7]);
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
