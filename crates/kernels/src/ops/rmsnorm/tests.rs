use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, contexts, ctx, finite_difference, gpu, levels, normals, op_tolerance,
};
use crate::{Buf, DType, DType::Bf16, DType::F32};

const EPS: f32 = 1e-6;

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// (N, D, distance of rows): scaled down, part of a wider projection, ragged, one row, one past a block, empty, long
/// rows, more rows than one block of a weight's gradient. Not one column: there dx is all cancellation, of which f32
/// keeps no digit.
const SHAPES: [(usize, usize, usize); 9] = [
    (64, 128, 128),
    (100, 64, 96),
    (7, 33, 40),
    (1, 3, 3),
    (129, 17, 17),
    (0, 8, 8),
    (3, 9000, 9000),
    (5, 7168, 7176),
    (700, 264, 264),
];

struct Case {
    n: usize,
    d: usize,
    stride: usize,
    /// Rows `stride` apart; the gaps hold NaN.
    x: Buf,
    dense_x: Vec<f64>,
    w: Buf,
    dy: Buf,
    old: Buf,
}

impl Case {
    fn new(ctx: &Ctx, (n, d, stride): (usize, usize, usize), dtype: DType) -> Self {
        let dense = buf(dtype, &normals(1, n * d, 2.0));
        let mut x = vec![f32::NAN; n * stride];
        for (row, dense) in x.chunks_exact_mut(stride).zip(dense.view().to_f32().chunks_exact(d)) {
            row[..d].copy_from_slice(dense);
        }
        Self {
            n,
            d,
            stride,
            x: buf_on(ctx, dtype, &x),
            dense_x: wide(&dense),
            w: buf_on(ctx, F32, &normals(2, d, 1.0)),
            dy: buf_on(ctx, dtype, &normals(3, n * d, 1.0)),
            old: buf_on(ctx, dtype, &normals(4, n * stride, 1.0)),
        }
    }

    fn forward(&self, ctx: &Ctx) -> (Buf, Buf) {
        let (mut y, mut rstd) = (ctx.zeros(self.x.dtype(), self.n * self.d), ctx.zeros(F32, self.n));
        let (x, weight) = (self.x.view(), self.w.view());
        let (y_view, rstd_view) = (y.view_mut(), rstd.view_mut());
        forward(ctx, Forward { x, x_stride: self.stride, weight, eps: EPS, y: y_view, rstd: rstd_view });
        (y, rstd)
    }

    fn backward(&self, ctx: &Ctx, rstd: &Buf, accumulate: bool) -> (Buf, Buf) {
        let mut dx = self.old.clone();
        let mut dw = ctx.from_f32(&vec![1.0; self.d]);
        self.backward_into(ctx, rstd, accumulate, [Some(&mut dx), Some(&mut dw)]);
        (dx, dw)
    }

    /// Into dx and dw, whichever is there.
    fn backward_into(&self, ctx: &Ctx, rstd: &Buf, accumulate: bool, [dx, dw]: [Option<&mut Buf>; 2]) {
        let dx_stride = self.stride;
        let a = Backward {
            dy: self.dy.view(),
            x: self.x.view(),
            x_stride: self.stride,
            weight: self.w.view(),
            rstd: rstd.view(),
            input: dx.map(|dx| InputGradient { dx: dx.view_mut(), dx_stride, accumulate }),
            weight_gradient: dw.map(|dw| WeightGradient { dw: dw.view_mut(), accumulate }),
        };
        backward(ctx, a);
    }
}

#[test]
fn reference_gradients() {
    let (n, d) = (3, 5);
    let wide = |s, len| normals(s, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (x, w, dy) = (wide(1, n * d), wide(2, d), wide(3, n * d));
    let loss = |x: &[f64], w: &[f64]| reference::forward(x, w, 1e-3).0.iter().zip(&dy).map(|(a, b)| a * b).sum();
    let (dx, dw) = reference::backward(&dy, &x, &w, &reference::forward(&x, &w, 1e-3).1);
    finite_difference("dx", &x, &dx, |x| loss(x, &w));
    finite_difference("dw", &w, &dw, |w| loss(&x, w));
}

#[test]
fn matches_reference() {
    for ctx in levels() {
        for shape in SHAPES {
            for dtype in [F32, Bf16] {
                let case = Case::new(&ctx, shape, dtype);
                let w = wide(&case.w);
                let (y, rstd) = case.forward(&ctx);
                let (ey, er) = reference::forward(&case.dense_x, &w, f64::from(EPS));
                assert_close("y", &y, &ey, op_tolerance(dtype));
                assert_close("rstd", &rstd, &er, op_tolerance(F32));
                let (ex, ew) = reference::backward(&wide(&case.dy), &case.dense_x, &w, &er);
                for accumulate in [false, true] {
                    let (dx, dw) = case.backward(&ctx, &rstd, accumulate);
                    // Elements between the rows keep what they held.
                    let mut expected = wide(&case.old);
                    for (row, e) in expected.chunks_exact_mut(case.stride).zip(ex.chunks_exact(case.d)) {
                        for (old, e) in row.iter_mut().zip(e) {
                            *old = if accumulate { *old + e } else { *e };
                        }
                    }
                    assert_close("dx", &dx, &expected, op_tolerance(dtype));
                    let ew: Vec<f64> = ew.iter().map(|w| if accumulate { w + 1.0 } else { *w }).collect();
                    assert_close("dw", &dw, &ew, op_tolerance(F32));
                    // Each alone has the same bits.
                    let (mut x_alone, mut w_alone) = (case.old.clone(), ctx.from_f32(&vec![1.0; case.d]));
                    case.backward_into(&ctx, &rstd, accumulate, [Some(&mut x_alone), None]);
                    case.backward_into(&ctx, &rstd, accumulate, [None, Some(&mut w_alone)]);
                    assert_same_bits("dx alone", &dx, &x_alone);
                    assert_same_bits("dw alone", &dw, &w_alone);
                }
            }
        }
    }
}

#[test]
fn gaps_between_rows_stay_untouched() {
    for ctx in levels() {
        let case = Case::new(&ctx, (9, 33, 40), F32);
        let (_, rstd) = case.forward(&ctx);
        let (dx, _) = case.backward(&ctx, &rstd, false);
        for (dx, old) in dx.view().to_f32().chunks_exact(40).zip(case.old.view().to_f32().chunks_exact(40)) {
            assert_eq!(dx[33..], old[33..]);
        }
    }
}

#[test]
fn same_bits_for_every_thread_count() {
    let contexts = contexts();
    for shape in [(300, 100, 128), (130, 33, 33)] {
        let case = Case::new(&contexts[0], shape, Bf16);
        let run = |ctx: &Ctx| {
            let (y, rstd) = case.forward(ctx);
            let (dx, dw) = case.backward(ctx, &rstd, true);
            [y, rstd, dx, dw]
        };
        let first = run(&contexts[0]);
        for ctx in &contexts[1..] {
            first.iter().zip(&run(ctx)).for_each(|(a, b)| assert_same_bits("threads", a, b));
        }
    }
}

/// On a GPU every run gives the same bits, those of blocks of rows summed apart too.
#[test]
fn same_bits_in_every_run() {
    let Some(ctx) = gpu() else { return };
    for shape in [(700, 264, 264), (300, 33, 33)] {
        let case = Case::new(&ctx, shape, Bf16);
        let run = || {
            let (y, rstd) = case.forward(&ctx);
            let (dx, dw) = case.backward(&ctx, &rstd, true);
            [y, rstd, dx, dw]
        };
        let first = run();
        for _ in 0..3 {
            first.iter().zip(&run()).for_each(|(a, b)| assert_same_bits("runs", a, b));
        }
    }
}

/// A row of zeros stays zero (eps keeps the root positive), and a row does not depend on its neighbours.
#[test]
fn rows_are_independent() {
    for ctx in levels() {
        let case = || Case::new(&ctx, (50, 64, 64), F32);
        let y = case().forward(&ctx).0.view().to_f32();
        let row = &case().x.view().to_f32()[20 * 64..21 * 64];
        let alone = Case { n: 1, x: ctx.from_f32(row), ..case() };
        assert_eq!(alone.forward(&ctx).0.view().to_f32(), y[20 * 64..21 * 64]);
        let zeros = Case { n: 1, x: ctx.zeros(F32, 64), ..case() };
        assert!(zeros.forward(&ctx).0.view().to_f32().iter().all(|y| *y == 0.0));
    }
}

#[test]
#[should_panic(expected = "x: 3 rows of 4, 5 apart, in 13")]
fn short_rows_are_refused() {
    let ctx = ctx();
    let (x, w, mut y, mut rstd) = (ctx.zeros(F32, 13), ctx.zeros(F32, 4), ctx.zeros(F32, 12), ctx.zeros(F32, 3));
    let (y, rstd) = (y.view_mut(), rstd.view_mut());
    forward(&ctx, Forward { x: x.view(), x_stride: 5, weight: w.view(), eps: EPS, y, rstd });
}
