use super::{Params, finite, reference, sample};
use crate::testing::{assert_close, assert_same_bits, buf, contexts, ctx, gpu, levels, normals};
use crate::{Buf, Ctx, DType};
use hadal_numerics::Tolerance;

const PLAIN: Params = Params { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3, request: 0, position: 0 };

fn run(ctx: &Ctx, logits: &[f32], params: &[Params]) -> (Vec<i32>, Buf) {
    let (mut tokens, mut logp) = (ctx.zeros(DType::I32, params.len()), ctx.zeros(DType::F32, params.len()));
    sample(ctx, ctx.from_f32(logits).view(), params, tokens.view_mut(), logp.view_mut());
    (tokens.view().to_i32(), logp)
}

/// The token of one row.
fn one(ctx: &Ctx, logits: &[f32], p: Params) -> i32 {
    run(ctx, logits, &[p]).0[0]
}

/// The level that a user would get, and a GPU.
fn devices() -> Vec<Ctx> {
    std::iter::once(ctx()).chain(gpu()).collect()
}

/// Rows of every kind of parameters over a vocabulary of `v`.
fn params(s: usize, v: usize) -> Vec<Params> {
    let ks = [0, 1, 5, v, v + 1, v.div_ceil(2)];
    let ps = [1.0, 0.9, 0.5, 0.0, 0.999];
    let ts = [1.0, 0.0, 0.6, 3.0];
    let at = |i: usize| Params {
        temperature: ts[i % 4],
        top_k: ks[i % 6],
        top_p: ps[i % 5],
        seed: 7,
        request: i as u64 / 3,
        position: i as u64,
    };
    (0..s).map(at).collect()
}

const SHAPES: [[usize; 2]; 6] = [[0, 9], [1, 1], [60, 2], [121, 63], [60, 65], [60, 1000]];

#[test]
fn agrees_with_the_reference() {
    for ctx in levels() {
        for [s, v] in SHAPES {
            let (logits, params) = (normals(1, s * v, 3.0), params(s, v));
            let (tokens, logp) = run(&ctx, &logits, &params);
            let mut want_logp = Vec::new();
            for (r, p) in params.iter().enumerate() {
                let row: Vec<f64> = logits[r * v..(r + 1) * v].iter().map(|&x| f64::from(x)).collect();
                let (id, lp) = reference::sample(&row, p);
                assert_eq!(tokens[r], id as i32, "row {r} of [{s}, {v}]: {p:?}");
                want_logp.push(lp);
            }
            assert_close("logp", &logp, &want_logp, Tolerance::F32_OP);
        }
    }
}

#[test]
fn same_bits_on_any_number_of_threads_and_alone() {
    for [s, v] in SHAPES {
        let (logits, params) = (normals(2, s * v, 2.0), params(s, v));
        let (tokens, logp) = run(&ctx(), &logits, &params);
        for ctx in contexts() {
            let found = run(&ctx, &logits, &params);
            assert_eq!(found.0, tokens);
            assert_same_bits("logp", &found.1, &logp);
        }
        for ctx in devices() {
            let (tokens, logp) = run(&ctx, &logits, &params);
            for r in 0..s {
                let (token, lp) = run(&ctx, &logits[r * v..(r + 1) * v], &params[r..=r]);
                assert_eq!(token[0], tokens[r]);
                assert_same_bits("logp", &lp, &buf(DType::F32, &logp.view().to_f32()[r..=r]));
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    for ctx in devices() {
        let logits = [0.0, 2.0, 2.0, 2.0, -1.0];
        assert_eq!(one(&ctx, &logits, Params { temperature: 0.0, ..PLAIN }), 1);
        for position in 0..200 {
            assert_eq!(one(&ctx, &logits, Params { top_k: 1, position, ..PLAIN }), 1);
            assert!([1, 2].contains(&one(&ctx, &logits, Params { top_k: 2, position, ..PLAIN })));
            // Half of the probability needs two of the three equal ids.
            assert!([1, 2].contains(&one(&ctx, &logits, Params { top_p: 0.5, position, ..PLAIN })));
        }
        // Both zeros are one value.
        for (position, logits) in (0..200).flat_map(|p| [(p, [0.0, -0.0, 0.0]), (p, [-0.0, -0.0, 0.0])]) {
            assert_ne!(one(&ctx, &logits, Params { top_k: 2, position, ..PLAIN }), 2);
        }
    }
}

#[test]
fn the_least_top_p_keeps_exactly_one() {
    for ctx in devices() {
        let logits = normals(3, 300, 0.1);
        let best = one(&ctx, &logits, Params { temperature: 0.0, ..PLAIN });
        for top_p in [0.0, 1e-30, 1e-6] {
            for position in 0..50 {
                assert_eq!(one(&ctx, &logits, Params { top_p, position, ..PLAIN }), best, "top_p {top_p}");
            }
        }
    }
}

/// Only kept ids are drawn, every one of them is, and as often as it should be (Pearson's statistic).
#[test]
fn draws_follow_the_kept_distribution() {
    for ctx in devices() {
        let logits = [0.3f32, -1.0, 2.0, 0.9, f32::NEG_INFINITY, 1.4, 0.0, 1.1];
        let wide: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
        let cases = [
            PLAIN,
            Params { temperature: 0.5, ..PLAIN },
            Params { top_k: 4, ..PLAIN },
            Params { top_p: 0.8, temperature: 2.0, ..PLAIN },
            Params { top_k: 6, top_p: 0.7, ..PLAIN },
        ];
        for p in cases {
            let n = 20_000;
            let rows: Vec<Params> = (0..n).map(|position| Params { position, ..p }).collect();
            let (tokens, _) = run(&ctx, &logits.repeat(rows.len()), &rows);
            let mut counts = [0.0f64; 8];
            tokens.iter().for_each(|&t| counts[t as usize] += 1.0);
            let mut statistic = 0.0;
            for (id, q) in reference::kept(&wide, &p).into_iter().enumerate() {
                if q == 0.0 {
                    assert_eq!(counts[id], 0.0, "{p:?} drew {id}");
                } else {
                    let expected = q * n as f64;
                    statistic += (counts[id] - expected).powi(2) / expected;
                }
            }
            // The 0.999 quantile for the 6 degrees of freedom of the widest case.
            assert!(statistic < 22.5, "{p:?}: chi-square {statistic}, counts {counts:?}");
        }
    }
}

#[test]
fn a_draw_is_a_function_of_seed_request_and_position() {
    for ctx in devices() {
        let logits = normals(4, 500, 0.1);
        let draw = |p: Params| (0..8).map(|position| one(&ctx, &logits, Params { position, ..p })).collect::<Vec<_>>();
        assert_eq!(draw(PLAIN), draw(PLAIN));
        assert_ne!(draw(PLAIN), draw(Params { seed: 4, ..PLAIN }));
        assert_ne!(draw(PLAIN), draw(Params { request: 1, ..PLAIN }));
    }
}

/// A temperature near zero is greedy in effect, and huge logits do not overflow.
#[test]
fn extremes_stay_finite() {
    for ctx in devices() {
        let logits = [-3e38f32, 1.0, 3e38, 0.0];
        for temperature in [0.0, f32::MIN_POSITIVE, 1e-3, 1.0] {
            let (tokens, logp) = run(&ctx, &logits, &[Params { temperature, ..PLAIN }]);
            assert_eq!(tokens, [2]);
            assert_eq!(logp.view().to_f32(), [0.0]);
        }
    }
}

#[test]
fn rows_that_are_not_finite_are_told() {
    let broken = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for ctx in levels() {
        for [s, v] in SHAPES {
            let (mut x, mut expected) = (normals(5, s * v, 3e38), vec![1; s]);
            x.iter_mut().for_each(|x| *x = x.clamp(-f32::MAX, f32::MAX));
            // Every third row, at the first, the last or another place.
            for r in (0..s).step_by(3) {
                x[r * v + [0, v - 1, r * 7 % v][r / 3 % 3]] = broken[r / 3 % 4];
                expected[r] = 0;
            }
            let mut out = ctx.zeros(DType::I32, s);
            finite(&ctx, ctx.from_f32(&x).view(), out.view_mut());
            assert_eq!(out.view().to_i32(), expected, "[{s}, {v}]");
        }
    }
}

#[test]
#[should_panic(expected = "logit [1, 2] is NaN")]
fn a_nan_is_named() {
    run(&ctx(), &[0.0, 1.0, 2.0, 0.0, 1.0, f32::NAN], &[PLAIN, Params { temperature: 0.0, ..PLAIN }]);
}

#[test]
#[should_panic(expected = "logit [0, 0] is inf")]
fn an_infinity_is_named() {
    one(&ctx(), &[f32::INFINITY, 1.0], PLAIN);
}

#[test]
#[should_panic(expected = "all 3 logits of row 0 are -inf")]
fn a_row_that_forbids_everything_is_named() {
    one(&ctx(), &[f32::NEG_INFINITY; 3], PLAIN);
}
