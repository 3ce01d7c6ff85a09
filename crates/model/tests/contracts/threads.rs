//! The number of threads does not show in the bits.

use crate::setup::*;
use hadal_model::Model;

#[test]
fn one_two_and_five_threads_give_the_same_bits() {
    each_case(|_, case, config, precision| {
        let run = |threads| {
            let ctx = context(threads);
            let model = Model::whole(&ctx, config.clone());
            let params = weights(&ctx, &model, precision);
            let (a, b) = (batch(&ctx, config, &LENGTHS, 1), batch(&ctx, config, &[200, 100], 2));
            step(&ctx, &model, &params, &[&a, &b], None)
        };
        let one = run(1);
        assert_lively(case, &one.values);
        for threads in [2, 5] {
            assert_same(&format!("{case}, {threads} threads"), &run(threads).values, &one.values);
        }
    });
}
