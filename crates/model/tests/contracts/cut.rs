//! A model cut into pipeline stages is the whole model.

use crate::setup::*;
use hadal_kernels::Ctx;
use hadal_model::pass;
use hadal_model::trunk::{self, Input, Options};
use hadal_model::{Batch, Grads, Model, ModelConfig, Params, Precision, WeightGrads};

/// One stage with its own weights and gradients.
struct Stage {
    model: Model,
    params: Params,
    grads: Grads,
}

fn stages(ctx: &Ctx, config: &ModelConfig, precision: Precision, cuts: &[usize]) -> Vec<Stage> {
    let bounds: Vec<usize> = [0].iter().chain(cuts).copied().chain([config.num_hidden_layers]).collect();
    let last = bounds.len() - 2;
    let scope = |i: usize| {
        let layers = bounds[i]..bounds[i + 1];
        match i {
            0 => front(config, layers),
            _ if i == last => back(config, layers),
            _ => hadal_model::Scope { embedding: false, ..front(config, layers) },
        }
    };
    let stage = |i: usize| {
        let model = part(ctx, config, scope(i));
        let params = weights(ctx, &model, precision);
        let grads = Grads::zeros(ctx, model.layout.clone());
        Stage { model, params, grads }
    };
    (0..=last).map(stage).collect()
}

/// A micro-batch through all stages, forward and backward; each stage's weight gradients into its own.
fn run(ctx: &Ctx, stages: &mut [Stage], i: usize, batch: &Batch, step: &mut Step) {
    let weights = loss_weights(&stages[0].model.config);
    let balance = balance(ctx, batch, &weights);
    let options = Options { routing: None, balance: Some(&balance) };
    let (mut input, mut kept, mut traces) = (Input::Tokens, Vec::new(), Vec::new());
    for s in stages.iter() {
        let (h, saved, t) = trunk::forward(ctx, &s.model, &s.params, &batch.depths[0], input, options);
        traces.extend(t);
        kept.push(saved);
        input = Input::Hidden(h);
    }
    let (Input::Hidden(h), Some(saved)) = (input, kept.pop()) else { unreachable!("there is a stage") };
    let last = stages.last_mut().unwrap();
    let f = pass::tail(ctx, &last.model, &last.params, batch, &weights, None, h, saved, traces);
    step.losses(i, &f.losses.read());
    step.traces(i, &f);
    let (mut dh, jobs) = pass::backward_input(ctx, &last.model, &last.params, f);
    jobs.run(ctx, &last.params, &mut last.grads);
    for s in stages.iter_mut().rev().skip(1) {
        let mut jobs = WeightGrads::default();
        dh = trunk::backward(ctx, &s.model, &s.params, kept.pop().unwrap(), dh, &mut jobs);
        jobs.run(ctx, &s.params, &mut s.grads);
    }
    step.input(i, &dh);
}

fn compare(cuts: impl Fn(&ModelConfig) -> Vec<Vec<usize>>) {
    each_case(|ctx, case, config, precision| {
        let batches = [batch(ctx, config, &LENGTHS, 1), batch(ctx, config, &[12, 70], 2)];
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let whole = step(ctx, &model, &params, &[&batches[0], &batches[1]], None);
        assert_lively(case, &whole.values);
        for cuts in cuts(config) {
            let mut stages = stages(ctx, config, precision, &cuts);
            let mut step = Step::default();
            for (i, b) in batches.iter().enumerate() {
                run(ctx, &mut stages, i, b, &mut step);
            }
            let mut grads: Vec<Grads> = stages.into_iter().map(|s| s.grads).collect();
            step.gradients(ctx, &mut grads);
            assert_same(&format!("{case}, cut at {cuts:?}"), &step.values, &whole.values);
        }
    });
}

#[test]
fn two_stages_are_the_whole_at_every_cut() {
    // A first stage of no layers and a last stage of none included.
    compare(|c| (0..=c.num_hidden_layers).map(|k| vec![k]).collect());
}

#[test]
fn three_stages_are_the_whole() {
    compare(|c| vec![vec![1, 2], vec![1, c.num_hidden_layers]]);
}

#[test]
fn a_part_has_the_weights_of_the_whole() {
    each_case(|ctx, case, config, precision| {
        let whole = Model::whole(ctx, config.clone());
        let params = weights(ctx, &whole, precision);
        let all: Named = published(&params).collect();
        for s in stages(ctx, config, precision, &[1, 2]) {
            for (name, w) in published(&s.params) {
                assert_same_bits(&format!("{case}: {name}"), &w, &all[&name]);
            }
        }
        let (init, different) =
            ([SEED, SEED + 1]).map(|seed| Params::init(ctx, config, whole.layout.clone(), precision, seed)).into();
        assert_ne!(bits(&init.master), bits(&different.master), "{case}: another seed gives other weights");
    });
}

fn published(params: &Params) -> impl Iterator<Item = (String, Vec<u32>)> {
    let master = bits(&params.master);
    let compute = params.compute.as_ref().map(bits).unwrap_or_default();
    let both = move |r: std::ops::Range<usize>| [&master[r.clone()], compute.get(r).unwrap_or_default()].concat();
    params.layout.published().map(move |(_, p)| (p.name.clone(), both(p.range())))
}
