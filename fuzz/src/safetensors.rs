//! Mutations of a safetensors file that mend what a mutation breaks: the header's length, the offsets, the size of the
//! data. Without them no input would get past the header.

use crate::{Dice, json};
use serde_json::{Value, json};

const DTYPES: [(&str, usize); 16] = [
    ("F32", 32),
    ("BF16", 16),
    ("F16", 16),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("I32", 32),
    ("I16", 16),
    ("I8", 8),
    ("U8", 8),
    ("BOOL", 8),
    ("F4", 4),
    ("C64", 64),
];

/// Mutates a file whose header can be found; None for any other bytes.
pub fn mutate(file: &[u8], max: usize, dice: &mut Dice, words: &[String]) -> Option<Vec<u8>> {
    let (header, data) = split(file)?;
    let mut data = data.to_vec();
    if dice.one_in(6) {
        damage(&mut data, dice);
        return Some(join(header, &data));
    }
    let mut value: Value = serde_json::from_slice(header).ok()?;
    for _ in 0..=dice.below(3) {
        match dice.below(3) {
            0 => json::mutate(&mut value, dice, words),
            1 => tensor(&mut value, dice),
            _ => name(&mut value, dice, words),
        }
    }
    if !dice.one_in(6) {
        data.resize(mend(&mut value, max).unwrap_or(data.len()), 0x3c);
    }
    Some(join(&serde_json::to_vec(&value).ok()?, &data))
}

/// Header and data, where the header's length fits.
pub fn split(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// A file of both.
pub fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Numbers that are none, or another length.
fn damage(data: &mut Vec<u8>, dice: &mut Dice) {
    let i = dice.below(data.len());
    match dice.below(4) {
        0 => data.truncate(i),
        1 => data.push(0),
        2 => data[i..].iter_mut().take(4).for_each(|b| *b = 0xff),
        _ => data[i..].iter_mut().take(8).for_each(|b| *b = dice.bits() as u8),
    }
}

/// Another dtype or shape of a tensor.
fn tensor(header: &mut Value, dice: &mut Dice) {
    let Some(map) = header.as_object_mut() else { return };
    let i = dice.below(map.len());
    let Some(Value::Object(entry)) = map.values_mut().nth(i) else { return };
    if dice.one_in(2) {
        entry.insert("dtype".into(), json!(DTYPES[dice.below(DTYPES.len())].0));
        return;
    }
    let Some(Value::Array(shape)) = entry.get_mut("shape") else { return };
    match dice.below(5) {
        0 => shape.reverse(),
        1 => shape.push(json!(1)),
        2 => drop(shape.pop()),
        3 => shape.iter_mut().for_each(|n| *n = json!(dice.below(5))),
        _ => shape.insert(0, json!(1u64 << dice.below(64))),
    }
}

/// A tensor more, fewer, or under another name.
fn name(header: &mut Value, dice: &mut Dice, words: &[String]) {
    let Some(map) = header.as_object_mut() else { return };
    let Some(key) = map.keys().nth(dice.below(map.len())).cloned() else { return };
    let layer = format!(".{}.", dice.below(5));
    let other = match dice.below(4) {
        0 => key.replacen(".0.", &layer, 1),
        1 => key.replacen(".1.", &layer, 1),
        2 => format!("{key}_scale_inv"),
        _ => dice.pick(words).cloned().unwrap_or_default(),
    };
    let value = if dice.one_in(3) { map.get(&key).cloned() } else { map.shift_remove(&key) };
    map.insert(other, value.unwrap_or_default());
}

/// Offsets in the order of the header that follow from dtypes and shapes: the bytes of data they need. None if some
/// tensor has no such size, or one that no input can have.
fn mend(header: &mut Value, max: usize) -> Option<usize> {
    let mut at = 0usize;
    for (name, entry) in header.as_object_mut()?.iter_mut() {
        if name == "__metadata__" {
            continue;
        }
        let dtype = entry.get("dtype")?.as_str()?.to_string();
        let bits = DTYPES.iter().find(|d| d.0 == dtype)?.1;
        let mut dims = entry.get("shape")?.as_array()?.iter().map(Value::as_u64);
        let elements = dims.try_fold(1u64, |n, d| n.checked_mul(d?))?;
        let bytes = usize::try_from(elements).ok()?.checked_mul(bits)?.div_ceil(8);
        let end = at.checked_add(bytes).filter(|&end| end <= max)?;
        entry.as_object_mut()?.insert("data_offsets".into(), json!([at, end]));
        at = end;
    }
    Some(at)
}
