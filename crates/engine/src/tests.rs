//! The engine on small random models: against the pass without a cache, against itself in other company, in other
//! chunks, on other thread counts and with a cache too small for all.

mod cuda;

use crate::batch::{Span, pack};
use crate::cache::LatentCache;
use crate::pool::{BlockPool, blocks_for};
use crate::*;
use hadal_kernels::ops::router::Scoring;
use hadal_kernels::{Buf, Ctx, Device, Isa, Level};
use hadal_model::{
    Family, FeedForwardIds, Model, ModelConfig, MtpHidden, Params, Precision, Rope, Yarn, decode, heads,
};
use hadal_numerics::{Purpose, Rng, Tolerance, close};
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The same `n` cases on every run.
pub(crate) fn cases(n: u32) -> ProptestConfig {
    let (rng_seed, failure_persistence) = (RngSeed::Fixed(1), None);
    ProptestConfig { cases: n, rng_seed, failure_persistence, ..ProptestConfig::default() }
}

fn ctx(threads: usize) -> Ctx {
    Device::cpu(Some(threads)).unwrap().ctx()
}

/// Query latent, groups, sigmoid gate with bias; an MTP layer, which the engine passes over.
fn v3() -> ModelConfig {
    ModelConfig {
        family: Family::V3,
        vocab_size: 97,
        hidden_size: 48,
        intermediate_size: 56,
        moe_intermediate_size: 24,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        num_attention_heads: 3,
        q_lora_rank: Some(20),
        kv_lora_rank: 24,
        qk_nope_head_dim: 12,
        qk_rope_head_dim: 8,
        v_head_dim: 10,
        n_routed_experts: 8,
        n_shared_experts: 1,
        num_experts_per_tok: 3,
        n_group: 4,
        topk_group: 2,
        scoring: Scoring::Sigmoid,
        group_limited: true,
        correction_bias: true,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        rope: Rope { theta: 10_000.0, interleaved: true, yarn: None },
        max_position_embeddings: 512,
        rms_norm_eps: 1e-6,
        initializer_range: 0.3,
        num_nextn_predict_layers: 1,
        mtp_hidden: MtpHidden::PostNorm,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

/// One q_proj, softmax gate, two shared experts.
fn v2() -> ModelConfig {
    ModelConfig {
        family: Family::V2,
        hidden_size: 40,
        num_attention_heads: 2,
        q_lora_rank: None,
        n_routed_experts: 6,
        n_shared_experts: 2,
        num_experts_per_tok: 2,
        n_group: 1,
        topk_group: 1,
        scoring: Scoring::Softmax,
        group_limited: false,
        correction_bias: false,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
        ..v3()
    }
}

/// A context stretched beyond 32 positions, with a temperature on the scores, pairs in halves.
fn yarn() -> ModelConfig {
    let yarn = Yarn {
        factor: 16.0,
        original_max_position_embeddings: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        attention_factor: None,
        truncate: true,
    };
    ModelConfig { rope: Rope { theta: 10_000.0, interleaved: false, yarn: Some(yarn) }, ..v3() }
}

#[derive(Clone)]
struct Fixture {
    model: Arc<Model>,
    params: Arc<Params>,
}

impl Fixture {
    fn new(ctx: &Ctx, config: ModelConfig, precision: Precision) -> Self {
        let model = Model::whole(ctx, config);
        let mut params = Params::init(ctx, &model.config, model.layout.clone(), precision, 3);
        let rng = Rng::new(3, Purpose::Test, 0);
        for (layer, block) in model.layout.blocks.iter().enumerate() {
            let FeedForwardIds::Moe(moe) = block.feed_forward else { continue };
            let Some(bias) = moe.bias else { continue };
            let mut biases = params.f32_mut(bias);
            let drawn = |e: usize| 0.1 * rng.normal((layer * 100 + e) as u64);
            biases.write(&(0..biases.len()).map(drawn).collect::<Vec<f32>>());
        }
        Self { model: Arc::new(model), params: Arc::new(params) }
    }

    fn engine(&self, ctx: &Ctx, options: CacheOptions) -> Engine {
        Engine::new(ctx, self.model.clone(), self.params.clone(), options)
    }

    fn logits(&self, ctx: &Ctx, tokens: &[u32], chunk: usize) -> Vec<f32> {
        host(&self.engine(ctx, CacheOptions::max_tokens(tokens.len())).logits(ctx, tokens, chunk).unwrap())
    }

    fn answers(&self, ctx: &Ctx, options: CacheOptions, requests: Vec<Request>) -> BTreeMap<u64, Vec<Event>> {
        let mut engine = self.engine(ctx, options);
        let mut out = BTreeMap::<u64, Vec<Event>>::new();
        engine.generate(ctx, requests, |e| out.entry(e.id).or_default().push(e)).unwrap();
        assert!(engine.is_idle());
        assert_eq!((engine.usage().used_blocks, engine.usage().running), (0, 0));
        out
    }
}

fn host(b: &Buf) -> Vec<f32> {
    b.view().to_f32()
}

fn text(stream: u64, n: usize) -> Vec<u32> {
    let rng = Rng::new(5, Purpose::Test, stream);
    (0..n).map(|i| rng.below(i as u64, 97) as u32).collect()
}

fn greedy(id: u64, prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request { id, prompt, max_new_tokens, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 11, stop: Vec::new() }
}

fn sampled(id: u64, prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request { temperature: 0.8, top_k: 40, top_p: 0.95, ..greedy(id, prompt, max_new_tokens) }
}

/// Six requests of different lengths, greedy and sampled by turns.
fn six() -> Vec<Request> {
    let lengths = [(70, 20), (1, 30), (130, 9), (64, 3), (63, 40), (17, 25)];
    let request = |(i, (prompt, new)): (usize, (usize, usize))| {
        let make = if i % 2 == 0 { greedy } else { sampled };
        make(i as u64, text(i as u64, prompt), new)
    };
    lengths.into_iter().enumerate().map(request).collect()
}

#[track_caller]
fn assert_bits(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert_eq!(x.to_bits(), y.to_bits(), "{what}[{i}]: {x} and {y}");
    }
}

#[track_caller]
fn assert_answers(what: &str, a: &[Event], b: &[Event]) {
    let key = |e: &Event| (e.id, e.token, e.logp.to_bits(), e.finished);
    assert_eq!(a.iter().map(key).collect::<Vec<_>>(), b.iter().map(key).collect::<Vec<_>>(), "{what}");
}

/// On every level of vector instructions that the CPU has. The two forms round differently; weights twice as lively as
/// these amplify that from layer to layer to the size of the tolerance.
#[test]
fn cached_logits_equal_uncached_ones() {
    for isa in Level::ALL.into_iter().filter_map(Isa::new) {
        let ctx = Device::cpu_with(Some(2), isa).unwrap().ctx();
        for (name, config) in [("v3", v3()), ("v2", v2()), ("yarn", yarn())] {
            let f = Fixture::new(&ctx, ModelConfig { initializer_range: 0.15, ..config }, Precision::Fp32);
            let tokens = text(0, 150);
            let expected = host(&logits_uncached(&ctx, &f.model, &f.params, &tokens).unwrap());
            let found = f.logits(&ctx, &tokens, 150);
            let tolerance = Tolerance { element: 1e-5, ..Tolerance::F32_MODEL };
            let c = close(name, &found, &expected, tolerance).unwrap();
            println!("{name}, {isa:?}: worst {:.1e}", c.worst);
        }
    }
}

#[test]
fn chunks_do_not_change_a_bit() {
    let ctx = ctx(2);
    for (config, precision) in [
        (v3(), Precision::Fp32),
        (v3(), Precision::Bf16),
        (v2(), Precision::Fp32),
        (v2(), Precision::Bf16),
        (yarn(), Precision::Bf16),
    ] {
        let f = Fixture::new(&ctx, config, precision);
        let tokens = text(1, 131);
        let whole = f.logits(&ctx, &tokens, 131);
        for chunk in [1, 7, 64, 65] {
            assert_bits(&format!("chunks of {chunk}"), &f.logits(&ctx, &tokens, chunk), &whole);
        }
    }
}

/// Logits of each sequence's tokens when all are computed in one pass, the first `cached[i]` of them in a pass before.
fn logits_together(ctx: &Ctx, f: &Fixture, texts: &[Vec<u32>], cached: &[usize]) -> Vec<Vec<f32>> {
    let held = texts.iter().map(|t| blocks_for(t.len())).sum();
    let mut pool = BlockPool::new(held);
    let mut cache = LatentCache::new(ctx, &f.model.config, 3, f.params.precision.act(), held);
    let blocks: Vec<_> = texts.iter().map(|t| pool.allocate(blocks_for(t.len())).unwrap()).collect();
    let mut out = vec![Vec::new(); texts.len()];
    for second in [false, true] {
        let range = |i: usize| if second { cached[i]..texts[i].len() } else { 0..cached[i] };
        let spans: Vec<_> = (0..texts.len())
            .filter(|&i| !range(i).is_empty())
            .map(|i| Span {
                tokens: &texts[i][range(i)],
                first: range(i).start,
                blocks: &blocks[i][..blocks_for(range(i).end)],
            })
            .collect();
        let hidden = decode::forward(ctx, &f.model, &f.params, &pack(ctx, &spans), &mut cache.layers);
        let z = host(&heads::logits(ctx, &f.model, &f.params, &hidden));
        let mut rows = z.chunks(f.model.config.vocab_size);
        for (i, o) in out.iter_mut().enumerate() {
            range(i).for_each(|_| o.extend(rows.next().unwrap()));
        }
    }
    out
}

#[test]
fn company_does_not_change_a_bit_of_the_logits() {
    let ctx = ctx(2);
    let texts: Vec<Vec<u32>> = [70, 1, 130, 64, 63, 17].iter().enumerate().map(|(i, &n)| text(i as u64, n)).collect();
    for precision in [Precision::Fp32, Precision::Bf16] {
        for config in [v3(), v2()] {
            let f = Fixture::new(&ctx, config, precision);
            let together = logits_together(&ctx, &f, &texts, &[69, 0, 65, 0, 62, 9]);
            for (t, z) in texts.iter().zip(&together) {
                assert_bits(&format!("{} tokens, {precision:?}", t.len()), z, &f.logits(&ctx, t, t.len()));
            }
        }
    }
}

#[test]
fn company_does_not_change_an_answer() {
    let ctx = ctx(2);
    for precision in [Precision::Fp32, Precision::Bf16] {
        for config in [v3(), v2()] {
            let f = Fixture::new(&ctx, config, precision);
            let together = f.answers(&ctx, CacheOptions::blocks(64), six());
            for r in six() {
                let (id, new) = (r.id, r.max_new_tokens);
                let alone = f.answers(&ctx, CacheOptions::blocks(4), vec![r]);
                assert_eq!(alone[&id].len(), new);
                assert_answers("alone and among six", &together[&id], &alone[&id]);
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let run = |threads| {
            let ctx = ctx(threads);
            let f = Fixture::new(&ctx, yarn(), precision);
            let logits = f.logits(&ctx, &text(2, 90), 40);
            (logits, f.answers(&ctx, CacheOptions::blocks(64), six()))
        };
        let (logits, answers) = run(1);
        for threads in [2, 5] {
            let (l, a) = run(threads);
            assert_bits(&format!("{threads} threads"), &l, &logits);
            answers.iter().for_each(|(id, one)| assert_answers(&format!("{threads} threads"), &a[id], one));
        }
    }
}

#[test]
fn a_sequence_put_back_gives_the_same_answer() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    // Each grows over two block borders: 2 blocks are enough to be taken up, 3 are needed in the end.
    let requests = || (0..5).map(|i| sampled(i, text(i, 50 + 2 * i as usize), 95)).collect::<Vec<_>>();
    let large = f.answers(&ctx, CacheOptions::blocks(64), requests());
    let mut engine = f.engine(&ctx, CacheOptions { blocks: 5, prefill_tokens: 48 });
    requests().into_iter().for_each(|r| engine.submit(r).unwrap());
    let (mut small, mut put_back, mut running) = (BTreeMap::<u64, Vec<Event>>::new(), 0, 0);
    while !engine.is_idle() {
        let events = engine.step(&ctx).unwrap();
        let ended = events.iter().filter(|e| e.finished.is_some()).count();
        put_back += usize::from(engine.usage().running + ended < running);
        running = engine.usage().running;
        events.into_iter().for_each(|e| small.entry(e.id).or_default().push(e));
    }
    assert!(put_back > 0, "the cache was large enough for all");
    assert_eq!(small.len(), 5);
    large.iter().for_each(|(id, events)| assert_answers("small cache", &small[id], events));
}

#[test]
fn prefill_limit_does_not_change_an_answer() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v2(), Precision::Bf16);
    let expected = f.answers(&ctx, CacheOptions::blocks(64), six());
    for prefill_tokens in [1, 50, 1000] {
        let found = f.answers(&ctx, CacheOptions { blocks: 64, prefill_tokens }, six());
        expected.iter().for_each(|(id, e)| assert_answers(&format!("{prefill_tokens} a step"), &found[id], e));
    }
}

#[test]
fn greedy_answers_are_the_most_likely_tokens() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let prompt = text(4, 60);
    let answer = &f.answers(&ctx, CacheOptions::blocks(2), vec![greedy(9, prompt.clone(), 12)])[&9];
    let tokens: Vec<u32> = prompt.iter().copied().chain(answer.iter().map(|e| e.token)).collect();
    let z = host(&logits_uncached(&ctx, &f.model, &f.params, &tokens).unwrap());
    for (i, e) in answer.iter().enumerate() {
        let row = &z[(prompt.len() + i - 1) * 97..][..97];
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
        let logp = f64::from(row[e.token as usize] - top) - sum.ln();
        // Near-ties may fall either way: the chosen token is within rounding of the best.
        assert!(row[e.token as usize] >= top - 1e-4, "token {i}: {} of {top}", row[e.token as usize]);
        assert!((f64::from(e.logp) - logp).abs() < 1e-4, "token {i}: {} expected {logp}", e.logp);
    }
}

#[test]
fn answers_depend_on_seed_and_id() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let tokens = |r: Request| -> Vec<u32> {
        let id = r.id;
        f.answers(&ctx, CacheOptions::blocks(2), vec![r])[&id].iter().map(|e| e.token).collect()
    };
    let hot = |id, seed| Request { temperature: 2.0, top_k: 0, top_p: 1.0, seed, ..greedy(id, text(0, 9), 20) };
    let one = tokens(hot(1, 1));
    assert_eq!(one, tokens(hot(1, 1)));
    assert_ne!(one, tokens(hot(2, 1)));
    assert_ne!(one, tokens(hot(1, 2)));
    // All tokens equally likely: what differs between positions is the random number alone.
    let flat = tokens(Request { temperature: 1e9, ..hot(1, 1) });
    assert!(flat.iter().collect::<std::collections::BTreeSet<_>>().len() > 10, "{flat:?}");
}

#[test]
fn an_answer_continues_from_any_part_of_it() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Bf16);
    let whole = &f.answers(&ctx, CacheOptions::blocks(2), vec![sampled(1, text(0, 50), 40)])[&1];
    for part in [1, 14, 39] {
        let mut prompt = text(0, 50);
        prompt.extend(whole[..part].iter().map(|e| e.token));
        let rest = &f.answers(&ctx, CacheOptions::blocks(2), vec![sampled(1, prompt, 40 - part)])[&1];
        assert_answers(&format!("after {part}"), rest, &whole[part..]);
    }
}

#[test]
fn an_answer_ends_by_stop_token_or_length() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let free = &f.answers(&ctx, CacheOptions::blocks(2), vec![greedy(1, text(0, 9), 10)])[&1];
    assert_eq!(free.len(), 10);
    assert!(free[..9].iter().all(|e| e.finished.is_none()));
    assert_eq!(free[9].finished, Some(Finish::Length));
    let stop = free[4].token;
    let first = free.iter().position(|e| e.token == stop).unwrap();
    let request = Request { stop: vec![96, stop], ..greedy(1, text(0, 9), 10) };
    let stopped = &f.answers(&ctx, CacheOptions::blocks(2), vec![request])[&1];
    let ends = stopped.iter().position(|e| e.token == 96 || e.token == stop).unwrap();
    assert!(ends <= first);
    assert_eq!(stopped.len(), ends + 1);
    assert_eq!(stopped[ends].finished, Some(Finish::Stop));
}

#[test]
fn cancelling_frees_what_was_held() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let mut engine = f.engine(&ctx, CacheOptions::blocks(3));
    engine.submit(greedy(1, text(0, 100), 20)).unwrap();
    engine.submit(greedy(2, text(1, 60), 20)).unwrap();
    engine.step(&ctx).unwrap();
    let usage = engine.usage();
    assert_eq!((usage.running, usage.waiting, usage.used_blocks, usage.total_blocks), (1, 1, 2, 3));
    // 3 layers x 3 blocks x 64 tokens x (24 + 8) numbers of 4 bytes.
    assert_eq!(usage.cache_bytes, 3 * 3 * 64 * 32 * 4);
    assert_eq!(usage.cache_bytes, 3 * block_bytes(&engine.model().config, 3, f.params.precision.act()));
    assert!(engine.cancel(1) && !engine.cancel(1));
    assert_eq!((engine.usage().running, engine.usage().used_blocks), (0, 0));
    assert_eq!(engine.step(&ctx).unwrap()[0].id, 2);
    assert!(engine.cancel(2) && engine.is_idle());
    assert!(engine.step(&ctx).unwrap().is_empty());
}

#[test]
fn logits_leave_running_requests_alone() {
    let ctx = ctx(2);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let expected = &f.answers(&ctx, CacheOptions::blocks(4), vec![sampled(1, text(0, 60), 10)])[&1];
    let mut engine = f.engine(&ctx, CacheOptions::blocks(3));
    engine.submit(sampled(1, text(0, 60), 10)).unwrap();
    let mut found = engine.step(&ctx).unwrap();
    assert_bits("logits", &host(&engine.logits(&ctx, &text(3, 128), 128).unwrap()), &f.logits(&ctx, &text(3, 128), 50));
    let refused = engine.logits(&ctx, &text(3, 129), 9).unwrap_err();
    assert_eq!(refused, EngineError::CacheInUse { needed: 3, free: 2 });
    while !engine.is_idle() {
        found.extend(engine.step(&ctx).unwrap());
    }
    assert_answers("after logits", &found, expected);
}

#[test]
fn bad_requests_are_refused() {
    let ctx = ctx(1);
    let f = Fixture::new(&ctx, v3(), Precision::Fp32);
    let mut engine = f.engine(&ctx, CacheOptions::max_tokens(300));
    let good = || greedy(1, text(0, 9), 4);
    let cases = [
        (Request { prompt: vec![], ..good() }, "the prompt is empty: expected at least one token"),
        (Request { max_new_tokens: 0, ..good() }, "max_new_tokens 0: expected at least 1"),
        (Request { prompt: vec![96, 97], ..good() }, "token 97 at index 1 of the prompt: expected an id below 97"),
        (
            Request { prompt: vec![u32::MAX], ..good() },
            "token 4294967295 at index 0 of the prompt: expected an id below 97",
        ),
        (
            Request { max_new_tokens: 504, ..good() },
            "9 prompt tokens and 504 new ones: expected at most 512 together (max_position_embeddings)",
        ),
        (
            Request { max_new_tokens: usize::MAX, ..good() },
            "9 prompt tokens and 18446744073709551615 new ones: expected at most 512 together (max_position_embeddings)",
        ),
        (Request { max_new_tokens: 313, ..good() }, "321 tokens to cache: expected at most 320, the whole cache"),
        (Request { temperature: -1.0, ..good() }, "temperature -1: expected 0 (greedy) or a finite positive number"),
        (
            Request { temperature: f32::NAN, ..good() },
            "temperature NaN: expected 0 (greedy) or a finite positive number",
        ),
        (Request { top_p: 1.5, ..good() }, "top_p 1.5: expected a number from 0 to 1"),
    ];
    for (request, message) in cases {
        assert_eq!(engine.submit(request).unwrap_err().to_string(), message);
    }
    assert!(engine.is_idle());
    engine.submit(Request { max_new_tokens: 312, ..good() }).unwrap();
    let duplicate = engine.submit(good()).unwrap_err();
    assert_eq!(duplicate.to_string(), "request 1 is already there: expected an id that no unfinished request has");
    // A refusal in the middle of a list queues none of it.
    assert!(engine.generate(&ctx, [greedy(2, text(0, 3), 1), good()], |_| ()).is_err());
    assert_eq!(engine.usage().waiting, 1);

    let refused = |tokens: &[u32]| {
        let cached = f.engine(&ctx, CacheOptions::blocks(1)).logits(&ctx, tokens, 8).unwrap_err();
        (cached, logits_uncached(&ctx, &f.model, &f.params, tokens).err())
    };
    assert_eq!(refused(&[]), (EngineError::EmptyPrompt, Some(EngineError::EmptyPrompt)));
    let out = EngineError::TokenOutOfRange { index: 1, token: 97, vocab: 97 };
    assert_eq!(refused(&[0, 97]), (out.clone(), Some(out)));
    let long = EngineError::TooLong { prompt: 513, new: 0, positions: 512 };
    assert_eq!(refused(&text(0, 513)), (long.clone(), Some(long)));
    assert_eq!(refused(&text(0, 65)), (EngineError::LargerThanCache { tokens: 65, capacity: 64 }, None));
}

/// One number of the head is so large that some hidden states overflow the logit of token 0 and others do not.
#[test]
fn activations_that_overflow_end_their_request_alone() {
    overflow(&ctx(2));
}

fn overflow(ctx: &Ctx) {
    let mut f = Fixture::new(ctx, v3(), Precision::Fp32);
    let head = f.model.layout.head.unwrap();
    Arc::get_mut(&mut f.params).unwrap().f32_mut(head).slice(7..8).write(&[1.7e38f32]);
    let outcome = |requests: Vec<Request>| {
        let mut engine = f.engine(ctx, CacheOptions::blocks(64));
        requests.into_iter().for_each(|r| engine.submit(r).unwrap());
        let (mut answers, mut errors) = (BTreeMap::<u64, Vec<Event>>::new(), BTreeMap::new());
        while !engine.is_idle() {
            match engine.step(ctx) {
                Ok(events) => events.into_iter().for_each(|e| answers.entry(e.id).or_default().push(e)),
                Err(EngineError::NotFinite { id, position }) => assert!(errors.insert(id, position).is_none()),
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!((engine.usage().used_blocks, engine.usage().running), (0, 0));
        (answers, errors)
    };
    let (answers, errors) = outcome(six());
    assert!((1..6).contains(&errors.len()), "{errors:?}");
    for r in six() {
        let (id, all) = (r.id, r.prompt.len() + r.max_new_tokens);
        let (alone, error) = outcome(vec![r.clone()]);
        let none = Vec::new();
        assert_answers("among six", answers.get(&id).unwrap_or(&none), alone.get(&id).unwrap_or(&none));
        assert_eq!(errors.get(&id), error.get(&id));
        let written = r.prompt.len() + alone.get(&id).map_or(0, Vec::len);
        assert_eq!(errors.get(&id).copied().unwrap_or(all), written);
    }
    let message = EngineError::NotFinite { id: 2, position: 9 }.to_string();
    let expected = "request 2: expected finite logits for position 9, found others (the activations overflow)";
    assert_eq!(message, expected);
}
