use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, ctx, finite_difference, isas, levels, normals, op_tolerance,
    thread_counts,
};
use crate::{Buf, DType};

/// (rows, width): V3's and V2-Lite's expert widths scaled down, ragged, one past a block, one row, none.
const CASES: [(usize, usize); 7] = [(9, 256), (5, 176), (3, 37), (130, 127), (1, 1), (2, 16_385), (0, 8)];

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

fn run_forward(ctx: &Ctx, x: &Buf, width: usize, rows: Option<i32>) -> Buf {
    let mut y = ctx.zeros(x.dtype(), x.len() / 2);
    let rows = rows.map(|r| ctx.from_i32(&[r]));
    forward(ctx, x.view(), width, rows.as_ref().map(Buf::view), y.view_mut());
    y
}

/// (weights * y, d_gate_up, d_weights).
fn run_backward(ctx: &Ctx, dy: &Buf, x: &Buf, weights: Option<&Buf>, width: usize, rows: Option<i32>) -> [Buf; 3] {
    let (mut y, mut d) = (dy.clone(), x.clone());
    let mut d_weights = ctx.zeros(DType::F32, dy.len() / width);
    let rows = rows.map(|r| ctx.from_i32(&[r]));
    let (dy, gate_up, rows) = (y.view_mut(), d.view_mut(), rows.as_ref().map(Buf::view));
    let weights = weights.map(|w| (w.view(), d_weights.view_mut()));
    backward(ctx, Backward { dy, gate_up, width, rows, weights });
    [y, d, d_weights]
}

#[test]
fn reference_gradients_are_difference_quotients() {
    let (n, f) = (3, 5);
    let values = |stream, n, scale| -> Vec<f64> { normals(stream, n, scale).iter().map(|&v| v.into()).collect() };
    let (x, dy, weights) = (values(1, n * 2 * f, 2.0), values(2, n * f, 1.0), values(3, n, 1.0));
    let loss = |x: &[f64], w: &[f64]| -> f64 {
        reference::forward(x, f).iter().zip(&dy).enumerate().map(|(i, (y, d))| w[i / f] * y * d).sum()
    };
    let (_, d, d_weights) = reference::backward(&dy, &x, &weights, f);
    finite_difference("d_gate_up", &x, &d, |x| loss(x, &weights));
    finite_difference("d_weights", &weights, &d_weights, |w| loss(&x, w));
}

#[test]
fn matches_the_reference() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for (n, f) in CASES {
                let x = buf_on(&ctx, dtype, &normals(3, n * 2 * f, 3.0));
                let dy = buf_on(&ctx, dtype, &normals(4, n * f, 1.0));
                let weights = buf_on(&ctx, DType::F32, &normals(5, n, 1.0));
                let name = format!("{dtype:?} {n}x{f}");
                let tolerance = op_tolerance(dtype);
                let y = run_forward(&ctx, &x, f, None);
                assert_close(&format!("y {name}"), &y, &reference::forward(&wide(&x), f), tolerance);
                for w in [None, Some(&weights)] {
                    let [wy, d, d_weights] = run_backward(&ctx, &dy, &x, w, f, None);
                    let factors = w.map_or(vec![1.0; n], wide);
                    let expected = reference::backward(&wide(&dy), &wide(&x), &factors, f);
                    assert_close(&format!("weighted y {name}"), &wy, &expected.0, tolerance);
                    assert_close(&format!("d {name}"), &d, &expected.1, tolerance);
                    if w.is_some() {
                        // A sum of products of the rounded y.
                        assert_close(&format!("d_weights {name}"), &d_weights, &expected.2, tolerance);
                    } else {
                        assert_same_bits(&format!("y again {name}"), &wy, &y);
                    }
                }
            }
        }
    }
}

#[test]
fn same_bits_for_any_thread_count() {
    for (n, f) in CASES {
        let x = buf(DType::Bf16, &normals(5, n * 2 * f, 3.0));
        let dy = buf(DType::Bf16, &normals(6, n * f, 1.0));
        let w = buf(DType::F32, &normals(7, n, 1.0));
        let run = |c: &Ctx| {
            let [y, d, d_weights] = run_backward(c, &dy, &x, Some(&w), f, None);
            let [plain_y, plain_d, _] = run_backward(c, &dy, &x, None, f, None);
            [run_forward(c, &x, f, None), y, d, d_weights, plain_y, plain_d]
        };
        // Multiply-adds are fused on some levels, and BF16 has its own exponential there: each has its bits.
        for isa in isas() {
            let runs: Vec<_> = thread_counts(isa).iter().map(run).collect();
            for r in &runs[1..] {
                r.iter().zip(&runs[0]).for_each(|(a, b)| assert_same_bits("bits", a, b));
            }
        }
    }
}

#[test]
fn rows_past_the_count_are_left_alone_and_rows_below_keep_their_bits() {
    for ctx in levels() {
        for f in [300, 301] {
            rows_past_the_count(&ctx, 70, f);
        }
    }
}

fn rows_past_the_count(ctx: &Ctx, n: usize, f: usize) {
    let x = buf_on(ctx, DType::F32, &normals(7, n * 2 * f, 2.0));
    let dy = buf_on(ctx, DType::F32, &normals(8, n * f, 1.0));
    let w = buf_on(ctx, DType::F32, &normals(9, n, 1.0));
    let y = run_forward(ctx, &x, f, None).view().to_f32();
    let whole = run_backward(ctx, &dy, &x, Some(&w), f, None);
    for live in [0, 1, 55, 70] {
        let part = run_forward(ctx, &x, f, Some(live as i32)).view().to_f32();
        assert_eq!(part[..live * f], y[..live * f]);
        assert!(part[live * f..].iter().all(|&v| v == 0.0), "rows past {live} were written");
        let part = run_backward(ctx, &dy, &x, Some(&w), f, Some(live as i32));
        let before = [&dy, &x, &ctx.zeros(DType::F32, n)];
        for (((part, whole), before), width) in part.iter().zip(&whole).zip(before).zip([f, 2 * f, 1]) {
            let [part, whole, before] = [part, whole, before].map(|b| b.view().to_f32());
            assert_eq!(part[..live * width], whole[..live * width]);
            assert_eq!(part[live * width..], before[live * width..], "rows past {live} were written");
        }
    }
}

#[test]
fn saturated_gates_stay_finite() {
    for ctx in levels() {
        let x = ctx.from_f32(&[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let dy = ctx.from_f32(&[1.0; 5]);
        let y = run_forward(&ctx, &x, 5, None).view().to_f32();
        assert_eq!(y[0], 0.0);
        assert_eq!(y[2..], [0.0, 400.0, 5e4]);
        let found = run_backward(&ctx, &dy, &x, None, 5, None);
        assert!(found.iter().all(|b| b.view().to_f32().iter().all(|v| v.is_finite())));
    }
}

/// Rows of BF16 with whole lines and a tail: both have the saturation and the NaNs of the formula, on all levels.
#[test]
fn saturated_and_broken_gates_of_bf16() {
    let gates = [-3e38, -1e4, -100.0, -89.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4, 3e38, f32::INFINITY, f32::NAN];
    let f = 3 * gates.len();
    for ctx in levels() {
        let row: Vec<f32> = (0..2 * f).map(|i| if i < f { gates[i % gates.len()] } else { -2.0 }).collect();
        let x = buf_on(&ctx, DType::Bf16, &row);
        let y = run_forward(&ctx, &x, f, None);
        let expected = reference::forward(&wide(&x), f);
        let found = y.view().to_f32();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let expected = *expected as f32;
            let same = found.is_nan() && expected.is_nan() || *found == expected;
            let close = (found - expected).abs() <= 1e-2 * expected.abs() + 1e-34;
            assert!(same || close, "gate {}: {found}, expected {expected}", row[i]);
        }
        let dy = buf_on(&ctx, DType::Bf16, &vec![1.0; f]);
        let [again, d, _] = run_backward(&ctx, &dy, &x, None, f, None);
        assert_same_bits("y again", &again, &y);
        for (i, d) in d.view().to_f32().iter().enumerate() {
            // Of an infinite gate the gradient is infinity times nothing.
            assert_eq!(d.is_finite(), row[i % f].is_finite(), "gate {}: {d}", row[i % f]);
        }
        let weights = buf_on(&ctx, DType::F32, &[f32::from_bits(0x7fff_ffff)]);
        let [weighted, d, d_weights] = run_backward(&ctx, &dy, &x, Some(&weights), f, None);
        assert!([weighted, d].iter().all(|b| b.view().to_f32().iter().all(|v| v.is_nan())));
        assert!(d_weights.view().to_f32()[0].is_nan());
    }
}

#[test]
#[should_panic(expected = "swiglu: 2 rows, but weights Some((1, 2))")]
fn weights_of_another_count_are_refused() {
    let [mut dy, mut x, w, mut d] = [4, 8, 1, 2].map(|n| ctx().zeros(DType::F32, n));
    let weights = Some((w.view(), d.view_mut()));
    backward(&ctx(), Backward { dy: dy.view_mut(), gate_up: x.view_mut(), width: 2, rows: None, weights });
}

#[test]
#[should_panic(expected = "gate_up has 6 elements and y 4")]
fn a_wrong_shape_is_refused() {
    let mut y = ctx().zeros(DType::F32, 4);
    forward(&ctx(), ctx().zeros(DType::F32, 6).view(), 2, None, y.view_mut());
}
