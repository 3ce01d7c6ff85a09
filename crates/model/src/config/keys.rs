//! Typed reading of one JSON object, which remembers the keys that were asked for, so that the rest can be named.
//! TOML tables are read through it too.

use super::ConfigError;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

type Result<T> = std::result::Result<T, ConfigError>;

/// One object. Getters return None for an absent key; null is an error unless the getter says otherwise.
pub(super) struct Keys<'a> {
    /// What precedes a key in messages: empty, or the table's name and a dot.
    prefix: &'static str,
    map: &'a Map<String, Value>,
    seen: BTreeSet<&'static str>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(prefix: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { prefix, map, seen: BTreeSet::new() }
    }

    /// The key as messages name it.
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}{}", self.prefix, key.escape_debug())
    }

    /// The value whatever it is, null too; the key counts as known from here on.
    pub(super) fn raw(&mut self, key: &'static str) -> Option<&'a Value> {
        self.seen.insert(key);
        self.map.get(key)
    }

    /// True if the key is there, null or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> ConfigError {
        ConfigError::value(&self.name(key), expected, show(found))
    }

    fn read<T>(&mut self, key: &'static str, expected: &str, f: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.raw(key) {
            None => Ok(None),
            Some(v) => f(v).map(Some).ok_or_else(|| self.wrong(key, expected, v)),
        }
    }

    /// An integer >= 0, also written as a float.
    pub(super) fn usize(&mut self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, "an integer of at least 0", as_usize)
    }

    /// As `usize`, where null means none.
    pub(super) fn usize_or_null(&mut self, key: &'static str) -> Result<Option<Option<usize>>> {
        let f = |v: &Value| if v.is_null() { Some(None) } else { as_usize(v).map(Some) };
        self.read(key, "an integer of at least 0 or null", f)
    }

    /// A number, also written as an integer.
    pub(super) fn f64(&mut self, key: &'static str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// As `f64`, where null is as good as absent.
    pub(super) fn f64_or_null(&mut self, key: &'static str) -> Result<Option<f64>> {
        let f = |v: &Value| if v.is_null() { Some(None) } else { v.as_f64().map(Some) };
        Ok(self.read(key, "a number or null", f)?.flatten())
    }

    /// true or false; null is false, as Python has it.
    pub(super) fn bool(&mut self, key: &'static str) -> Result<Option<bool>> {
        self.read(key, "true or false", |v| if v.is_null() { Some(false) } else { v.as_bool() })
    }

    /// A string.
    pub(super) fn str(&mut self, key: &'static str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    /// An object; null and {} are as good as absent.
    pub(super) fn object(&mut self, key: &'static str) -> Result<Option<&'a Map<String, Value>>> {
        let f = |v: &'a Value| if v.is_null() { Some(None) } else { v.as_object().map(Some) };
        Ok(self.read(key, "an object or null", f)?.flatten().filter(|m| !m.is_empty()))
    }

    /// An object, empty or not.
    pub(super) fn table(&mut self, key: &'static str) -> Result<Option<&'a Map<String, Value>>> {
        self.read(key, "a table", Value::as_object)
    }

    /// Keys nobody asked for, in the order of the file.
    pub(super) fn unknown(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys().filter(|k| !self.seen.contains(k.as_str()))
    }

    /// The keys that were asked for.
    pub(super) fn known(&self) -> String {
        self.seen.iter().copied().collect::<Vec<_>>().join(", ")
    }
}

pub(super) fn as_usize(v: &Value) -> Option<usize> {
    // A float is taken where it is a whole number that f64 holds exactly.
    let whole = |x: f64| (x.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&x)).then_some(x as u64);
    v.as_u64().or_else(|| v.as_f64().filter(|_| v.is_f64()).and_then(whole)).and_then(|n| usize::try_from(n).ok())
}

/// A value as messages show it: one line, at most 60 characters.
pub(super) fn show(v: &Value) -> String {
    let s = v.to_string();
    if s.chars().count() <= 60 { s } else { s.chars().take(57).chain("...".chars()).collect() }
}
