use super::*;
use crate::testing::{assert_close, assert_same_bits, contexts, ctx, finite_difference, gpu, isas, levels, normals};
use crate::{Buf, DType};
use hadal_numerics::Tolerance;

fn v3(experts: usize, top_k: usize, n_group: usize, topk_group: usize) -> Config {
    Config {
        experts,
        top_k,
        scoring: Scoring::Sigmoid,
        n_group,
        topk_group,
        group_score: GroupScore::TopTwo,
        norm_topk_prob: true,
        scale: 2.5,
    }
}

fn v2(experts: usize, top_k: usize, n_group: usize, topk_group: usize, scale: f32) -> Config {
    Config {
        scoring: Scoring::Softmax,
        group_score: GroupScore::Max,
        norm_topk_prob: false,
        scale,
        ..v3(experts, top_k, n_group, topk_group)
    }
}

/// V3, V2, V2-Lite, a softmax that is normalised, all experts chosen, one expert, one expert per group.
fn configs() -> Vec<Config> {
    vec![
        v3(256, 8, 8, 4),
        v2(160, 6, 8, 3, 16.0),
        v2(64, 6, 1, 1, 1.0),
        Config { norm_topk_prob: true, ..v2(12, 3, 4, 2, 1.5) },
        v3(7, 7, 1, 1),
        v3(1, 1, 1, 1),
        v2(5, 2, 5, 3, 1.0),
    ]
}

struct Out {
    scores: Buf,
    indices: Buf,
    weights: Buf,
}

fn run(ctx: &Ctx, c: &Config, logits: &[f32], bias: Option<&[f32]>, given: Option<&[i32]>) -> Out {
    let n = logits.len() / c.experts;
    let mut o = Out {
        scores: ctx.zeros(DType::F32, n * c.experts),
        indices: ctx.zeros(DType::I32, n * c.top_k),
        weights: ctx.zeros(DType::F32, n * c.top_k),
    };
    let (bias, given) = (bias.map(|b| ctx.from_f32(b)), given.map(|g| ctx.from_i32(g)));
    let logits = ctx.from_f32(logits);
    let args = Forward {
        logits: logits.view(),
        bias: bias.as_ref().map(Buf::view),
        given: given.as_ref().map(Buf::view),
        scores: o.scores.view_mut(),
        indices: o.indices.view_mut(),
        weights: o.weights.view_mut(),
    };
    forward(ctx, c, args);
    o
}

/// The choice of one gate, the same on every device.
fn chosen(c: &Config, logits: &[f32], bias: &[f32]) -> Vec<i32> {
    let mut all = levels().into_iter().map(|ctx| run(&ctx, c, logits, Some(bias), None).indices.view().to_i32());
    let first = all.next().unwrap();
    all.for_each(|other| assert_eq!(other, first));
    first
}

fn run_backward(ctx: &Ctx, c: &Config, o: &Out, d_weights: &[f32], d_scores: Option<&[f32]>) -> Buf {
    let mut d_logits = ctx.zeros(DType::F32, o.scores.len());
    let (d_weights, d_scores) = (ctx.from_f32(d_weights), d_scores.map(|d| ctx.from_f32(d)));
    let args = Backward {
        scores: o.scores.view(),
        indices: o.indices.view(),
        d_weights: d_weights.view(),
        d_scores: d_scores.as_ref().map(Buf::view),
        d_logits: d_logits.view_mut(),
    };
    backward(ctx, c, args);
    d_logits
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v.into()).collect()
}

#[test]
fn reference_gradient_is_the_difference_quotient() {
    for (i, c) in configs().into_iter().enumerate() {
        let logits = wide(&normals(i as u64, c.experts, 1.5));
        let (dw, ds) = (wide(&normals(20, c.top_k, 1.0)), wide(&normals(21, c.experts, 0.3)));
        let bias = vec![0.0; c.experts];
        let t = reference::forward(&c, &logits, &bias, None);
        let gradient = reference::backward(&c, &t.scores, &t.indices, &dw, &ds);
        finite_difference(&format!("{c:?}"), &logits, &gradient, |x| {
            let t = reference::forward(&c, x, &bias, Some(&t.indices));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&t.weights, &dw) + dot(&t.scores, &ds)
        });
    }
}

#[test]
fn every_device_matches_the_reference() {
    for ctx in levels() {
        for c in configs() {
            // None, one, and one past a block of tokens; biases of either sign and far above the scores.
            for (n, bias_scale) in [(0, 0.0), (1, 0.1), (17, 0.1), (33, 100.0)] {
                let logits = normals(1, n * c.experts, 2.0);
                let bias = normals(2, c.experts, bias_scale);
                let (dw, ds) = (normals(3, n * c.top_k, 1.0), normals(4, n * c.experts, 0.3));
                let o = run(&ctx, &c, &logits, Some(&bias), None);
                let d_both = run_backward(&ctx, &c, &o, &dw, Some(&ds));
                let d_one = run_backward(&ctx, &c, &o, &dw, None);
                let (mut scores, mut indices, mut weights, mut both, mut one) =
                    (vec![], vec![], vec![], vec![], vec![]);
                for t in 0..n {
                    let row = |x: &[f32], w: usize| wide(&x[t * w..][..w]);
                    let r = reference::forward(&c, &row(&logits, c.experts), &wide(&bias), None);
                    let (dw, ds) = (row(&dw, c.top_k), row(&ds, c.experts));
                    both.extend(reference::backward(&c, &r.scores, &r.indices, &dw, &ds));
                    one.extend(reference::backward(&c, &r.scores, &r.indices, &dw, &vec![0.0; c.experts]));
                    scores.extend(r.scores);
                    indices.extend(r.indices.iter().map(|&e| e as i32));
                    weights.extend(r.weights);
                }
                assert_eq!(o.indices.view().to_i32(), indices, "{c:?}");
                assert_close("scores", &o.scores, &scores, Tolerance::F32_OP);
                assert_close("weights", &o.weights, &weights, Tolerance::F32_OP);
                assert_close("d_logits", &d_both, &both, Tolerance::F32_OP);
                if c.experts == 1 {
                    // One normalised weight is constant: its gradient is zero but for rounding.
                    assert!(d_one.view().to_f32().iter().all(|d| d.abs() < 1e-6));
                } else {
                    assert_close("d_logits without d_scores", &d_one, &one, Tolerance::F32_OP);
                }
            }
        }
    }
}

#[test]
fn a_given_choice_replaces_selection_only() {
    for ctx in levels() {
        let c = v3(16, 4, 4, 2);
        let logits = normals(5, 3 * 16, 1.0);
        let bias = normals(6, 16, 1.0);
        // Not in order of score, and across all groups.
        let given = [15, 0, 7, 8, 3, 2, 1, 0, 4, 12, 9, 1];
        let o = run(&ctx, &c, &logits, Some(&bias), Some(&given));
        let free = run(&ctx, &c, &logits, Some(&bias), None);
        assert_eq!(o.indices.view().to_i32(), given);
        assert_same_bits("scores", &o.scores, &free.scores);
        let dw = normals(7, 12, 1.0);
        let d = run_backward(&ctx, &c, &o, &dw, None);
        let (mut weights, mut d_logits) = (vec![], vec![]);
        for t in 0..3 {
            let given: Vec<usize> = given[t * 4..][..4].iter().map(|&e| e as usize).collect();
            let r = reference::forward(&c, &wide(&logits[t * 16..][..16]), &wide(&bias), Some(&given));
            d_logits.extend(reference::backward(&c, &r.scores, &given, &wide(&dw[t * 4..][..4]), &[0.0; 16]));
            weights.extend(r.weights);
        }
        assert_close("weights", &o.weights, &weights, Tolerance::F32_OP);
        assert_close("d_logits", &d, &d_logits, Tolerance::F32_OP);
        // Its own choice, given back, changes nothing.
        let replay = run(&ctx, &c, &logits, Some(&bias), Some(&free.indices.view().to_i32()));
        assert_same_bits("replayed weights", &replay.weights, &free.weights);
    }
}

/// Scores of few values, so that many are equal; every fourth token also has some that are none, or extreme.
fn crowded(n: usize, experts: usize) -> Vec<f32> {
    const ODD: [f32; 8] =
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN, 0.0, -0.0, 8.507_059e37, -8.507_059e37];
    let (values, odd) = (normals(30, n * experts, 6.0), normals(31, n * experts, 16.0));
    let each = values.iter().zip(odd).enumerate();
    each.map(|(i, (x, odd))| match odd.abs() as usize {
        odd if i / experts % 4 == 1 && odd < ODD.len() => ODD[odd],
        _ => x.round() / 4.0,
    })
    .collect()
}

/// Every number of places, more than are chosen for in lanes among them, of experts that fill vectors and of others.
#[test]
fn the_choice_is_that_of_sorting() {
    let (mut all, isas) = (Vec::new(), isas());
    for experts in [1, 3, 16, 17, 31, 33] {
        all.extend((1..=experts).map(|k| v3(experts, k, 1, 1)));
    }
    all.extend(configs());
    // All of the groups' experts, groups of three and of one, more groups than there are places for in lanes.
    all.extend([v3(32, 4, 4, 2), v3(32, 8, 8, 2), v3(33, 6, 11, 2), v3(64, 6, 8, 4), v3(40, 7, 20, 9)]);
    all.extend([v2(33, 5, 11, 2, 1.0), v2(17, 3, 17, 8, 1.0), v2(12, 8, 4, 3, 1.0)]);
    for c in all {
        // Few, one by one or in a part of a vector; twice 16 and some.
        for (n, bias) in [(2, None), (3, None), (35, None), (33, Some(crowded(1, c.experts)))] {
            let scores = crowded(n, c.experts);
            let each = |e| bias.as_ref().map_or(0.0, |b| b[e]);
            let expected: Vec<i32> = (scores.chunks(c.experts))
                .flat_map(|row| {
                    let choice: Vec<f32> = row.iter().enumerate().map(|(e, s)| s + each(e)).collect();
                    reference::select(&c, &wide(&choice), &vec![0.0; c.experts])
                })
                .map(|e| e as i32)
                .collect();
            for &isa in &isas {
                let mut found = vec![-1; n * c.top_k];
                select(isa, &Rule::from(&c), &scores, bias.as_deref(), &mut found);
                assert_eq!(found, expected, "{isa:?} {c:?} of {n}");
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    // All equal: the first groups, and in them the first experts.
    assert_eq!(chosen(&v3(16, 4, 4, 2), &[0.5; 16], &[0.0; 16]), [0, 1, 2, 3]);
    assert_eq!(chosen(&v3(16, 6, 4, 2), &[0.5; 16], &[0.0; 16]), [0, 1, 2, 3, 4, 5]);
    // Groups 1 and 3 lead with equal sums, 3 has the best expert; 0 and 2 tie for the place that is left.
    let bias = [0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 4.0, 2.0];
    assert_eq!(chosen(&v3(8, 3, 4, 3), &[0.0; 8], &bias), [6, 2, 3]);
    assert_eq!(chosen(&v3(8, 5, 4, 3), &[0.0; 8], &bias), [6, 2, 3, 7, 0]);
    // Equal experts of two groups keep the order of index although the later group is judged higher.
    let bias = [1.0, 0.0, 1.0, 0.5, 0.0, 0.0];
    assert_eq!(chosen(&v3(6, 3, 3, 2), &[0.0; 6], &bias), [0, 2, 3]);
    // A bias so large that it swallows the scores leaves ties.
    assert_eq!(chosen(&v3(4, 2, 1, 1), &[0.1, 0.9, 0.5, 0.7], &[1e30; 4]), [0, 1]);
}

#[test]
fn negative_choices_stay_within_their_groups() {
    // All choices below zero: masking the other groups with zero, as some published code does, would choose them.
    let bias = [-9.0, -9.0, -2.0, -8.0, -3.0, -4.0, -9.0, -9.0];
    assert_eq!(chosen(&v3(8, 4, 4, 2), &[0.0; 8], &bias), [2, 4, 5, 3]);
    // Max looks at the best alone.
    let max = Config { group_score: GroupScore::Max, ..v3(8, 2, 4, 1) };
    assert_eq!(chosen(&max, &[0.0; 8], &bias), [2, 3]);
    assert_eq!(chosen(&v3(8, 2, 4, 1), &[0.0; 8], &bias), [4, 5]);
    // Experts shut off for good are still chosen when nothing else is allowed, and no masked one is.
    let bias = [f32::NEG_INFINITY, -1.0, f32::NEG_INFINITY, -2.0];
    assert_eq!(chosen(&Config { group_score: GroupScore::Max, ..v3(4, 2, 2, 1) }, &[0.0; 4], &bias), [1, 0]);
}

#[test]
fn a_broken_token_gets_distinct_experts_and_harms_no_other() {
    for ctx in levels() {
        let c = v3(16, 4, 4, 2);
        let mut logits = normals(8, 32, 1.0);
        let whole = run(&ctx, &c, &logits, None, None);
        logits[..16].fill(f32::NAN);
        let broken = run(&ctx, &c, &logits, None, None);
        assert_eq!(broken.indices.view().to_i32()[..4], [0, 1, 2, 3]);
        assert!(broken.weights.view().to_f32()[..4].iter().all(|w| w.is_nan()));
        assert_eq!(broken.weights.view().to_f32()[4..], whole.weights.view().to_f32()[4..]);
        // One broken expert among equals: its group still ties with the others, the expert comes after all numbers.
        logits[..16].fill(0.0);
        logits[1] = f32::NAN;
        let one = run(&ctx, &v3(16, 4, 4, 1), &logits, None, None);
        assert_eq!(one.indices.view().to_i32()[..4], [0, 2, 3, 1]);
    }
}

#[test]
fn saturated_scores_keep_gradients_finite() {
    for ctx in levels() {
        let c = v3(8, 2, 1, 1);
        let logits = [vec![-300.0f32; 8], vec![300.0; 8]].concat();
        let o = run(&ctx, &c, &logits, None, None);
        assert_eq!(o.weights.view().to_f32(), [0.0, 0.0, 1.25, 1.25]);
        let d = run_backward(&ctx, &c, &o, &[1.0, 2.0, 3.0, 4.0], None);
        assert!(d.view().to_f32().iter().all(|&x| x == 0.0));
    }
}

#[test]
fn same_bits_for_any_thread_count_and_any_batch() {
    for c in configs() {
        let n = 35;
        let (logits, bias) = (normals(9, n * c.experts, 2.0), normals(10, c.experts, 0.1));
        let (dw, ds) = (normals(11, n * c.top_k, 1.0), normals(12, n * c.experts, 0.1));
        let whole = run(&ctx(), &c, &logits, Some(&bias), None);
        let d_whole = run_backward(&ctx(), &c, &whole, &dw, Some(&ds));
        // A GPU differs only in the order of a sum in softmax's gradient.
        for ctx in contexts().into_iter().chain(gpu()) {
            let o = run(&ctx, &c, &logits, Some(&bias), None);
            assert_eq!(o.indices.view().to_i32(), whole.indices.view().to_i32());
            assert_same_bits("scores", &o.scores, &whole.scores);
            assert_same_bits("weights", &o.weights, &whole.weights);
            if o.scores.view().is_host() || c.scoring == Scoring::Sigmoid {
                assert_same_bits("d_logits", &run_backward(&ctx, &c, &o, &dw, Some(&ds)), &d_whole);
            }
        }
        let t = 20;
        let (e, k) = (t * c.experts..(t + 1) * c.experts, t * c.top_k..(t + 1) * c.top_k);
        for ctx in [ctx()].into_iter().chain(gpu()) {
            let whole = run(&ctx, &c, &logits, Some(&bias), None);
            let d_whole = run_backward(&ctx, &c, &whole, &dw, Some(&ds));
            let alone = run(&ctx, &c, &logits[e.clone()], Some(&bias), None);
            assert_eq!(alone.indices.view().to_i32(), whole.indices.view().to_i32()[k.clone()]);
            assert_eq!(alone.weights.view().to_f32(), whole.weights.view().to_f32()[k.clone()]);
            let d_alone = run_backward(&ctx, &c, &alone, &dw[k.clone()], Some(&ds[e.clone()]));
            assert_eq!(d_alone.view().to_f32(), d_whole.view().to_f32()[e.clone()]);
        }
    }
}

#[test]
#[should_panic(expected = "given index [1, 0] is 4, expected one of 4 experts")]
fn a_given_index_out_of_range_is_refused() {
    run(&ctx(), &v3(4, 2, 1, 1), &[0.0; 8], None, Some(&[0, 1, 4, 2]));
}

#[test]
#[should_panic(expected = "too few experts for the choice")]
fn groups_too_small_for_the_choice_are_refused() {
    run(&ctx(), &v3(8, 3, 4, 1), &[0.0; 8], None, None);
}
