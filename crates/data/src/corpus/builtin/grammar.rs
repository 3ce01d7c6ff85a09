//! A small template grammar. A file holds sections: `@name` opens sentence templates, one to a line, and `&name` blocks
//! of lines separated by `---`; the tests count the uses of both. `%name` opens words, separated by `|` or line ends.
//! In a template
//!
//! - `$name` is a random entry of the section `name`, or the value bound to `name`; `$name~` where a letter follows;
//! - `$name:X` also binds the entry to `X`, avoiding values bound already; an entry `a/b/c` binds X, X1, X2 and gives a;
//! - `$name1x` is field 1 of a fresh entry (of `ran` in `run/ran/running`);
//! - `$(a|b)` is one of the alternatives, `\n` a line break;
//! - `a(n)` becomes "a" or "an", and `^` makes the next letter a capital (neither in blocks).

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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Words,
    Sentences,
    Blocks,
}

struct Section {
    entries: Vec<&'static str>,
    kind: Kind,
}

pub(super) struct Grammar {
    sections: HashMap<&'static str, Section>,
}

/// A template was used: which one, and how many lines it made. Only the tests ask how the templates are shared out.
#[cfg(test)]
pub(super) struct Use {
    pub section: &'static str,
    pub entry: usize,
    pub lines: usize,
}

/// One document in the making: its draws, what is bound, and which templates it has used.
pub(super) struct Scene {
    pub dice: Dice,
    #[cfg(test)]
    pub uses: Vec<Use>,
    bound: HashMap<String, String>,
}

impl Scene {
    pub fn new(dice: Dice) -> Self {
        Self {
            dice,
            #[cfg(test)]
            uses: Vec::new(),
            bound: HashMap::new(),
        }
    }

    pub fn bind(&mut self, name: &str, value: impl ToString) {
        self.bound.insert(name.to_owned(), value.to_string());
    }

    pub fn forget(&mut self) {
        self.bound.clear();
    }
}

impl Grammar {
    pub fn parse(file: &'static str) -> Self {
        let mut sections = HashMap::new();
        let mut rest = file.trim_start_matches(|c| c != '\n');
        while let Some((kind, name, body, after)) = next_section(rest) {
            let entries = match kind {
                Kind::Words => body.lines().flat_map(|line| line.split('|')).collect(),
                Kind::Sentences => body.lines().collect(),
                Kind::Blocks => body.split("\n---\n").map(|block| block.trim_end_matches('\n')).collect(),
            };
            let double = sections.insert(name, Section { entries, kind });
            assert!(double.is_none(), "two sections {name}");
            rest = after;
        }
        Self { sections }
    }

    /// A random template of `section`, filled in.
    pub fn say(&self, section: &str, scene: &mut Scene) -> String {
        let (name, found) = self.section(section);
        let i = scene.dice.below(found.entries.len());
        self.say_entry(name, i, scene)
    }

    /// `count` different templates of `section`, filled in.
    pub fn say_some(&self, section: &str, count: usize, scene: &mut Scene) -> Vec<String> {
        let (name, found) = self.section(section);
        let mut order: Vec<usize> = (0..found.entries.len()).collect();
        scene.dice.shuffle(&mut order);
        order.truncate(count);
        order.into_iter().map(|i| self.say_entry(name, i, scene)).collect()
    }

    fn say_entry(&self, name: &'static str, i: usize, scene: &mut Scene) -> String {
        let text = self.expand_entry(name, i, scene);
        if self.sections[name].kind == Kind::Blocks { text } else { finish(&text) }
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
        let text = self.expand(section.entries[i], scene);
        #[cfg(test)]
        if section.kind != Kind::Words {
            scene.uses.push(Use { section: name, entry: i, lines: text.lines().count() });
        }
        text
    }

    fn expand(&self, template: &str, scene: &mut Scene) -> String {
        let mut out = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('$') {
            out.push_str(before);
            if let Some(inside) = after.strip_prefix('(') {
                let (choices, tail) = inside.split_once(')').unwrap_or_else(|| panic!("no ) in {template}"));
                let choices: Vec<&str> = choices.split('|').collect();
                let choice: &str = choices[scene.dice.below(choices.len())];
                out.push_str(&self.expand(choice, scene));
                rest = tail;
                continue;
            }
            let (name, tail) = identifier(after);
            rest = tail;
            let bind_to = tail.strip_prefix(':').map(identifier).filter(|(name, _)| !name.is_empty());
            if let Some((to, tail)) = bind_to {
                out.push_str(&self.bind_fresh(name, to, scene));
                rest = tail.strip_prefix('~').unwrap_or(tail);
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
        if self.sections[name].kind != Kind::Words {
            value
        } else {
            value.split('/').nth(field).unwrap_or(&value).to_owned()
        }
    }

    /// Binds a random entry of the section `name`, and its fields, to `to`.
    pub fn bind_fresh(&self, name: &str, to: &str, scene: &mut Scene) -> String {
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

/// Kind, name and body of the section that opens at the first line end of `text`, and what follows it.
fn next_section(text: &'static str) -> Option<(Kind, &'static str, &'static str, &'static str)> {
    let text = text.strip_prefix('\n')?;
    let (head, body) = text.split_once('\n')?;
    let kind = match head.chars().next()? {
        '%' => Kind::Words,
        '@' => Kind::Sentences,
        '&' => Kind::Blocks,
        _ => panic!("no section opens at {head}"),
    };
    let end = ["\n@", "\n%", "\n&"].iter().filter_map(|mark| body.find(mark)).min().unwrap_or(body.len());
    Some((kind, &head[1..], body[..end].trim_end_matches('\n'), &body[end..]))
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

    const FILE: &str = "# about\n%verb\nrun/ran\n%who\nAda/she|Bo/he\n@line\n$who:A and $who:B $verb1x.\n\
        @other\n^$A1 ate a(n) $(egg) and a(n) $(pie).\\nEnd$verb~s\n&code\nx(n)\n---\ny(n)\n  ^ $who:A~_\n";

    #[test]
    fn templates_are_filled_in() {
        let grammar = Grammar::parse(FILE);
        let mut scene = Scene::new(Dice::new(1, 2));
        let line = grammar.say("line", &mut scene);
        assert!(line == "Ada and Bo ran." || line == "Bo and Ada ran.", "{line}");
        scene.bind("A1", "it");
        assert_eq!(grammar.say("other", &mut scene), "It ate an egg and a pie.\nEndruns");
        scene.forget();
        let mut blocks = grammar.say_some("code", 5, &mut scene);
        blocks.sort();
        assert_eq!(blocks[0], "x(n)");
        assert!(["y(n)\n  ^ Ada_", "y(n)\n  ^ Bo_"].contains(&blocks[1].as_str()));
        let uses: Vec<&str> = scene.uses.iter().map(|u| u.section).collect();
        assert_eq!(uses, ["line", "other", "code", "code"]);
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
