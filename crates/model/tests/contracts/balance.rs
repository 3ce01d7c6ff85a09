//! A balance loss of weight zero is no balance loss.

use crate::setup::*;
use hadal_model::Model;
use hadal_model::pass::LossWeights;

#[test]
fn a_weight_of_zero_leaves_the_gradients_of_the_main_loss() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let batch = batch(ctx, config, &LENGTHS, 1);
        let run = |balance: Vec<f32>| {
            let weights = LossWeights { balance, ..loss_weights(config) };
            step_with(ctx, &model, &params, &[&batch], None, &weights)
        };
        let (zero, none) = (run(vec![0.0; config.num_nextn_predict_layers + 1]), run(vec![]));
        assert_lively(case, &none.values);
        assert_same(case, &zero.values, &none.values);
        let weighted = run(loss_weights(config).balance);
        assert_ne!(weighted.values, none.values, "{case}: a balance loss of weight above zero acts");
    });
}
