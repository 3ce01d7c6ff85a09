//! What a sequence gets does not depend on what else is in the batch.

use crate::setup::*;
use hadal_kernels::Ctx;
use hadal_model::trunk::{self, Input, Options};
use hadal_model::{Batch, Model, Params, heads, pass};

/// Hidden states, logits and the gradient of the trunk's input, as bits.
fn observe(ctx: &Ctx, model: &Model, params: &Params, batch: &Batch) -> [(&'static str, Vec<u32>); 3] {
    let (h, ..) = trunk::forward(ctx, model, params, &batch.depths[0], Input::Tokens, Options::default());
    let (normed, _) = heads::final_norm(ctx, model, params, &h);
    let z = heads::logits(ctx, model, params, &normed);
    let f = pass::forward(ctx, model, params, batch, &loss_weights(&model.config), None);
    let (dh, _) = pass::backward_input(ctx, model, params, f);
    [("hidden", bits(&h)), ("logits", bits(&z)), ("input gradient", bits(&dh))]
}

#[test]
fn a_sequence_alone_equals_the_same_among_others() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let sequences = sequences(config, &LENGTHS, 1);
        let pack = |s: &[hadal_model::Sequence]| Batch::new(ctx, s, config.num_nextn_predict_layers);
        let packed = pack(&sequences);
        let together = observe(ctx, &model, &params, &packed);
        let mut first = 0;
        for s in &sequences {
            let alone = observe(ctx, &model, &params, &pack(std::slice::from_ref(s)));
            for ((what, found), (_, all)) in alone.iter().zip(&together) {
                let width = all.len() / packed.n();
                let rows = &all[first * width..(first + s.tokens.len()) * width];
                assert_same_bits(&format!("{case}, {} tokens alone: {what}", s.tokens.len()), found, rows);
            }
            first += s.tokens.len();
        }
        assert_eq!(first, packed.n());
    });
}
