//! What a head says of each position, against the logits that it never forms.

use crate::setup::*;
use hadal_model::heads::{self, Request};
use hadal_model::trunk::{self, Input, Options};
use hadal_model::{Batch, Model};
use hadal_numerics::{Tolerance, close};

const TEMPERATURE: f32 = 0.7;

/// Log-probabilities of one position by descending value, ties by ascending id.
fn ranked(logits: &[f32]) -> Vec<(i32, f32)> {
    let z: Vec<f64> = logits.iter().map(|&z| f64::from(z) / f64::from(TEMPERATURE)).collect();
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
    let mut all: Vec<(i32, f32)> = z.iter().enumerate().map(|(i, z)| (i as i32, (z - lse) as f32)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all
}

#[test]
fn top_k_is_that_of_the_logits() {
    each_case(|ctx, case, config, precision| {
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let batch = Batch::new(ctx, &sequences(config, &[9, 1, 4], 1), config.num_nextn_predict_layers);
        let depth = &batch.depths[0];
        let (h, ..) = trunk::forward(ctx, &model, &params, depth, Input::Tokens, Options::default());
        let (normed, _) = heads::final_norm(ctx, &model, &params, &h);
        let logits = heads::logits(ctx, &model, &params, &normed);
        let ranked: Vec<_> = logits.view().f32().chunks(config.vocab_size).map(ranked).collect();
        let head = |top_k| {
            let request = Request { targets: depth.targets.clone(), temperature: TEMPERATURE, given: None, top_k };
            heads::forward(ctx, &model, &params, &normed, request, 0)
        };
        let none = head(0);
        assert!(none.top.is_none(), "{case}: nothing asked for");
        for k in [1, 5, config.vocab_size] {
            let out = head(k);
            assert_same_bits(
                &format!("{case}: log-probability beside the top {k}"),
                &bits(&out.logp),
                &bits(&none.logp),
            );
            let (ids, logp) = out.top.as_ref().unwrap();
            assert_eq!(out.bytes() - none.bytes(), 8 * k * batch.n(), "{case}: bytes");
            let best =
                |f: fn(&(i32, f32)) -> f32| -> Vec<f32> { ranked.iter().flat_map(|r| r[..k].iter().map(f)).collect() };
            close(&format!("{case}: top {k}"), logp.view().f32(), &best(|r| r.1), Tolerance::F32_MODEL).unwrap();
            let expected: Vec<i32> = ranked.iter().flat_map(|r| r[..k.min(5)].iter().map(|r| r.0)).collect();
            let found: Vec<i32> = ids.view().i32().chunks(k).flat_map(|c| &c[..k.min(5)]).copied().collect();
            assert_eq!(found, expected, "{case}: ids of the top {k}");
        }
    });
}
