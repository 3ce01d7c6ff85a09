//! The step loop on a tiny model: weight gradients may wait, the bias update follows counts made by hand, and
//! validation is what the logits say.

use hadal_data::TokenStream;
use hadal_engine::logits_uncached;
use hadal_kernels::{Ctx, Device};
use hadal_model::pass::{self, LossWeights};
use hadal_model::{Batch, FeedForwardIds, Model, ModelConfig, Params, Precision, Scope, Sequence};
use hadal_train::{AdamW, Held, Objective, Trainer, evaluate};

const VOCAB: usize = 50;
const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 };
const OBJECTIVE: Objective = Objective { mtp_lambda: 0.3, balance_alpha: 0.01, bias_gamma: 0.125 };

fn config() -> ModelConfig {
    let table = "
        preset = \"nano\"
        vocab_size = 50
        hidden_size = 24
        intermediate_size = 40
        moe_intermediate_size = 16
        num_hidden_layers = 3
        num_attention_heads = 2
        q_lora_rank = 12
        kv_lora_rank = 16
        qk_nope_head_dim = 8
        qk_rope_head_dim = 4
        v_head_dim = 8
        n_routed_experts = 8
        num_experts_per_tok = 2
        n_group = 2
        topk_group = 1
        initializer_range = 0.2
        max_position_embeddings = 32
    ";
    ModelConfig::from_toml_table(&table.parse().unwrap()).unwrap()
}

fn ctx(threads: usize) -> Ctx {
    Device::cpu(Some(threads)).unwrap().ctx()
}

fn model(ctx: &Ctx, precision: Precision) -> (Model, Params) {
    let config = config();
    let model = Model::whole(ctx, config.clone());
    let params = Params::init(ctx, &config, model.layout.clone(), precision, 3);
    (model, params)
}

fn trainer(ctx: &Ctx, precision: Precision) -> Trainer {
    let (model, params) = model(ctx, precision);
    Trainer::new(ctx, model, params, ADAMW, OBJECTIVE)
}

/// Tokens that look random and are not.
fn tokens(n: usize, seed: usize) -> Vec<i32> {
    (0..n).map(|i| ((i * i * 7 + i * 13 + seed * 29 + i / 3 * seed) % VOCAB) as i32).collect()
}

fn sequence(n: usize, seed: usize) -> Sequence {
    let t = tokens(n + 1, seed);
    Sequence { tokens: t[..n].to_vec(), targets: t[1..].to_vec() }
}

/// Three micro-batches of unequal size.
fn micro_batches(step: usize) -> Vec<Vec<Sequence>> {
    let s = |n, k| sequence(n, 10 * step + k);
    vec![vec![s(9, 0), s(17, 1)], vec![s(4, 2)], vec![s(2, 3), s(12, 4), s(5, 5)]]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn deferred_weight_gradients_are_the_same_bits() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let mut runs = Vec::new();
        for (threads, defer) in [(1, false), (1, true), (2, true), (5, false)] {
            let ctx = ctx(threads);
            let mut trainer = trainer(&ctx, precision);
            trainer.defer = defer;
            let mut seen = Vec::new();
            for step in 0..3 {
                let report = trainer.step(&ctx, &micro_batches(step), 0.01);
                let compute = trainer.params.compute.as_ref().map_or(Vec::new(), |c| c.view().to_f32());
                seen.push((
                    report.losses,
                    report.grad_norm.to_bits(),
                    bits(trainer.grads().arena.view().f32()),
                    bits(trainer.params.master.view().f32()),
                    bits(&compute),
                ));
            }
            assert_ne!(seen[0].3, seen[2].3, "the steps moved the weights");
            runs.push(seen);
        }
        assert!(runs.iter().all(|r| *r == runs[0]), "{precision:?}");
    }
}

/// Correction bias of each MoE layer, MTP's last.
fn biases(trainer: &Trainer) -> Vec<Vec<f32>> {
    let layout = &trainer.model.layout;
    let blocks = layout.blocks.iter().chain(layout.mtp.iter().map(|m| &m.block));
    let bias = |ids: &FeedForwardIds| match ids {
        FeedForwardIds::Moe(m) => Some(trainer.params.f32(m.bias.unwrap()).f32().to_vec()),
        FeedForwardIds::Dense(_) => None,
    };
    blocks.filter_map(|b| bias(&b.feed_forward)).collect()
}

/// Tokens that chose each expert of each MoE layer, counted from the routers' choices, over all micro-batches.
fn counts(ctx: &Ctx, trainer: &Trainer, micro: &[Vec<Sequence>]) -> Vec<Vec<i64>> {
    let mut counts = vec![vec![0i64; 8]; 3];
    for sequences in micro {
        let batch = Batch::new(ctx, sequences, 1);
        let weights = LossWeights { token: 1.0, mtp: 1.0, balance: Vec::new() };
        let forward = pass::forward(ctx, &trainer.model, &trainer.params, &batch, &weights, None);
        assert_eq!(forward.traces.len(), 3);
        for (layer, trace) in counts.iter_mut().zip(&forward.traces) {
            trace.indices.view().i32().iter().for_each(|&e| layer[e as usize] += 1);
        }
    }
    counts
}

#[test]
fn biases_follow_the_load_of_the_global_batch() {
    let ctx = ctx(2);
    let mut trainer = trainer(&ctx, Precision::Fp32);
    let mut seen = std::collections::BTreeSet::new();
    for step in 0..8 {
        let micro = micro_batches(step);
        let (counts, before) = (counts(&ctx, &trainer, &micro), biases(&trainer));
        // 49 tokens of two experts each; MTP predicts one token less a sequence.
        assert_eq!(counts.iter().map(|c| c.iter().sum::<i64>()).collect::<Vec<_>>(), [98, 98, 86]);
        let report = trainer.step(&ctx, &micro, 0.01);
        assert_eq!(report.load.layers().values().cloned().collect::<Vec<_>>(), counts);
        let mut worst = 0.0f64;
        for (layer, (count, before)) in biases(&trainer).iter().zip(counts.iter().zip(&before)) {
            let mean = count.iter().sum::<i64>() as f64 / 8.0;
            for ((&after, &before), &n) in layer.iter().zip(before).zip(count) {
                let sign = (mean - n as f64).partial_cmp(&0.0).unwrap();
                // gamma = 1/8: exact in f32.
                assert_eq!(after, before + 0.125 * sign as i32 as f32, "{n} of mean {mean}");
                seen.insert(sign);
                worst = worst.max(n as f64 / mean - 1.0);
            }
        }
        assert!((report.load.max_violation() - worst).abs() < 1e-12);
    }
    assert!(seen.len() >= 2, "experts above and below the mean");
}

#[test]
fn an_expert_at_the_mean_keeps_its_bias() {
    // Four tokens choose two of eight experts: the mean is one.
    let ctx = ctx(1);
    let mut trainer = trainer(&ctx, Precision::Fp32);
    let micro = [vec![sequence(4, 1)]];
    let (counts, before) = (counts(&ctx, &trainer, &micro), biases(&trainer));
    trainer.step(&ctx, &micro, 0.01);
    let after = biases(&trainer);
    let mut at_mean = 0;
    for layer in 0..2 {
        for e in 0..8 {
            let expected = [0.125, 0.0][usize::from(counts[layer][e] == 1)];
            assert_eq!((after[layer][e] - before[layer][e]).abs(), expected);
            at_mean += usize::from(counts[layer][e] == 1);
        }
    }
    assert!(at_mean > 0, "{counts:?}");
}

#[test]
fn validation_is_what_the_logits_say() {
    let ctx = ctx(2);
    let (model, params) = model(&ctx, Precision::Fp32);
    let tokens: Vec<u32> = tokens(60, 5).iter().map(|&t| t as u32).collect();
    let byte_lengths: Vec<u32> = (0..VOCAB as u32).map(|t| if t < 2 { 0 } else { 1 + t % 5 }).collect();
    let stream = TokenStream { tokens: tokens.clone() };
    // 59 predicted tokens in windows of 7: the last has 3. 20 tokens are three windows.
    for (max_tokens, predicted) in [(1000, 59), (59, 59), (20, 21), (1, 7)] {
        let (mut nats, mut bytes) = (0.0, 0);
        for start in (0..predicted).step_by(7) {
            let end = (start + 7).min(59);
            let logits = logits_uncached(&ctx, &model, &params, &tokens[start..end]).unwrap();
            for (row, &target) in logits.view().f32().chunks(VOCAB).zip(&tokens[start + 1..=end]) {
                let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
                nats += sum.ln() - f64::from(row[target as usize]);
                bytes += byte_lengths[target as usize];
            }
        }
        let held = |batch| Held { stream: &stream, byte_lengths: &byte_lengths, seq: 7, batch, max_tokens };
        for batch in [1, 2, 100] {
            let found = evaluate(&ctx, &model, &params, held(batch));
            assert_eq!(found.tokens, predicted);
            let expected = (nats / predicted as f64, nats / std::f64::consts::LN_2 / f64::from(bytes));
            assert!((found.loss / expected.0 - 1.0).abs() < 1e-6, "{found:?}, expected {expected:?}");
            assert!((found.bits_per_byte / expected.1 - 1.0).abs() < 1e-6, "{found:?}, expected {expected:?}");
        }
    }
}

#[test]
#[should_panic(expected = "one rank with all experts")]
fn a_part_of_the_experts_is_refused() {
    let (ctx, config) = (ctx(1), config());
    let rank = hadal_comm::group(2, config.n_routed_experts).swap_remove(1);
    let model = Model::new(&ctx, config.clone(), Scope::whole(&config), Box::new(rank));
    let params = Params::zeros(&ctx, model.layout.clone(), Precision::Fp32);
    Trainer::new(&ctx, model, params, ADAMW, OBJECTIVE);
}
