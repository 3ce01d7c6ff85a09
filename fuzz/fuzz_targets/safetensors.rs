#![no_main]
//! Any bytes as `model.safetensors` beside a fixed configuration, which allows FP8 weights with scales: opened and
//! loaded, for inference and for training.

use hadal_fuzz::model::{World, quantized, tiny};
use hadal_fuzz::{Dice, put, safetensors, words};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::sync::LazyLock;

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    world.write("config.json", &quantized());
    world
});
static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| words(include_str!("../dict/safetensors.dict")));

fuzz_target!(|data: &[u8]| {
    WORLD.write("model.safetensors", data);
    WORLD.load(&tiny());
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut dice = Dice::new(seed);
    let new = if dice.one_in(5) { None } else { safetensors::mutate(&data[..size], max_size, &mut dice, &WORDS) };
    new.and_then(|new| put(&new, data, max_size)).unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
});
