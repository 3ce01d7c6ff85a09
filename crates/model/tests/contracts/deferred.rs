//! Weight gradients run later are weight gradients run at once.

use crate::setup::*;
use hadal_model::{Grads, Model, WeightGrads, pass};

#[test]
fn a_queue_run_after_all_micro_batches_gives_the_same_bits() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        // Three, because a sum of two has the same bits in either order.
        let lengths: [&[usize]; 3] = [&LENGTHS, &[3, 90], &[41]];
        let make = || [0, 1, 2].map(|i: usize| batch(ctx, config, lengths[i], 1 + i as u64));
        let at_once = step(ctx, &model, &params, &make().each_ref(), None);
        assert_lively(case, &at_once.values);

        let mut step = Step::default();
        let mut queue = WeightGrads::default();
        // All forward passes come before any backward pass.
        let batches = make();
        let forward = |b| pass::forward(ctx, &model, &params, b, &loss_weights(config), None);
        for (i, f) in batches.iter().map(forward).collect::<Vec<_>>().into_iter().enumerate() {
            step.losses(i, &f.losses.read());
            step.traces(i, &f);
            let before = (queue.len(), queue.bytes());
            let (dh, jobs) = pass::backward_input(ctx, &model, &params, f);
            step.input(i, &dh);
            queue.append(jobs);
            assert!(queue.len() > before.0 && queue.bytes() > before.1, "{case}: the queue grows");
        }
        // The queue owns what it needs: nothing else of the passes is left.
        drop(batches);
        let mut grads = Grads::zeros(ctx, model.layout.clone());
        drop(model);
        queue.run(ctx, &params, &mut grads);
        step.gradients(ctx, &mut [grads]);
        assert_same(case, &step.values, &at_once.values);
    });
}
