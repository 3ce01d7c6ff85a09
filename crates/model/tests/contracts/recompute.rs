//! What backward computes again is what forward computed: losses, routing and gradients have the same bits whatever is
//! kept, and whether weight gradients wait or run at once.

use crate::setup::*;
use hadal_kernels::Ctx;
use hadal_model::{Grads, Model, Params, Recompute, WeightGrads, pass};

/// A step whose weight gradients run at once; the heads' with their forward pass, or in backward.
fn at_once(ctx: &Ctx, model: &Model, params: &Params, lengths: &[&[usize]], heads_too: bool) -> Step {
    let mut grads = Grads::zeros(ctx, model.layout.clone());
    let mut step = Step::default();
    for (i, lengths) in lengths.iter().enumerate() {
        let batch = batch(ctx, &model.config, lengths, 1 + i as u64);
        let (mut jobs, weights) = (WeightGrads::at_once(ctx, params, &mut grads), loss_weights(&model.config));
        let f = match heads_too {
            true => pass::forward_to_train(ctx, model, params, &batch, &weights, &mut jobs),
            false => pass::forward(ctx, model, params, &batch, &weights, None),
        };
        step.losses(i, &f.losses.read());
        step.traces(i, &f);
        let dh = pass::backward_into(ctx, model, params, f, &mut jobs);
        assert!(jobs.is_empty(), "nothing waits");
        step.input(i, &dh);
    }
    step.gradients(ctx, &mut [grads]);
    step
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    each_case(|ctx, case, config, precision| {
        let lengths: [&[usize]; 2] = [&LENGTHS, &[3, 90]];
        let mut model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        model.recompute = Recompute::None;
        let batches = [0, 1].map(|i: usize| batch(ctx, config, lengths[i], 1 + i as u64));
        let expected = step(ctx, &model, &params, &batches.each_ref(), None);
        assert_lively(case, &expected.values);
        for recompute in Recompute::EACH {
            model.recompute = recompute;
            let queued = step(ctx, &model, &params, &batches.each_ref(), None);
            assert_same(&format!("{case}, {recompute}, queued"), &queued.values, &expected.values);
            for heads_too in [false, true] {
                let direct = at_once(ctx, &model, &params, &lengths, heads_too);
                let name = format!("{case}, {recompute}, at once, heads in forward: {heads_too}");
                assert_same(&name, &direct.values, &expected.values);
            }
        }
    });
}

/// A head takes the tokens of a large vocabulary in several blocks, one way or the other.
#[test]
fn blocks_of_tokens_have_the_same_bits() {
    let ctx = context(2);
    let config = large_vocabulary();
    for precision in PRECISIONS {
        let model = Model::whole(&ctx, config.clone());
        let params = weights(&ctx, &model, precision);
        let lengths: [&[usize]; 2] = [&[200, 100], &[3, 290]];
        let batches = [0, 1].map(|i: usize| batch(&ctx, &config, lengths[i], 1 + i as u64));
        let queued = step(&ctx, &model, &params, &batches.each_ref(), None);
        for heads_too in [false, true] {
            let direct = at_once(&ctx, &model, &params, &lengths, heads_too);
            assert_same(&format!("{precision:?}, heads in forward: {heads_too}"), &direct.values, &queued.values);
        }
    }
}

/// Less is kept from one to the next.
#[test]
fn less_is_kept() {
    each_case(|ctx, case, config, precision| {
        let mut model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let batch = batch(ctx, config, &LENGTHS, 1);
        let bytes = Recompute::EACH.map(|recompute| {
            model.recompute = recompute;
            pass::forward(ctx, &model, &params, &batch, &loss_weights(config), None).bytes()
        });
        assert!(bytes[1] * 10 < bytes[0] * 8 && bytes[2] * 10 < bytes[1] * 6, "{case}: {bytes:?}");
    });
}
