#![no_main]
//! Any bytes as `model.safetensors.index.json` beside fixed shards, some of them broken: opened and loaded.

use hadal_fuzz::model::{World, shards, tiny};
use hadal_fuzz::{Dice, json, put, words};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::sync::LazyLock;

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    shards(world.dir.path());
    world
});
static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| words(include_str!("../dict/index.dict")));

fuzz_target!(|data: &[u8]| {
    WORLD.write("model.safetensors.index.json", data);
    WORLD.load(&tiny());
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut dice = Dice::new(seed);
    let new = if dice.one_in(5) { None } else { json::mutate_text(&data[..size], &mut dice, &WORDS) };
    new.and_then(|new| put(&new, data, max_size)).unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
});
