//! Stories, dialogues, facts, recipes and letters in English and Chinese: grammars in `english.txt`, `chinese.txt`.

use std::sync::LazyLock;

use super::grammar::{Grammar, Scene};
use super::story::{Cast, story};

static ENGLISH: LazyLock<Grammar> =
    LazyLock::new(|| Grammar::parse(concat!(include_str!("english.txt"), "\n", include_str!("story_en.txt"))));
static CHINESE: LazyLock<Grammar> =
    LazyLock::new(|| Grammar::parse(concat!(include_str!("chinese.txt"), "\n", include_str!("story_zh.txt"))));

pub(super) fn english(scene: &mut Scene) -> String {
    let g = &*ENGLISH;
    // The animal on the wall of a story; elsewhere it is drawn again.
    g.bind_fresh("animal", "N", scene);
    if scene.dice.chance(65) {
        return story(g, &Cast { person: "person", chore: "chore" }, " ", scene);
    }
    scene.forget();
    // Who and what the text is about; templates refer to them by these names.
    cast(g, scene, &[("person", "A"), ("person", "B"), ("animal", "N"), ("animal", "X"), ("animal", "Y")]);
    cast(g, scene, &[("thing", "T"), ("place", "P")]);
    match scene.dice.below(10) {
        0..2 => g.say("story", scene),
        2..7 => dialogue(g, ["talk_open", "talk_b", "talk_a", "talk_end"], scene),
        7 => facts(g, ["fact_open", "fact_more", "note"], " ", scene),
        8 => {
            let steps = scene.dice.below(3) + 3;
            g.say_some("recipe", steps, scene).join(" ")
        }
        _ => letter(g, ["letter_open", "letter_body", "letter_end"], " ", scene),
    }
}

pub(super) fn chinese(scene: &mut Scene) -> String {
    let g = &*CHINESE;
    g.bind_fresh("dongwu", "N", scene);
    if scene.dice.chance(70) {
        return story(g, &Cast { person: "ren", chore: "shi" }, "", scene);
    }
    scene.forget();
    cast(g, scene, &[("ren", "A"), ("ren", "B"), ("dongwu", "N"), ("dongwu", "X"), ("dongwu", "Y")]);
    cast(g, scene, &[("dongxi", "T"), ("didian", "P")]);
    match scene.dice.below(10) {
        0..2 => g.say("gushi", scene),
        2..7 => dialogue(g, ["wen", "dab", "daa", "zaijian"], scene),
        7..9 => facts(g, ["zhishi", "zhishi2", "biji"], "", scene),
        _ => letter(g, ["xin1", "xin2", "xin3"], "", scene),
    }
}

fn cast(grammar: &Grammar, scene: &mut Scene, roles: &[(&str, &str)]) {
    for (section, name) in roles {
        grammar.bind_fresh(section, name, scene);
    }
}

fn dialogue(grammar: &Grammar, [open, second, first, end]: [&str; 4], scene: &mut Scene) -> String {
    let turns = scene.dice.below(4) + 2;
    let mut lines = vec![grammar.say(open, scene)];
    let answers = grammar.say_some(second, turns, scene);
    let replies = grammar.say_some(first, turns, scene);
    for (answer, reply) in answers.into_iter().zip(replies) {
        lines.extend([answer, reply]);
    }
    lines.pop();
    lines.push(grammar.say(end, scene));
    lines.join("\n")
}

fn facts(grammar: &Grammar, [open, more, note]: [&str; 3], space: &str, scene: &mut Scene) -> String {
    let count = scene.dice.below(4) + 2;
    let mut sentences = vec![grammar.say(open, scene)];
    sentences.extend(grammar.say_some(more, count, scene));
    let mut text = sentences.join(space);
    if scene.dice.chance(50) {
        text = format!("{text}\n{}", grammar.say(note, scene));
    }
    text
}

fn letter(grammar: &Grammar, [open, body, end]: [&str; 3], space: &str, scene: &mut Scene) -> String {
    let count = scene.dice.below(4) + 3;
    let open = grammar.say(open, scene);
    let body = grammar.say_some(body, count, scene).join(space);
    format!("{open}\n{body}\n{}", grammar.say(end, scene))
}
