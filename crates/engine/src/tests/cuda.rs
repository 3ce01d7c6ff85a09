//! The engine on a GPU: the same bits in any company and in any chunks, the logits of the pass without a cache, the
//! CPU's tokens. Where there is no GPU, the tests say that they were skipped.

use super::*;
use hadal_kernels::cuda::Cuda;

/// The first GPU as inference has it, or a skip that is seen past the harness.
#[track_caller]
fn gpu() -> Option<Ctx> {
    if Cuda::count().unwrap() == 0 {
        hadal_numerics::skipped("no NVIDIA GPU");
        return None;
    }
    let ctx = Device::cuda(0, Some(2)).unwrap().ctx();
    ctx.device.as_cuda()?.set_invariant(true);
    Some(ctx)
}

/// As [`v3`], with rows that the widest loads, and Hopper's copy engine, take.
fn even() -> ModelConfig {
    ModelConfig {
        vocab_size: 97,
        hidden_size: 64,
        intermediate_size: 96,
        moe_intermediate_size: 32,
        num_attention_heads: 2,
        q_lora_rank: Some(32),
        kv_lora_rank: 64,
        qk_nope_head_dim: 32,
        qk_rope_head_dim: 16,
        v_head_dim: 32,
        ..v3()
    }
}

/// Odd sizes and even ones, in both precisions.
fn fixtures(ctx: &Ctx) -> Vec<(String, Fixture)> {
    let mut all = Vec::new();
    for precision in [Precision::Fp32, Precision::Bf16] {
        for (name, config) in [("v3", v3()), ("v2", v2()), ("even", even())] {
            all.push((format!("{name}, {precision:?}"), Fixture::new(ctx, config, precision)));
        }
    }
    all
}

#[test]
fn company_of_up_to_64_does_not_change_a_bit_of_the_logits() {
    let Some(ctx) = gpu() else { return };
    let lengths = [70, 1, 130, 64, 63, 17, 200, 33];
    let length = |i: usize| (lengths[i % 8] - i / 8 % 2).max(1);
    let texts: Vec<Vec<u32>> = (0..65).map(|i| text(i, length(i as usize))).collect();
    for (name, f) in fixtures(&ctx) {
        let alone: Vec<_> = texts[..8].iter().map(|t| f.logits(&ctx, t, t.len())).collect();
        for n in [2, 3, 8, 17, texts.len()] {
            // All but the last token in a pass before, as in generation; or half of them.
            let cached: Vec<usize> = texts[..n].iter().enumerate().map(|(i, t)| (t.len() - 1) >> (i % 2)).collect();
            let together = logits_together(&ctx, &f, &texts[..n], &cached);
            for (i, (found, alone)) in together.iter().zip(&alone).enumerate() {
                assert_bits(&format!("{name}: {} tokens, number {i} of {n}", texts[i].len()), found, alone);
            }
        }
    }
}

#[test]
fn chunks_do_not_change_a_bit() {
    let Some(ctx) = gpu() else { return };
    let tokens = text(1, 131);
    for (name, f) in fixtures(&ctx) {
        let whole = f.logits(&ctx, &tokens, 131);
        for chunk in [1, 7, 64, 65] {
            assert_bits(&format!("{name}: chunks of {chunk}"), &f.logits(&ctx, &tokens, chunk), &whole);
        }
    }
}

#[test]
fn company_does_not_change_an_answer() {
    let Some(ctx) = gpu() else { return };
    for (name, f) in fixtures(&ctx) {
        let together = f.answers(&ctx, CacheOptions::blocks(64), six());
        for r in six() {
            let id = r.id;
            let alone = f.answers(&ctx, CacheOptions::blocks(4), vec![r]);
            assert_answers(&format!("{name}: alone and among six"), &together[&id], &alone[&id]);
        }
    }
}

#[test]
fn cached_logits_equal_uncached_ones() {
    let Some(ctx) = gpu() else { return };
    for (name, config) in [("v3", v3()), ("v2", v2()), ("yarn", yarn()), ("even", even())] {
        let f = Fixture::new(&ctx, ModelConfig { initializer_range: 0.15, ..config }, Precision::Fp32);
        let tokens = text(0, 150);
        let expected = host(&logits_uncached(&ctx, &f.model, &f.params, &tokens).unwrap());
        let found = f.logits(&ctx, &tokens, 150);
        let tolerance = Tolerance { element: 1e-5, ..Tolerance::F32_MODEL };
        let c = close(name, &found, &expected, tolerance).unwrap();
        println!("{name}: worst {:.1e}", c.worst);
    }
}

/// Logits on both differ by rounding alone, and no two candidates of these texts are that close.
#[test]
fn greedy_answers_are_those_of_the_cpu() {
    let (Some(gpu), cpu) = (gpu(), ctx(2)) else { return };
    for (name, config) in [("v3", v3()), ("v2", v2()), ("even", even())] {
        let config = ModelConfig { initializer_range: 0.15, ..config };
        let answers = [&gpu, &cpu].map(|ctx| {
            let f = Fixture::new(ctx, config.clone(), Precision::Fp32);
            let requests = (0..4).map(|i| greedy(i, text(i, 20 + 30 * i as usize), 12)).collect();
            f.answers(ctx, CacheOptions::blocks(32), requests)
        });
        for (id, on_cpu) in &answers[1] {
            let tokens = |events: &[Event]| events.iter().map(|e| e.token).collect::<Vec<_>>();
            assert_eq!(tokens(&answers[0][id]), tokens(on_cpu), "{name}, request {id}");
            for (a, b) in answers[0][id].iter().zip(on_cpu) {
                assert!((a.logp - b.logp).abs() < 1e-3, "{name}, request {id}: {} and {}", a.logp, b.logp);
            }
        }
    }
}

#[test]
fn activations_that_overflow_end_their_request_alone_here_too() {
    let Some(ctx) = gpu() else { return };
    overflow(&ctx);
}

/// What leaves the device is a few numbers a sequence, asked for and read when they are there.
#[test]
fn a_step_copies_no_logits_to_the_host() {
    let Some(ctx) = gpu() else { return };
    let cuda = ctx.device.as_cuda().unwrap();
    let f = Fixture::new(&ctx, even(), Precision::Bf16);
    let mut engine = f.engine(&ctx, CacheOptions::blocks(8));
    (0..3).for_each(|i| engine.submit(greedy(i, text(i, 20), 8)).unwrap());
    let (_, before) = cuda.waits();
    let (copied, mut answered) = (cuda.downloaded(), 0);
    while !engine.is_idle() {
        answered += engine.step(&ctx).unwrap().len();
    }
    assert_eq!((answered, cuda.waits().1 - before), (24, 0));
    // Three words a sequence and step; of logits one would be a vocabulary's.
    let copied = cuda.downloaded() - copied;
    assert!((24 * 4..=24 * 32).contains(&copied), "{copied} bytes");
}
