//! What a forward pass says it keeps is what it keeps: measured by an allocator that counts, and by what the device has cut
//! from its own memory for buffers.

use crate::setup::*;
use hadal_kernels::Ctx;
use hadal_model::account::{Activations, Passes};
use hadal_model::{Batch, Grads, Model, ModelConfig, Params, Precision, Recompute, WeightGrads, pass};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator with a count of live bytes for each thread. Buffers are made and dropped by the thread that
/// runs a pass (workers only allocate their own scratch), so tests that run side by side do not meet.
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

// SAFETY: every call goes to the system's allocator unchanged; the counter is a plain cell without a destructor, which
// does not allocate.
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

fn live(ctx: &Ctx) -> isize {
    LIVE.get() + ctx.host().memory().now as isize
}

/// Share of the bytes held by which the account may be off: the structs themselves, which are not counted (0.3 to 0.7 %
/// in models this small), and vectors of a number per sequence.
const MARGIN: f64 = 0.01;

/// Share of the bytes held at the fullest moment by which its prediction may be off.
const PEAK_MARGIN: f64 = 0.05;

#[test]
fn bytes_kept_are_bytes_held() {
    each_case(|ctx, case, config, precision| {
        let mut model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let batch = batch(ctx, config, &[&LENGTHS[..], &[256; 6]].concat(), 1);
        for recompute in Recompute::EACH {
            model.recompute = recompute;
            kept_is_held(ctx, &format!("{case}, {recompute}"), &model, &params, &batch);
        }
    });
}

fn kept_is_held(ctx: &Ctx, case: &str, model: &Model, params: &Params, batch: &Batch) {
    let forward = || pass::forward(ctx, model, params, batch, &loss_weights(&model.config), None);
    let live = || live(ctx);
    // This thread's share of the kernels' scratch grows once and stays.
    drop(pass::backward(ctx, model, params, forward()));
    let before = live();
    let f = forward();
    let (held, said) = ((live() - before) as f64, f.bytes() as f64);
    assert!((said - held).abs() <= MARGIN * held, "{case}: says {said} bytes, holds {held}");
    let (_, jobs) = pass::backward_input(ctx, model, params, f);
    let (held, said) = ((live() - before) as f64, jobs.bytes() as f64);
    assert!((said - held).abs() <= MARGIN * held, "{case}: jobs say {said} bytes, hold {held}");
    drop(jobs);
    // The pool's queue of tasks comes in small blocks that the workers free: those remain in this thread's count.
    let left = (live() - before) as f64;
    assert!(left <= MARGIN * held, "{case}: {left} bytes outlive the pass");

    let mut grads = Grads::zeros(ctx, model.layout.clone());
    let mut forward = || {
        let mut jobs = WeightGrads::at_once(ctx, params, &mut grads);
        pass::forward_to_train(ctx, model, params, batch, &loss_weights(&model.config), &mut jobs)
    };
    drop(forward());
    let before = live();
    let f = forward();
    let (held, said) = ((live() - before) as f64, f.bytes() as f64);
    assert!((said - held).abs() <= MARGIN * held, "{case}: heads' gradients taken, says {said} bytes, holds {held}");
}

/// The account that plans ahead adds up to what a pass says, exactly, and knows the fullest moment of a pass.
#[test]
fn activations_are_predicted() {
    let predict = |ctx: &Ctx, case: &str, config: &ModelConfig, precision| {
        let mut model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        for ((sequences, tokens), recompute) in
            Recompute::EACH.into_iter().flat_map(|r| [(3, 70), (1, 5), (3, 200)].map(|shape| (shape, r)))
        {
            model.recompute = recompute;
            let case = format!("{case}, {sequences} x {tokens}, {recompute}");
            let batch = batch(ctx, config, &vec![tokens; sequences], 1);
            let predicted = Activations::of(
                config,
                Passes { precision, recompute, sequences, tokens, workers: ctx.host().workers() },
            );
            let mut grads = Grads::zeros(ctx, model.layout.clone());
            let mut run = || {
                let mut jobs = WeightGrads::at_once(ctx, &params, &mut grads);
                let f = pass::forward_to_train(ctx, &model, &params, &batch, &loss_weights(config), &mut jobs);
                assert_eq!(f.bytes(), predicted.saved, "{case}");
                pass::backward_into(ctx, &model, &params, f, &mut jobs);
            };
            // Scratch of this thread grows once.
            run();
            ctx.device.release();
            let before = live(ctx);
            PEAK.set(LIVE.get());
            run();
            let peak = PEAK.get() + ctx.host().memory().peak as isize;
            // Small shapes are all structs and rounding.
            if tokens == 200 {
                let (found, said) = ((peak - before) as f64, predicted.total() as f64);
                assert!((said - found).abs() <= PEAK_MARGIN * found, "{case}: says {said} bytes, held {found}");
            }
        }
    };
    each_case(predict);
    predict(&context(2), "blocks of tokens", &large_vocabulary(), Precision::Bf16);
}
