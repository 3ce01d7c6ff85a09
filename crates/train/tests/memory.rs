//! What a step is predicted to hold at its fullest moment is what it holds: measured by an allocator that counts, and by what
//! the device has cut from its own memory for buffers.

use hadal_kernels::{Ctx, DType, Device};
use hadal_model::account::{Activations, Passes, TrainingMemory};
use hadal_model::{Model, ModelConfig, Params, Precision, Recompute, Sequence};
use hadal_train::{AdamW, Objective, Trainer};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator with a count of live bytes for each thread, and the most there were. A step is measured on a
/// device's only worker, which runs all of it.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is being torn down has no count any more, and nobody reads it.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain cells without a destructor, which
// do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 };
const OBJECTIVE: Objective = Objective { mtp_lambda: 0.3, balance_alpha: 0.01, bias_gamma: 0.125 };

/// Two sequences in each of two micro-batches.
const SEQUENCES: usize = 2;
const TOKENS: usize = 160;
/// So many that products have several tiles of rows, of experts too: on AMX they then pack weights for their time.
const MANY_TOKENS: usize = 512;

fn config(mtp: usize) -> ModelConfig {
    let table = format!(
        "
        preset = \"nano\"
        vocab_size = 700
        hidden_size = 64
        intermediate_size = 160
        moe_intermediate_size = 32
        num_hidden_layers = 3
        num_attention_heads = 4
        q_lora_rank = 24
        kv_lora_rank = 32
        qk_nope_head_dim = 16
        qk_rope_head_dim = 8
        v_head_dim = 16
        n_routed_experts = 8
        num_experts_per_tok = 3
        n_group = 4
        topk_group = 2
        num_nextn_predict_layers = {mtp}
    "
    );
    ModelConfig::from_toml_table(&table.parse().unwrap()).unwrap()
}

/// Wide enough for products of several tiles.
fn wide() -> ModelConfig {
    let width = ModelConfig { hidden_size: 512, intermediate_size: 1024, moe_intermediate_size: 512, ..config(0) };
    let experts = ModelConfig { n_routed_experts: 4, n_group: 1, topk_group: 1, num_hidden_layers: 2, ..width };
    experts.validate().unwrap();
    experts
}

fn sequence(seed: usize, tokens: usize) -> Sequence {
    let t: Vec<i32> = (0..=tokens).map(|i| ((i * i * 7 + i * 13 + seed * 29) % 700) as i32).collect();
    Sequence { tokens: t[..tokens].to_vec(), targets: t[1..].to_vec() }
}

/// (the most that a step held beside what stays, the state).
fn measure(config: &ModelConfig, precision: Precision, recompute: Recompute, tokens: usize) -> (isize, isize) {
    let ctx = Device::cpu(Some(1)).unwrap().ctx();
    ctx.host().install(|| measure_here(&ctx, config, precision, recompute, tokens))
}

/// On the worker that runs the steps.
fn measure_here(
    ctx: &Ctx,
    config: &ModelConfig,
    precision: Precision,
    recompute: Recompute,
    tokens: usize,
) -> (isize, isize) {
    let sequences = |i: usize| (0..SEQUENCES).map(|s| sequence(2 * i + s, tokens)).collect();
    let micro: Vec<Vec<Sequence>> = (0..2).map(sequences).collect();
    let before = LIVE.get();
    let mut model = Model::whole(ctx, config.clone());
    model.recompute = recompute;
    let params = Params::init(ctx, config, model.layout.clone(), precision, 3);
    let mut trainer = Trainer::new(ctx, model, params, ADAMW, OBJECTIVE);
    let state = LIVE.get() - before;
    // In the first step the worker's own panels grow, which stay and are part of the process.
    trainer.step(ctx, &micro, 0.01);
    ctx.device.release();
    let stays = LIVE.get();
    PEAK.set(stays);
    trainer.step(ctx, &micro, 0.01);
    (PEAK.get() - stays + ctx.host().memory().peak as isize, state)
}

fn assert_near(what: &str, said: usize, found: isize, margin: f64) {
    let (said, found) = (said as f64, found as f64);
    assert!((said - found).abs() <= margin * found, "{what}: says {said} bytes, held {found}");
}

fn check(config: &ModelConfig, precision: Precision, recompute: Recompute, tokens: usize) {
    let ctx = Device::cpu(Some(1)).unwrap().ctx();
    let passes = Passes { precision, recompute, sequences: SEQUENCES, tokens, workers: ctx.host().workers() };
    let layout = Model::whole(&ctx, config.clone()).layout;
    let said = TrainingMemory::of(&layout, precision, DType::F32, Activations::of(config, passes));
    let (held, state) = measure(config, precision, recompute, tokens);
    let case = format!("{precision:?}, {} MTP layers, {recompute}, {tokens}", config.num_nextn_predict_layers);
    assert_near(&format!("{case}: parameters, gradients, moments"), said.state(), state, 0.01);
    assert_near(&format!("{case}: activations"), said.activations.total(), held, 0.1);
}

#[test]
fn a_steps_peak_is_predicted() {
    for (precision, mtp) in [Precision::Fp32, Precision::Bf16].into_iter().flat_map(|p| [(p, 0), (p, 1)]) {
        for recompute in Recompute::EACH {
            check(&config(mtp), precision, recompute, TOKENS);
        }
    }
}

/// With what AMX packs, where it is there.
#[test]
fn a_wide_steps_peak_is_predicted() {
    Recompute::EACH.into_iter().for_each(|recompute| check(&wide(), Precision::Bf16, recompute, MANY_TOKENS));
}
