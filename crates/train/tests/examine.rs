//! What the examination counts: on text whose next tokens are certain every guess is kept, and on any text the counts
//! are those of one position after the other.

use hadal_engine::logits_uncached;
use hadal_kernels::{Ctx, Device};
use hadal_model::{Model, ModelConfig, Params, Precision, Sequence};
use hadal_train::{AdamW, Drafts, Objective, Trainer, examine};

const VOCAB: usize = 50;

fn config(mtp: usize) -> ModelConfig {
    let table = format!(
        "
        preset = \"nano\"
        vocab_size = {VOCAB}
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
        num_nextn_predict_layers = {mtp}
    "
    );
    ModelConfig::from_toml_table(&table.parse().unwrap()).unwrap()
}

fn ctx() -> Ctx {
    Device::cpu(Some(2)).unwrap().ctx()
}

fn model(ctx: &Ctx, mtp: usize) -> (Model, Params) {
    let config = config(mtp);
    let model = Model::whole(ctx, config.clone());
    let params = Params::init(ctx, &config, model.layout.clone(), Precision::Fp32, 3);
    (model, params)
}

fn sequence(tokens: Vec<i32>) -> Sequence {
    Sequence { tokens: tokens[..tokens.len() - 1].to_vec(), targets: tokens[1..].to_vec() }
}

/// 5, 12, 19, 26, 33, 5, ...
fn round(n: usize, first: usize) -> Sequence {
    sequence((first..=first + n).map(|i| (i % 5 * 7 + 5) as i32).collect())
}

fn odd(n: usize, seed: usize) -> Sequence {
    sequence((0..=n).map(|i| ((i * i * 7 + i * 13 + seed * 29 + i / 3 * seed) % VOCAB) as i32).collect())
}

/// Both the guess and the choice must be of the token two ahead: one place off, they would all be wrong.
#[test]
fn what_is_certain_is_always_kept() {
    let ctx = ctx();
    let (model, params) = model(&ctx, 1);
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: 1.0 };
    let objective = Objective { mtp_lambda: 0.3, balance_alpha: 1e-4, bias_gamma: 1e-3 };
    let mut trainer = Trainer::new(&ctx, model, params, adamw, objective);
    let before = examine(&ctx, &trainer.model, &trainer.params, &[round(20, 0)], 1);
    for step in 0..30 {
        trainer.step(&ctx, &[(0..4).map(|k| round(20, step + k)).collect()], 0.01);
    }
    let after = examine(&ctx, &trainer.model, &trainer.params, &[round(20, 3)], 1);
    assert_eq!(after.drafts, [Drafts { drafted: 19, as_text: 19, as_model: 19 }]);
    assert!(before.drafts[0].as_text < 10, "{before:?}");
}

/// The likeliest id of each row of logits.
fn argmax(row: &[f32]) -> i32 {
    (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32
}

/// Every prefix alone, its last place only: the main model's choice from its logits, the guess by giving the place each
/// id as its target until one counts.
#[test]
fn counts_are_those_of_each_position_alone() {
    let ctx = ctx();
    let (model, params) = model(&ctx, 2);
    let text = odd(9, 4);
    let mut expected = Drafts::default();
    for end in 2..=text.tokens.len() {
        let prefix = &text.tokens[..end];
        let guess = (0..VOCAB as i32).find(|&id| {
            let mut targets = vec![-1; end];
            targets[end - 1] = id;
            let one = Sequence { tokens: prefix.to_vec(), targets };
            let found = examine(&ctx, &model, &params, &[one], 1).drafts[0];
            assert_eq!(found.drafted, 1);
            found.as_text == 1
        });
        let ids: Vec<u32> = prefix.iter().map(|&t| t as u32).collect();
        let logits = logits_uncached(&ctx, &model, &params, &ids).unwrap();
        let choice = argmax(&logits.view().f32()[(end - 1) * VOCAB..]);
        expected.drafted += 1;
        expected.as_text += usize::from(guess == Some(text.targets[end - 1]));
        expected.as_model += usize::from(guess == Some(choice));
    }
    assert_eq!(examine(&ctx, &model, &params, &[text], 1).drafts, [expected]);
    assert_eq!(expected.drafted, 8);
}

#[test]
fn sequences_do_not_mix_and_loads_add_up() {
    let ctx = ctx();
    let (model, params) = model(&ctx, 1);
    let mut texts = vec![odd(9, 0), odd(1, 1), round(12, 2), odd(4, 3)];
    texts[2].targets[..8].fill(-1);
    let alone: Vec<Drafts> =
        texts.iter().map(|t| examine(&ctx, &model, &params, std::slice::from_ref(t), 1).drafts[0]).collect();
    assert_eq!(alone.iter().map(|d| d.drafted).collect::<Vec<_>>(), [8, 0, 4, 3]);
    for batch in [1, 2, 4, 9] {
        let found = examine(&ctx, &model, &params, &texts, batch);
        assert_eq!((&found.drafts, found.tokens), (&alone, 26), "batch {batch}");
        // Two MoE layers of the trunk see every token, the MTP layer all but the first of each text; two experts each.
        let slots: Vec<i64> = found.load.layers().values().map(|l| l.iter().sum()).collect();
        assert_eq!(slots, [52, 52, 44], "batch {batch}");
    }
}

#[test]
fn without_mtp_layers_there_are_no_guesses() {
    let ctx = ctx();
    let (model, params) = model(&ctx, 0);
    let found = examine(&ctx, &model, &params, &[odd(9, 0)], 1);
    assert_eq!((found.drafts, found.tokens), (vec![Drafts::default()], 9));
    assert_eq!(found.load.layers().len(), 2);
}
