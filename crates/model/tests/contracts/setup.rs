//! Models, weights, batches and comparisons shared by the contracts.

use hadal_kernels::ops::router::Scoring;
use hadal_kernels::ops::{add, head_loss};
use hadal_kernels::{Buf, Ctx, Device};
use hadal_model::pass::{self, Forward, LossWeights, Losses};
use hadal_model::{
    Batch, Family, Grads, Kind, Model, ModelConfig, MtpHidden, Params, Precision, Rope, Routing, Scope, Sequence, Yarn,
};
use hadal_numerics::{Purpose, Rng};
use std::collections::BTreeMap;

pub const SEED: u64 = 7;
pub const PRECISIONS: [Precision; 2] = [Precision::Fp32, Precision::Bf16];

/// Ragged: a single token, one past a tile, past two tiles, an empty sequence.
pub const LENGTHS: [usize; 5] = [65, 1, 130, 0, 7];

pub fn context(threads: usize) -> Ctx {
    Device::cpu(Some(threads)).unwrap().ctx()
}

/// V3 in small: query latent, groups, correction bias, a shared expert, one MTP layer.
pub fn v3() -> ModelConfig {
    ModelConfig {
        family: Family::V3,
        vocab_size: 67,
        hidden_size: 40,
        intermediate_size: 52,
        moe_intermediate_size: 24,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        num_attention_heads: 3,
        q_lora_rank: Some(28),
        kv_lora_rank: 20,
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
        rope: Rope { theta: 10000.0, interleaved: true, yarn: None },
        max_position_embeddings: 256,
        rms_norm_eps: 1e-6,
        initializer_range: 0.2,
        num_nextn_predict_layers: 1,
        mtp_hidden: MtpHidden::PostNorm,
        bos_token_id: None,
        eos_token_ids: vec![],
    }
}

/// Two MTP layers that read before the norm, four layers, two shared experts.
pub fn v3_two_mtp() -> ModelConfig {
    ModelConfig {
        num_hidden_layers: 4,
        n_shared_experts: 2,
        num_nextn_predict_layers: 2,
        mtp_hidden: MtpHidden::PreNorm,
        ..v3()
    }
}

/// V2 in small: softmax gate without bias or groups, no query latent, no MTP, no shared experts.
pub fn v2() -> ModelConfig {
    ModelConfig {
        family: Family::V2,
        q_lora_rank: None,
        n_shared_experts: 0,
        n_group: 1,
        topk_group: 1,
        scoring: Scoring::Softmax,
        group_limited: false,
        correction_bias: false,
        norm_topk_prob: false,
        routed_scaling_factor: 1.0,
        num_nextn_predict_layers: 0,
        ..v3()
    }
}

/// V3 over a stretched context, half-split rotary pairs; sums long enough to be cut into pieces.
pub fn yarn() -> ModelConfig {
    let yarn = Yarn {
        factor: 8.0,
        original_max_position_embeddings: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        attention_factor: None,
        truncate: true,
    };
    let rope = Rope { theta: 10000.0, interleaved: false, yarn: Some(yarn) };
    ModelConfig { rope, vocab_size: 611, intermediate_size: 300, ..v3() }
}

/// V2 with so many ids that a head takes 300 tokens in two blocks, and not much else.
pub fn large_vocabulary() -> ModelConfig {
    let config = ModelConfig { vocab_size: 1 << 16, num_hidden_layers: 2, ..v2() };
    assert!(head_loss::tokens_at_once(300, config.vocab_size) < 290);
    config
}

/// Runs `f` on every model in every precision, with two threads.
pub fn each_case(f: impl Fn(&Ctx, &str, &ModelConfig, Precision)) {
    let ctx = context(2);
    for (name, config) in [("v3", v3()), ("v3 with two MTP", v3_two_mtp()), ("v2", v2()), ("yarn", yarn())] {
        for precision in PRECISIONS {
            f(&ctx, &format!("{name}, {precision:?}"), &config, precision);
        }
    }
}

/// Initial weights, then norms and correction biases away from their trivial values; every number a function of the
/// tensor's published name, as `Params::init` promises of its own.
pub fn weights(ctx: &Ctx, model: &Model, precision: Precision) -> Params {
    let layout = model.layout.clone();
    let mut params = Params::init(ctx, &model.config, layout.clone(), precision, SEED);
    for (t, p) in layout.published().filter(|(_, p)| p.shape.len() == 1) {
        let rng = Rng::named(SEED, Purpose::Test, &p.name);
        let (centre, spread) = if t.kind == Kind::Buffer { (0.0, 0.1) } else { (1.0, 0.2) };
        for (i, w) in params.master.view_mut().f32()[p.range()].iter_mut().enumerate() {
            *w = centre + spread * rng.normal(i as u64);
        }
    }
    params.refresh(ctx);
    params
}

/// A part of a model on one rank.
pub fn part(ctx: &Ctx, config: &ModelConfig, scope: Scope) -> Model {
    let experts = config.n_routed_experts;
    Model::new(ctx, config.clone(), scope, Box::new(hadal_comm::Identity { experts }))
}

/// The embedding and the layers given, nothing after them.
pub fn front(config: &ModelConfig, layers: std::ops::Range<usize>) -> Scope {
    Scope { layers, embedding: true, head: false, mtp: 0, ..Scope::whole(config) }
}

/// The layers given and all that follows the last, with the embedding if MTP needs it.
pub fn back(config: &ModelConfig, layers: std::ops::Range<usize>) -> Scope {
    Scope { layers, embedding: config.num_nextn_predict_layers > 0, ..Scope::whole(config) }
}

/// Random sequences; a fifth of the positions predict nothing.
pub fn sequences(config: &ModelConfig, lengths: &[usize], stream: u64) -> Vec<Sequence> {
    let v = config.vocab_size as u64;
    let make = |(s, &n): (usize, &usize)| {
        let rng = Rng::new(SEED, Purpose::Test, stream * 1000 + s as u64);
        let token = |i: usize| rng.below(i as u64, v) as i32;
        let target = |i: usize| if rng.below(1_000_000 + i as u64, 5) == 0 { -1 } else { token(i + 1) };
        Sequence { tokens: (0..n).map(token).collect(), targets: (0..n).map(target).collect() }
    };
    lengths.iter().enumerate().map(make).collect()
}

pub fn batch(ctx: &Ctx, config: &ModelConfig, lengths: &[usize], stream: u64) -> Batch {
    Batch::new(ctx, &sequences(config, lengths, stream), config.num_nextn_predict_layers)
}

/// Every part of the loss, with a balance weight that matters.
pub fn loss_weights(config: &ModelConfig) -> LossWeights {
    let balance = (0..=config.num_nextn_predict_layers).map(|k| 0.02 + 0.01 * k as f32).collect();
    LossWeights { token: 0.011, mtp: 0.004, balance }
}

/// The bits of a float buffer (bf16 widens exactly).
pub fn bits(b: &Buf) -> Vec<u32> {
    b.view().to_f32().iter().map(|x| x.to_bits()).collect()
}

/// f32 `[S]`: the balance weight of every sequence, as a trunk on its own wants it.
pub fn balance(ctx: &Ctx, batch: &Batch, weights: &LossWeights) -> Buf {
    ctx.from_f32(&vec![weights.balance[0]; batch.depths[0].cu.len() - 1])
}

/// Bits by name.
pub type Named = BTreeMap<String, Vec<u32>>;

/// All that a step over micro-batches gives.
#[derive(Default)]
pub struct Step {
    /// Losses of each micro-batch, gradients of its input, gradients of every published tensor.
    pub values: Named,
}

impl Step {
    pub fn losses(&mut self, i: usize, l: &Losses) {
        let f64_bits = |x: f64| [(x.to_bits() >> 32) as u32, x.to_bits() as u32];
        let all = [l.main, l.mtp, l.balance].into_iter().flat_map(f64_bits).collect();
        self.values.insert(format!("losses of micro-batch {i}"), all);
    }

    pub fn input(&mut self, i: usize, dh: &Buf) {
        self.values.insert(format!("input gradient of micro-batch {i}"), bits(dh));
    }

    pub fn traces(&mut self, i: usize, f: &Forward) {
        for t in &f.traces {
            let indices = t.indices.view().i32().iter().map(|&x| x as u32).collect();
            self.values.insert(format!("routing of layer {} in micro-batch {i}", t.layer), indices);
        }
    }

    /// Gradients of a model held in parts, first to last: the embedding's uses are folded across the first and the last
    /// part in the order of use, as one part folds them.
    pub fn gradients(&mut self, ctx: &Ctx, parts: &mut [Grads]) {
        let n = parts.len();
        if let ([first, .., last], true) = (&mut *parts, n > 1) {
            for k in 1..=last.layout.scope.mtp {
                let (to, from) = (first.layout.embedding.unwrap(), last.layout.embedding.unwrap());
                let used = last.of_use(from, k);
                add::accumulate(ctx, used.as_view(), first.of(to));
            }
        }
        for (i, grads) in parts.iter_mut().enumerate() {
            grads.fold(ctx);
            for (name, g) in named(grads) {
                let copy = i > 0 && name == "model.embed_tokens.weight";
                assert!(copy || !self.values.contains_key(&name), "{name} is in two parts");
                self.values.entry(name).or_insert(g);
            }
        }
    }
}

/// Gradients by published name; buffers have none.
pub fn named(grads: &Grads) -> Named {
    let arena = grads.arena.view().f32();
    let trained = grads.layout.published().filter(|(t, _)| t.kind != Kind::Buffer);
    trained.map(|(_, p)| (p.name.clone(), arena[p.range()].iter().map(|x| x.to_bits()).collect())).collect()
}

/// A whole model's step, one micro-batch after the other.
pub fn step(ctx: &Ctx, model: &Model, params: &Params, batches: &[&Batch], routing: Option<&Routing>) -> Step {
    step_with(ctx, model, params, batches, routing, &loss_weights(&model.config))
}

/// As [`step`], with other loss weights.
pub fn step_with(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    batches: &[&Batch],
    routing: Option<&Routing>,
    weights: &LossWeights,
) -> Step {
    let mut grads = Grads::zeros(ctx, model.layout.clone());
    let mut step = Step::default();
    for (i, batch) in batches.iter().enumerate() {
        let f = pass::forward(ctx, model, params, batch, weights, routing);
        step.losses(i, &f.losses.read());
        step.traces(i, &f);
        let (dh, jobs) = pass::backward_input(ctx, model, params, f);
        step.input(i, &dh);
        jobs.run(ctx, params, &mut grads);
    }
    step.gradients(ctx, &mut [grads]);
    step
}

/// Fails unless both hold the same names with the same bits; says how many differ and the first that does.
#[track_caller]
pub fn assert_same(case: &str, found: &Named, expected: &Named) {
    let names = |x: &Named| x.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{case}: names");
    for (name, e) in expected {
        assert_same_bits(&format!("{case}: {name}"), &found[name], e);
    }
}

#[track_caller]
pub fn assert_same_bits(name: &str, found: &[u32], expected: &[u32]) {
    assert_eq!(found.len(), expected.len(), "{name}: lengths");
    let differ: Vec<usize> = (0..found.len()).filter(|&i| found[i] != expected[i]).collect();
    let Some(&i) = differ.first() else { return };
    let (f, e) = (f32::from_bits(found[i]), f32::from_bits(expected[i]));
    panic!("{name}: {} of {} differ, first [{i}]: found {f:e}, expected {e:e}", differ.len(), found.len());
}

/// Fails if a comparison would be of nothing: all values finite, and every gradient of a tensor that all tokens meet
/// has an element other than zero.
#[track_caller]
pub fn assert_lively(case: &str, values: &Named) {
    for (name, v) in values.iter().filter(|(n, _)| n.ends_with(".weight") || n.starts_with("input")) {
        assert!(v.iter().all(|&b| f32::from_bits(b).is_finite()), "{case}: {name} is not finite");
        let zero = v.iter().all(|&b| f32::from_bits(b) == 0.0);
        assert!(!zero || name.contains(".experts."), "{case}: {name} is zero");
    }
}
