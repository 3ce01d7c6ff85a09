use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, contexts, ctx, finite_difference, levels, normals, op_tolerance,
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

fn run_backward(ctx: &Ctx, dy: &Buf, x: &Buf, width: usize, rows: Option<i32>) -> Buf {
    let mut d = ctx.zeros(x.dtype(), x.len());
    let rows = rows.map(|r| ctx.from_i32(&[r]));
    backward(ctx, dy.view(), x.view(), width, rows.as_ref().map(Buf::view), d.view_mut());
    d
}

#[test]
fn reference_gradient_is_the_difference_quotient() {
    let (n, f) = (3, 5);
    let x: Vec<f64> = normals(1, n * 2 * f, 2.0).iter().map(|&v| v.into()).collect();
    let dy: Vec<f64> = normals(2, n * f, 1.0).iter().map(|&v| v.into()).collect();
    let gradient = reference::backward(&dy, &x, f);
    finite_difference("d_gate_up", &x, &gradient, |x| {
        reference::forward(x, f).iter().zip(&dy).map(|(y, d)| y * d).sum()
    });
}

#[test]
fn cpu_matches_the_reference() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for (n, f) in CASES {
                let x = buf(dtype, &normals(3, n * 2 * f, 3.0));
                let dy = buf(dtype, &normals(4, n * f, 1.0));
                let name = format!("{dtype:?} {n}x{f}");
                let y = run_forward(&ctx, &x, f, None);
                assert_close(&format!("y {name}"), &y, &reference::forward(&wide(&x), f), op_tolerance(dtype));
                let d = run_backward(&ctx, &dy, &x, f, None);
                let expected = reference::backward(&wide(&dy), &wide(&x), f);
                assert_close(&format!("d {name}"), &d, &expected, op_tolerance(dtype));
            }
        }
    }
}

#[test]
fn same_bits_for_any_thread_count() {
    for (n, f) in CASES {
        let x = buf(DType::Bf16, &normals(5, n * 2 * f, 3.0));
        let dy = buf(DType::Bf16, &normals(6, n * f, 1.0));
        let runs: Vec<_> =
            contexts().iter().map(|c| (run_forward(c, &x, f, None), run_backward(c, &dy, &x, f, None))).collect();
        for r in &runs[1..] {
            assert_same_bits("y", &runs[0].0, &r.0);
            assert_same_bits("d", &runs[0].1, &r.1);
        }
    }
}

#[test]
fn rows_past_the_count_are_left_alone_and_rows_below_keep_their_bits() {
    let (n, f) = (70, 300);
    let x = buf(DType::F32, &normals(7, n * 2 * f, 2.0));
    let dy = buf(DType::F32, &normals(8, n * f, 1.0));
    let (y, d) = (run_forward(&ctx(), &x, f, None), run_backward(&ctx(), &dy, &x, f, None));
    for live in [0, 1, 55, 70] {
        let (py, pd) = (
            run_forward(&ctx(), &x, f, Some(live as i32)).view().f32().to_vec(),
            run_backward(&ctx(), &dy, &x, f, Some(live as i32)).view().f32().to_vec(),
        );
        assert_eq!(py[..live * f], y.view().f32()[..live * f]);
        assert_eq!(pd[..live * 2 * f], d.view().f32()[..live * 2 * f]);
        assert!(py[live * f..].iter().chain(&pd[live * 2 * f..]).all(|&v| v == 0.0), "rows past {live} were written");
    }
}

#[test]
fn saturated_gates_stay_finite() {
    let x = buf(DType::F32, &[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let dy = buf(DType::F32, &[1.0; 5]);
    let y = run_forward(&ctx(), &x, 5, None);
    assert_eq!(y.view().f32()[0], 0.0);
    assert_eq!(y.view().f32()[2..], [0.0, 400.0, 5e4]);
    assert!(run_backward(&ctx(), &dy, &x, 5, None).view().f32().iter().all(|v| v.is_finite()));
}

#[test]
#[should_panic(expected = "gate_up has 6 elements and y 4")]
fn a_wrong_shape_is_refused() {
    let mut y = ctx().zeros(DType::F32, 4);
    forward(&ctx(), ctx().zeros(DType::F32, 6).view(), 2, None, y.view_mut());
}
