//! Mutations of a JSON value that leave it JSON: random bytes would hardly ever get past the parser.

use crate::Dice;
use serde_json::{Map, Value, json};

/// Mutates `text` if it is JSON: the new text, of one to four changes. `words` are keys and strings that mean something.
pub fn mutate_text(text: &[u8], dice: &mut Dice, words: &[String]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(text).ok()?;
    mutate(&mut value, dice, words);
    serde_json::to_vec(&value).ok()
}

/// One to four changes at random places.
pub fn mutate(value: &mut Value, dice: &mut Dice, words: &[String]) {
    for _ in 0..=dice.below(4) {
        let donor = descend(&mut value.clone(), dice).clone();
        change(descend(value, dice), donor, dice, words);
    }
}

/// A random node: from the root down, with a chance to stop at each step, so that a long list does not drown the rest.
fn descend<'a>(mut at: &'a mut Value, dice: &mut Dice) -> &'a mut Value {
    loop {
        let n = children(at);
        if n == 0 || dice.one_in(5) {
            return at;
        }
        let i = dice.below(n);
        at = match at {
            Value::Array(a) => &mut a[i],
            Value::Object(o) => o.values_mut().nth(i).expect("i is below the number of entries"),
            _ => unreachable!("a scalar has no children"),
        };
    }
}

fn children(v: &Value) -> usize {
    match v {
        Value::Array(a) => a.len(),
        Value::Object(o) => o.len(),
        _ => 0,
    }
}

fn change(at: &mut Value, donor: Value, dice: &mut Dice, words: &[String]) {
    match dice.below(8) {
        0 => *at = scalar(dice, words),
        1 => *at = donor,
        2 => {
            let inner = at.take();
            *at = if dice.one_in(2) { json!([inner]) } else { json!({ word(dice, words): inner }) };
        }
        _ => match at {
            Value::Array(a) => array(a, donor, dice),
            Value::Object(o) => object(o, donor, dice, words),
            Value::String(s) => string(s, dice, words),
            Value::Number(_) => *at = number(at, dice),
            Value::Bool(b) => *at = json!(!*b),
            Value::Null => *at = scalar(dice, words),
        },
    }
}

fn word(dice: &mut Dice, words: &[String]) -> String {
    dice.pick(words).cloned().unwrap_or_default()
}

/// Values at which code tends to break.
fn scalar(dice: &mut Dice, words: &[String]) -> Value {
    match dice.below(10) {
        0 => Value::Null,
        1 => json!(dice.one_in(2)),
        2 => json!(""),
        3 => json!([]),
        4 => json!({}),
        5 | 6 => json!(word(dice, words)),
        7 => json!([0.0, -0.0, 0.5, 1.5, -1.0, 1e-320, 1e308, 3.5e38, 9e15][dice.below(9)]),
        8 => json!(dice.below(20)),
        _ => json!((1u64 << dice.below(64)).wrapping_sub(dice.below(2) as u64)),
    }
}

fn number(v: &Value, dice: &mut Dice) -> Value {
    let Some(n) = v.as_u64() else {
        let x = v.as_f64().unwrap_or(0.0);
        return json!([x * 2.0, x / 2.0, -x, x + 1.0, x.floor(), x * 1e30][dice.below(6)]);
    };
    match dice.below(8) {
        0 => json!(n.wrapping_add(1)),
        1 => json!(n.wrapping_sub(1)),
        2 => json!(n.wrapping_mul(2)),
        3 => json!(n / 2),
        4 => json!(n.wrapping_mul(dice.below(1000) as u64)),
        5 => json!(n as f64),
        6 => json!((n as i64).wrapping_neg()),
        _ => json!(1u64 << dice.below(64)),
    }
}

fn string(s: &mut String, dice: &mut Dice, words: &[String]) {
    let cut = s.char_indices().map(|(i, _)| i).nth(dice.below(s.chars().count())).unwrap_or(0);
    match dice.below(6) {
        0 => *s = word(dice, words),
        1 => s.insert_str(cut, &word(dice, words)),
        2 => s.truncate(cut),
        3 => s.insert(cut, char::from_u32(dice.below(0x11_0000) as u32).unwrap_or('\n')),
        4 if s.len() < 1000 => *s = s.repeat(1 + dice.below(8)),
        _ => {
            if cut < s.len() {
                s.remove(cut);
            }
        }
    }
}

fn array(a: &mut Vec<Value>, donor: Value, dice: &mut Dice) {
    let (i, j) = (dice.below(a.len()), dice.below(a.len()));
    match dice.below(5) {
        0 => a.insert(i, donor),
        1 if !a.is_empty() => drop(a.remove(i)),
        2 if !a.is_empty() => a.swap(i, j),
        // Not of large parts: a few such changes in a row would fill the memory.
        3 if !a.is_empty() && children(&a[i]) < 4 => a.extend(vec![a[i].clone(); dice.below(20)]),
        _ => a.truncate(i),
    }
}

fn object(o: &mut Map<String, Value>, donor: Value, dice: &mut Dice, words: &[String]) {
    let key = o.keys().nth(dice.below(o.len())).cloned().unwrap_or_default();
    let other = o.keys().nth(dice.below(o.len())).cloned().unwrap_or_default();
    match dice.below(6) {
        0 => drop(o.insert(word(dice, words), scalar(dice, words))),
        1 => drop(o.insert(word(dice, words), donor)),
        2 => drop(o.shift_remove(&key)),
        3 => {
            // Another name for the same thing.
            let value = o.shift_remove(&key).unwrap_or(donor);
            let mut name = if dice.one_in(3) { word(dice, words) } else { key };
            string(&mut name, dice, words);
            o.insert(name, value);
        }
        4 => {
            let (a, b) = (o.get(&key).cloned().unwrap_or_default(), o.get(&other).cloned().unwrap_or_default());
            o.insert(key, b);
            o.insert(other, a);
        }
        _ => drop(o.insert(key, donor)),
    }
}
