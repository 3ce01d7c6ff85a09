#![no_main]
//! Any bytes as `config.json`, or as a run file with a `[model]` table. A configuration that is accepted is laid out
//! and counted as `inspect` does it, and comes back from the file that would be written for it.

use hadal_fuzz::{Dice, json, one_line, put, words};
use hadal_kernels::{DType, Level, Workers};
use hadal_model::account::{self, Activations, Flops, Parameters, Passes, TrainingMemory};
use hadal_model::{Layout, ModelConfig, Params, Precision, Recompute, Scope};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::sync::LazyLock;

static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| words(include_str!("../dict/config.dict")));

fuzz_target!(|data: &[u8]| {
    match ModelConfig::from_hf_json(data, "config.json") {
        Ok((config, warnings)) => {
            warnings.iter().for_each(|w| one_line(w));
            use_it(&config);
        }
        Err(e) => one_line(&e),
    }
    let Ok(Ok(table)) = std::str::from_utf8(data).map(toml::from_str::<toml::Table>) else { return };
    let Some(toml::Value::Table(model)) = table.get("model") else { return };
    match ModelConfig::from_toml_table(model) {
        Ok(config) => use_it(&config),
        Err(e) => one_line(&e),
    }
});

fn use_it(c: &ModelConfig) {
    let positions = c.max_position_embeddings.min(4096);
    let layout = Layout::new(c, Scope::whole(c));
    let p = Parameters::of(c);
    assert!(p.active <= p.total && p.total + p.biases <= layout.len, "{p:?} of {} elements", layout.len);
    assert!(Flops::training(c, positions).total().is_finite());
    let _ = account::cache_bytes_per_token(c, DType::Bf16);
    assert!(account::mha_cache_bytes_per_token(c, DType::Bf16) > 0);
    // On AMX products have scratch, which is counted too.
    let (recompute, workers) = (Recompute::None, Workers { level: Level::Amx, threads: 2 });
    let passes = Passes { precision: Precision::Bf16, recompute, sequences: 8, tokens: positions, workers };
    let activations = Activations::of(c, passes);
    assert!(TrainingMemory::of(&layout, Precision::Bf16, DType::F32, activations).total() > layout.len);
    assert!(Params::inference_bytes(&layout, Precision::Bf16) >= 2 * layout.len);
    assert!(c.inv_freq().iter().all(|x| x.is_finite()), "rotary frequencies");
    assert!(c.rope_factor().is_finite() && c.softmax_scale().is_finite(), "factors of rope and softmax");
    let _ = c.router();
    let written = serde_json::to_vec(&c.to_hf_json(DType::Bf16)).expect("a configuration has a JSON form");
    let (back, _) = ModelConfig::from_hf_json(&written, "written").unwrap_or_else(|e| panic!("not read back: {e}"));
    assert_eq!(back, *c, "written and read back");
}

/// A run file is mutated as the value it spells, too.
fn run_file(text: &[u8], dice: &mut Dice) -> Option<Vec<u8>> {
    let table: toml::Table = toml::from_str(std::str::from_utf8(text).ok()?).ok()?;
    let mut value = serde_json::to_value(table).ok()?;
    json::mutate(&mut value, dice, &WORDS);
    Some(toml::to_string(&value).ok()?.into_bytes())
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut dice = Dice::new(seed);
    let new = match dice.below(5) {
        0 => None,
        _ => json::mutate_text(&data[..size], &mut dice, &WORDS).or_else(|| run_file(&data[..size], &mut dice)),
    };
    new.and_then(|new| put(&new, data, max_size)).unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
});
