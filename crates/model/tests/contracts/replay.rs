//! A given routing replaces selection only.

use crate::setup::*;
use hadal_kernels::ops::router::Scoring;
use hadal_kernels::{Ctx, View};
use hadal_model::stages::dispatch::{self, GateOptions};
use hadal_model::{FeedForwardIds, Model, ModelConfig, MoeIds, Params, Routing, pass};
use hadal_numerics::{Purpose, Rng, Tolerance, close};
use std::sync::Arc;

/// The choices of a forward pass, by global layer.
fn record(ctx: &Ctx, model: &Model, f: &pass::Forward) -> Routing {
    let layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers;
    let mut routing: Routing = vec![None; layers];
    for t in &f.traces {
        routing[t.layer] = Some(ctx.from_i32(t.indices.view().i32()));
    }
    routing
}

/// Every choice moved on by one expert: still distinct, not what the gate would select.
fn moved(ctx: &Ctx, routing: &Routing, experts: usize) -> Routing {
    let next = |&e: &i32| (e + 1) % experts as i32;
    let layer = |b: &hadal_kernels::Buf| ctx.from_i32(&b.view().i32().iter().map(next).collect::<Vec<_>>());
    routing.iter().map(|b| b.as_ref().map(layer)).collect()
}

#[test]
fn its_own_choice_gives_the_same_bits_and_another_is_taken() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let batch = batch(ctx, config, &LENGTHS, 1);
        let free = step(ctx, &model, &params, &[&batch], None);
        let own = record(ctx, &model, &pass::forward(ctx, &model, &params, &batch, &loss_weights(config), None));
        let replayed = step(ctx, &model, &params, &[&batch], Some(&own));
        assert_same(&format!("{case}, own routing"), &replayed.values, &free.values);

        let other = moved(ctx, &own, config.n_routed_experts);
        let f = pass::forward(ctx, &model, &params, &batch, &loss_weights(config), Some(&other));
        for t in &f.traces {
            let given = other[t.layer].as_ref().unwrap();
            assert_eq!(t.indices.view().i32(), given.view().i32(), "{case}: layer {} took another choice", t.layer);
        }
        let changed = step(ctx, &model, &params, &[&batch], Some(&other));
        assert_lively(case, &changed.values);
        assert_ne!(changed.values["losses of micro-batch 0"], free.values["losses of micro-batch 0"], "{case}");
    });
}

#[test]
fn weights_of_a_given_choice_come_from_the_current_scores() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let ids = &model.layout.blocks[config.first_k_dense_replace];
        let FeedForwardIds::Moe(moe) = ids.feed_forward else { panic!("{case}: a dense layer") };
        let n = 19;
        let rng = Rng::new(SEED, Purpose::Test, 11);
        let values: Vec<f32> = (0..n * config.hidden_size).map(|i| rng.normal(i as u64)).collect();
        let mut h1 = ctx.zeros(precision.act(), values.len());
        hadal_kernels::ops::add::convert(ctx, View::F32(&values), h1.view_mut());
        let h1 = Arc::new(h1);
        let select = |given| {
            let options = GateOptions { given, balance: None };
            let (input, saved) = dispatch::forward(ctx, &model, &params, ids, h1.clone(), options);
            (input.x, saved.gate.unwrap())
        };
        let (x, free) = select(None);
        let given = moved(ctx, &vec![Some(free.indices.as_ref().clone())], config.n_routed_experts);
        let (_, gate) = select(given[0].as_ref().map(hadal_kernels::Buf::view));
        assert_eq!(gate.indices.view().i32(), given[0].as_ref().unwrap().view().i32(), "{case}");
        for g in [&free, &gate] {
            let expected = by_hand(config, &params, moe, &x.view().to_f32(), g.indices.view().i32());
            close(case, g.weights.view().f32(), &expected, Tolerance::F32_OP).unwrap();
        }
    });
}

/// Routing weights of a choice: the score at each chosen expert, divided by the chosen ones' sum where the model does
/// so, times the scaling factor. The correction bias has no part in them.
fn by_hand(c: &ModelConfig, params: &Params, moe: MoeIds, x: &[f32], chosen: &[i32]) -> Vec<f32> {
    let gate = params.f32(moe.gate).f32();
    let rows = x.chunks(c.hidden_size).zip(chosen.chunks(c.num_experts_per_tok));
    let token = |(x, chosen): (&[f32], &[i32])| {
        let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        let logits: Vec<f64> = gate.chunks(c.hidden_size).map(dot).collect();
        let all: f64 = logits.iter().map(|z| z.exp()).sum();
        let score = |e: &i32| match (c.scoring, logits[*e as usize]) {
            (Scoring::Sigmoid, z) => 1.0 / (1.0 + (-z).exp()),
            (Scoring::Softmax, z) => z.exp() / all,
        };
        let sum: f64 = if c.norm_topk_prob { chosen.iter().map(score).sum() } else { 1.0 };
        chosen.iter().map(|e| (score(e) / sum * c.routed_scaling_factor) as f32).collect::<Vec<_>>()
    };
    rows.flat_map(token).collect()
}
