mod case;

use super::{cpu::SLICE, cuda::SLICE as WIDE, reference, target_weights};
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, ctx, finite_difference, gpu, isas, levels, normals, older_gpu,
    op_tolerance, thread_counts,
};
use crate::{Buf, Ctx, DType};
use case::{Case, each_case, widen};
use hadal_numerics::Tolerance;

#[test]
fn reference_gradients_agree_with_finite_differences() {
    for temperature in [1.0, 0.6] {
        let c = Case::new(&ctx(), DType::F32, [6, 3, 9, 2], temperature);
        let (hidden, weight) = (widen(&c.hidden), widen(&c.weight));
        let (d_logp, d_entropy, d_given) = (widen(&c.d_logp), widen(&c.d_entropy), widen(&c.d_given));
        let (targets, given) = (c.targets.view().i32(), c.given.view().i32());
        let at = reference::Inputs {
            hidden: &hidden,
            weight: &weight,
            d: c.d,
            targets,
            temperature: f64::from(temperature),
            given,
        };
        let loss = |hidden: &[f64], weight: &[f64]| {
            let o = reference::forward(&reference::Inputs { hidden, weight, ..at });
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&o.logp, &d_logp) + dot(&o.entropy, &d_entropy) + dot(&o.given_logp, &d_given)
        };
        let (dh, dw) = reference::backward(&at, &d_logp, &d_entropy, &d_given);
        finite_difference("d_hidden", &hidden, &dh, |h| loss(h, &weight));
        finite_difference("d_weight", &weight, &dw, |w| loss(&hidden, w));
    }
}

#[test]
fn agrees_with_the_reference() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        let tol = Tolerance::F32_OP;
        each_case(&ctx, |dtype, c| {
            let (hidden, weight) = (widen(&c.hidden), widen(&c.weight));
            let temperature = f64::from(c.temperature);
            let (targets, given) = (c.targets.view().to_i32(), c.given.view().to_i32());
            let (targets, given) = (&targets[..], &given[..]);
            let x = reference::Inputs { hidden: &hidden, weight: &weight, d: c.d, targets, temperature, given };
            let want = reference::forward(&x);
            let k = c.v.min(6);
            let [lse, logp, entropy, given_logp, top_ids, top_logp] = c.forward(&ctx, k);
            assert_close("lse", &lse, &want.lse, tol);
            assert_close("logp", &logp, &want.logp, tol);
            assert_close("entropy", &entropy, &want.entropy, tol);
            assert_close("given_logp", &given_logp, &want.given_logp, tol);
            let ids: Vec<i32> = want.ranked.iter().flat_map(|(ids, _)| ids[..k].to_vec()).collect();
            assert_eq!(top_ids.view().to_i32(), ids);
            let top: Vec<f64> = want.ranked.iter().flat_map(|(_, logp)| logp[..k].to_vec()).collect();
            assert_close("top_logp", &top_logp, &top, tol);

            let before = buf_on(&ctx, DType::F32, &normals(20, c.v * c.d, 1.0));
            let (d_logp, d_entropy, d_given) = (widen(&c.d_logp), widen(&c.d_entropy), widen(&c.d_given));
            let (want_dh, mut want_dw) = reference::backward(&x, &d_logp, &d_entropy, &d_given);
            let [_, dw] = c.backward_onto(&ctx, dtype, (&before, false), [true, true]);
            assert_close("overwritten d_weight", &dw, &want_dw, op_tolerance(dtype));
            want_dw.iter_mut().zip(widen(&before)).for_each(|(w, b)| *w += b);
            let [dh, dw] = c.backward(&ctx, dtype, &before, [true, true]);
            assert_close("d_hidden", &dh, &want_dh, op_tolerance(dtype));
            // In bf16 the gradients of the logits are rounded before their products.
            assert_close("d_weight", &dw, &want_dw, op_tolerance(dtype));
        });
    }
}

/// Contexts that must agree to the bit: one level's with several numbers of threads; a GPU's again and again.
fn alike() -> impl Iterator<Item = Vec<Ctx>> {
    isas().into_iter().map(thread_counts).chain(gpu().map(|ctx| vec![ctx.clone(), ctx]))
}

#[test]
fn same_bits_on_any_number_of_threads_and_whichever_gradient_is_asked_for() {
    for contexts in alike() {
        each_case(&contexts[0], |dtype, c| {
            let before = buf_on(&contexts[0], DType::F32, &normals(20, c.v * c.d, 1.0));
            let outputs = c.forward(&contexts[0], c.v.min(3));
            let [dh, dw] = c.backward(&contexts[0], dtype, &before, [true, true]);
            for ctx in &contexts {
                let found = c.forward(ctx, c.v.min(3));
                assert_eq!(found[4].view().to_i32(), outputs[4].view().to_i32());
                for i in [0, 1, 2, 3, 5] {
                    assert_same_bits("forward", &found[i], &outputs[i]);
                }
                assert_same_bits("d_hidden alone", &c.backward(ctx, dtype, &before, [true, false])[0], &dh);
                assert_same_bits("d_weight alone", &c.backward(ctx, dtype, &before, [false, true])[1], &dw);
            }
        });
    }
}

/// Among the shapes are some of several blocks of tokens.
#[test]
fn both_directions_at_once_give_the_bits_of_one_after_the_other() {
    let contexts = alike().chain(older_gpu().map(|ctx| vec![ctx]));
    for contexts in contexts {
        let ctx = &contexts[0];
        each_case(ctx, |dtype, c| {
            let before = buf_on(ctx, DType::F32, &normals(20, c.v * c.d, 1.0));
            // On a GPU forward has another way where more is asked for than what backward's own forward is.
            let k = if c.g > 0 { c.v.min(3) } else { 0 };
            for accumulate in [false, true] {
                let outputs = c.forward(ctx, k);
                let gradients = c.backward_onto(ctx, dtype, (&before, accumulate), [true, true]);
                let wants = [[true, true], [true, false], [false, true]];
                for (ctx, want) in contexts.iter().zip(wants.into_iter().cycle()).chain([(ctx, wants[1])]) {
                    let (found, found_gradients) = c.both(ctx, dtype, (&before, accumulate), k, want);
                    assert_eq!(found[4].view().to_i32(), outputs[4].view().to_i32());
                    for i in [0, 1, 2, 3, 5] {
                        assert_same_bits("outputs", &found[i], &outputs[i]);
                    }
                    for (i, name) in ["d_hidden", "d_weight"].into_iter().enumerate().filter(|(i, _)| want[*i]) {
                        assert_same_bits(name, &found_gradients[i], &gradients[i]);
                    }
                }
            }
        });
    }
}

/// What a row gives alone is what it gives among others.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    for ctx in levels() {
        if let Some(cuda) = ctx.device.as_cuda() {
            cuda.set_invariant(true);
        }
        each_case(&ctx, |dtype, c| {
            let outputs = c.forward(&ctx, c.v.min(3));
            let before = buf_on(&ctx, DType::F32, &vec![0.0; c.v * c.d]);
            let [dh, _] = c.backward(&ctx, dtype, &before, [true, false]);
            for r in (0..c.n).step_by(4).take(9).chain(c.n.checked_sub(1)) {
                let alone = c.row(&ctx, r);
                for (all, one) in outputs.iter().zip(&alone.forward(&ctx, c.v.min(3))) {
                    let w = one.len();
                    let part = all.view().slice(r * w..(r + 1) * w);
                    if one.dtype() == DType::I32 {
                        assert_eq!(part.to_i32(), one.view().to_i32());
                    } else {
                        assert_same_bits("forward", &buf(DType::F32, &part.to_f32()), one);
                    }
                }
                let part = buf(dtype, &dh.view().slice(r * c.d..(r + 1) * c.d).to_f32());
                assert_same_bits("d_hidden", &part, &alone.backward(&ctx, dtype, &before, [true, false])[0]);
            }
        });
    }
}

/// All ids equal, K past a slice: the lowest ids in order; and a larger one that comes late goes first.
#[test]
fn top_ties_go_to_the_lowest_id() {
    for (ctx, width) in levels().iter().flat_map(|ctx| [(ctx, SLICE), (ctx, WIDE)]) {
        let (v, k) = (2 * width, width + 5);
        let mut c = Case::new(ctx, DType::F32, [2, 1, v, 0], 1.0);
        let mut weight = vec![0.5; v];
        (weight[v - 3], weight[v - 1]) = (1.0, 1.0);
        c.weight = buf_on(ctx, DType::F32, &weight);
        c.hidden = buf_on(ctx, DType::F32, &[1.0, 0.0]);
        let [.., ids, _] = c.forward(ctx, k);
        let ids = ids.view().to_i32();
        let first: Vec<i32> = [v as i32 - 3, v as i32 - 1].into_iter().chain(0..k as i32 - 2).collect();
        assert_eq!(&ids[..k], first);
        assert_eq!(&ids[k..], (0..k as i32).collect::<Vec<_>>());
    }
}

/// Many ids wanted, all different and in no order: each is merged in where it belongs.
#[test]
fn as_many_of_the_most_likely_as_there_are() {
    let (v, d) = (2 * WIDE + 300, 4);
    for ctx in levels() {
        let c = Case::new(&ctx, DType::F32, [2, d, v, 0], 1.0);
        let [lse, .., ids, top] = c.forward(&ctx, v);
        let (ids, top, lse) = (ids.view().to_i32(), top.view().to_f32(), lse.view().to_f32());
        let (hidden, weight) = (c.hidden.view().to_f32(), c.weight.view().to_f32());
        for r in 0..2 {
            let (ids, top) = (&ids[r * v..][..v], &top[r * v..][..v]);
            let mut seen = ids.to_vec();
            seen.sort_unstable();
            assert_eq!(seen, (0..v as i32).collect::<Vec<_>>());
            assert!(top.is_sorted_by(|a, b| a >= b));
            for (&id, &top) in ids.iter().zip(top) {
                let w = &weight[id as usize * d..][..d];
                let z: f32 = hidden[r * d..][..d].iter().zip(w).map(|(h, w)| h * w).sum();
                assert!((z - lse[r] - top).abs() < 1e-4, "row {r} id {id}: {top}, expected {}", z - lse[r]);
            }
        }
    }
}

/// Logits far apart: no overflow on the way, whichever slice holds the largest.
#[test]
fn large_logits_stay_finite() {
    for (ctx, largest) in levels().iter().flat_map(|c| [0, SLICE - 1, SLICE + 3, WIDE - 1, WIDE + 3].map(|l| (c, l))) {
        let v = WIDE + 4;
        for dtype in [DType::F32, DType::Bf16] {
            let mut c = Case::new(ctx, dtype, [1, 8, v, 0], 0.5);
            let mut weight = vec![0.0; 8 * v];
            weight.iter_mut().step_by(8).for_each(|w| *w = -8192.0);
            weight[8 * largest] = 8192.0;
            c.weight = buf_on(ctx, dtype, &weight);
            c.hidden = buf_on(ctx, dtype, &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
            c.targets = ctx.from_i32(&[1]);
            let [lse, logp, entropy, ..] = c.forward(ctx, 0);
            assert_eq!(lse.view().to_f32(), [16384.0]);
            assert_eq!(logp.view().to_f32(), [if largest == 1 { 0.0 } else { -32768.0 }]);
            assert_eq!(entropy.view().to_f32(), [0.0]);
        }
    }
}

/// A NaN in one row shows in that row and in no other; a row without gradients takes none from it.
#[test]
fn a_row_that_is_not_finite_stays_alone() {
    for (ctx, g) in levels().iter().flat_map(|ctx| [(ctx, 2), (ctx, 0)]) {
        for dtype in [DType::F32, DType::Bf16] {
            let mut c = Case::new(ctx, dtype, [4, 8, WIDE + 9, g], 1.0);
            let clean = c.forward(ctx, g);
            let mut hidden = c.hidden.view().to_f32();
            hidden[2 * 8] = f32::NAN;
            c.hidden = buf_on(ctx, dtype, &hidden);
            let found = c.forward(ctx, g);
            for (name, i) in [("lse", 0), ("entropy", 2)] {
                for (r, (a, b)) in found[i].view().to_f32().into_iter().zip(clean[i].view().to_f32()).enumerate() {
                    assert!(
                        if r == 2 { a.is_nan() } else { a.to_bits() == b.to_bits() },
                        "{name}[{r}]: {a}, clean {b}"
                    );
                }
            }
            let zero_row_2 = |b: &Buf, w: usize| {
                let mut x = b.view().to_f32();
                x[2 * w..3 * w].fill(0.0);
                buf_on(ctx, DType::F32, &x)
            };
            c.d_entropy = zero_row_2(&c.d_entropy, 1);
            c.d_given = zero_row_2(&c.d_given, g);
            let before = buf_on(ctx, DType::F32, &vec![0.0; c.v * c.d]);
            let [dh, _] = c.backward(ctx, dtype, &before, [true, false]);
            let dh = dh.view().to_f32();
            assert!(dh.iter().all(|x| x.is_finite()));
            assert!(dh[16..24].iter().all(|&x| x == 0.0));
        }
    }
}

/// The size of a small model's training step: entropy at initialisation is near that of V equal choices.
#[test]
fn a_training_step_of_a_small_model() {
    let (n, d, v) = (2048, 256, 4096);
    for ctx in [ctx()].into_iter().chain(gpu()) {
        let mut c = Case::new(&ctx, DType::Bf16, [n, d, v, 0], 1.0);
        c.weight = buf_on(&ctx, DType::Bf16, &normals(11, v * d, 0.006));
        let [_, logp, entropy, ..] = c.forward(&ctx, 0);
        let uniform = (v as f32).ln();
        assert!(entropy.view().to_f32().iter().all(|h| (h - uniform).abs() < 0.02));
        assert!(logp.view().to_f32().iter().all(|l| *l == 0.0 || (l + uniform).abs() < 1.0));
        // Gradients of logp over all ids add up to zero in each column of the weight's, but for their rounding to bf16:
        // those of a token, of which the sizes add up to twice that of d_logp, change by 2^-9 of themselves at most.
        c.d_entropy = buf_on(&ctx, DType::F32, &vec![0.0; n]);
        let before = buf_on(&ctx, DType::F32, &vec![0.0; v * d]);
        let [_, dw] = c.backward(&ctx, DType::Bf16, &before, [true, true]);
        let (dw, hidden, d_logp) = (dw.view().to_f32(), widen(&c.hidden), widen(&c.d_logp));
        for i in 0..d {
            let sum: f64 = (0..v).map(|j| f64::from(dw[j * d + i])).sum();
            let size: f64 = (0..n).map(|r| (d_logp[r] * hidden[r * d + i]).abs()).sum();
            assert!(sum.abs() < 2.0 / 512.0 * size, "column {i}: {sum:e} of {size:e}");
        }
    }
}

#[test]
fn weights_of_targets() {
    for ctx in levels() {
        for n in [0usize, 1, 300] {
            let targets: Vec<i32> = (0..n as i32).map(|r| if r % 3 == 1 { -1 } else { r }).collect();
            let mut out = buf_on(&ctx, DType::F32, &vec![7.0; n]);
            target_weights(&ctx, ctx.from_i32(&targets).view(), -0.25, out.view_mut());
            let expected: Vec<f32> = targets.iter().map(|&t| if t < 0 { 0.0 } else { -0.25 }).collect();
            assert_eq!(out.view().to_f32(), expected);
        }
    }
}

#[test]
#[should_panic(expected = "target [1] is 20, expected -1..20")]
fn a_target_out_of_range_is_named() {
    let mut c = Case::new(&ctx(), DType::F32, [2, 8, 20, 0], 1.0);
    c.targets = ctx().from_i32(&[-1, 20]);
    c.forward(&ctx(), 0);
}
