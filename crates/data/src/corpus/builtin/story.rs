//! Stories from a small world: people, places and things with a state, a plot that changes it, and sentences that can
//! only say what the state holds. The plot is the same in both languages; the wording is `story_en.txt` and
//! `story_zh.txt`.

use super::grammar::{Grammar, Scene};

/// Sections that cast a story, by language.
pub(super) struct Cast {
    pub person: &'static str,
    pub chore: &'static str,
}

/// Where a thing is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Where {
    At(&'static str),
    With(&'static str),
}

/// The names under which templates know people (A, B, C), places (P, Q, R, S) and things (T, U, V).
struct World<'a> {
    grammar: &'a Grammar,
    scene: &'a mut Scene,
    things: Vec<(&'static str, Where)>,
    paragraphs: Vec<Vec<String>>,
}

/// One story; sentences of a paragraph are joined by `space`.
pub(super) fn story(grammar: &Grammar, cast: &Cast, space: &str, scene: &mut Scene) -> String {
    for name in ["A", "B", "C"] {
        grammar.bind_fresh(cast.person, name, scene);
    }
    for name in ["P", "Q", "R", "S"] {
        grammar.bind_fresh("spot", name, scene);
    }
    for name in ["T", "U", "V"] {
        grammar.bind_fresh("item", name, scene);
    }
    grammar.bind_fresh("kit", "K", scene);
    grammar.bind_fresh(cast.chore, "H", scene);
    let mut world = World { grammar, scene, things: Vec::new(), paragraphs: vec![Vec::new()] };
    match world.scene.dice.below(3) {
        0 => world.search(),
        1 => world.trade(),
        _ => world.mend(),
    }
    let paragraphs: Vec<String> = world.paragraphs.iter().map(|p| p.join(space)).collect();
    paragraphs.join("\n")
}

impl World<'_> {
    fn say(&mut self, section: &str) {
        let sentence = self.grammar.say(section, self.scene);
        self.paragraphs.last_mut().expect("there is a first paragraph").push(sentence);
    }

    fn paragraph(&mut self) {
        self.paragraphs.push(Vec::new());
    }

    fn maybe_aside(&mut self) {
        if self.scene.dice.chance(45) {
            self.say("aside");
        }
    }

    fn put(&mut self, thing: &'static str, place: Where) {
        self.things.retain(|(name, _)| *name != thing);
        self.things.push((thing, place));
    }

    fn holds(&self, person: &'static str, thing: &'static str) -> bool {
        self.things.contains(&(thing, Where::With(person)))
    }

    /// `from` gives `to` the thing; a plot that lets people give what they do not have is a mistake in this file.
    fn give(&mut self, from: &'static str, to: &'static str, thing: &'static str) {
        assert!(self.holds(from, thing), "{from} has no {thing}: {:?}", self.things);
        self.put(thing, Where::With(to));
    }

    /// A loses T, finds U where T is not, earns a hint from B, and gets T back from C.
    fn search(&mut self) {
        self.put("T", Where::At("P"));
        self.put("U", Where::At("Q"));
        self.say("s_intro");
        self.maybe_aside();
        self.say("s_loss");
        self.put("T", Where::With("C"));
        self.paragraph();
        self.say("s_look");
        self.put("U", Where::With("A"));
        if self.scene.dice.chance(50) {
            self.say("s_again");
        }
        self.maybe_aside();
        self.say("s_meet");
        self.say("s_help");
        self.say("s_tell");
        self.paragraph();
        self.say("s_find");
        if self.scene.dice.chance(65) {
            self.say("s_swap");
            self.give("A", "C", "U");
        } else {
            self.say("s_give");
        }
        self.give("C", "A", "T");
        self.say("s_end");
    }

    /// A gets T from C for V, which B gives for U.
    fn trade(&mut self) {
        self.put("T", Where::With("C"));
        self.put("V", Where::With("B"));
        self.say("t_open");
        self.say("t_want");
        self.maybe_aside();
        self.say("t_next");
        self.paragraph();
        let owns = self.scene.dice.chance(50);
        self.say(if owns { "t_have" } else { "t_earn" });
        self.put("U", Where::With("A"));
        self.maybe_aside();
        self.say("t_swap1");
        self.give("A", "B", "U");
        self.give("B", "A", "V");
        self.say("t_swap2");
        self.give("A", "C", "V");
        self.give("C", "A", "T");
        self.paragraph();
        self.say("t_end");
        debug_assert!(self.holds("A", "T") && self.holds("B", "U") && self.holds("C", "V"));
    }

    /// K breaks, B lends the tool that mends it for help with a chore.
    fn mend(&mut self) {
        self.put("tool", Where::With("B"));
        self.say("m_open");
        self.maybe_aside();
        self.say("m_break");
        self.say("m_need");
        self.paragraph();
        self.say("m_lend");
        self.maybe_aside();
        self.say("m_work");
        self.give("B", "A", "tool");
        self.say("m_fix");
        self.paragraph();
        self.say("m_end");
    }
}
