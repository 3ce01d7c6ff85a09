mod batch;
mod scratch;
mod strides;

use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, ctx, finite_difference, invariant_gpu, isas, levels, normals,
    older_gpu, op_tolerance, thread_counts,
};
use crate::{Buf, DType, DType::Bf16, DType::F32};

/// (m, n, k): the small model's, ragged, one, one past a tile or a piece of k, empty.
const SHAPES: [(usize, usize, usize); 20] = [
    (40, 70, 1100),
    (5, 33, 2080),
    (128, 256, 128),
    (300, 96, 257),
    (1, 1, 1),
    (1, 7, 2),
    (2, 1, 3),
    (5, 3, 4),
    (16, 64, 256),
    (17, 65, 258),
    (33, 16, 511),
    (241, 257, 33),
    (32, 300, 64),
    (7, 513, 129),
    (130, 1, 600),
    (1, 130, 513),
    (64, 48, 1025),
    (0, 5, 4),
    (5, 0, 4),
    (6, 9, 0),
];

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// A context of every level, and of a GPU one for each family of kernels: the library's, ours, ours for older GPUs.
#[track_caller]
fn paths() -> Vec<Ctx> {
    levels().into_iter().chain(invariant_gpu()).chain(older_gpu()).collect()
}

/// A context of every level that promises batch invariance.
#[track_caller]
fn invariant_paths() -> Vec<Ctx> {
    isas().into_iter().map(|isa| crate::testing::ctx_of(2, isa)).chain(invariant_gpu()).chain(older_gpu()).collect()
}

/// Dense `[rows, cols]` placed with `ld`; the gaps hold NaN, which would show up if they were read.
fn strided(dense: &Buf, rows: usize, cols: usize, ld: usize) -> Buf {
    let x = dense.view().to_f32();
    let mut v = vec![f32::NAN; rows * ld];
    for r in 0..rows {
        v[r * ld..][..cols].copy_from_slice(&x[r * cols..][..cols]);
    }
    buf(dense.dtype(), &v)
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Buf,
    b: Buf,
    ta: bool,
    tb: bool,
}

impl Case {
    fn new((m, n, k): (usize, usize, usize), (da, db): (DType, DType), ta: bool, tb: bool) -> Self {
        let a = buf(da, &normals(1, m * k, 1.0));
        let b = buf(db, &normals(2, k * n, 1.0));
        Self { m, n, k, a, b, ta, tb }
    }

    fn expected(&self) -> Vec<f64> {
        reference::product(self.m, self.n, self.k, &wide(&self.a), self.ta, &wide(&self.b), self.tb)
    }

    fn run(&self, ctx: &Ctx, c: &mut Buf, accumulate: bool) {
        let (a, b) = (ctx.here(self.a.clone()), ctx.here(self.b.clone()));
        let lda = if self.ta { self.m } else { self.k };
        let ldb = if self.tb { self.k } else { self.n };
        gemm(
            ctx,
            Gemm {
                m: self.m,
                n: self.n,
                k: self.k,
                a: Mat { data: a.view(), ld: lda },
                ta: self.ta,
                b: Mat { data: b.view(), ld: ldb },
                tb: self.tb,
                c: MatMut { data: c.view_mut(), ld: self.n },
                accumulate,
            },
        );
    }
}

const TRANSPOSES: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn reference_gradients() {
    let (n, rows, cols) = (5, 4, 7);
    let wide = |s, len| normals(s, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (x, w, dy) = (wide(1, n * cols), wide(2, rows * cols), wide(3, n * rows));
    let loss = |y: &[f64]| y.iter().zip(&dy).map(|(a, b)| a * b).sum::<f64>();
    let (dx, dw) = reference::linear_backward(&x, &w, &dy, rows, cols);
    finite_difference("dx", &x, &dx, |x| loss(&reference::linear(x, &w, rows, cols)));
    finite_difference("dw", &w, &dw, |w| loss(&reference::linear(&x, w, rows, cols)));
}

#[test]
fn matches_reference_in_every_layout_and_dtype() {
    let paths = paths();
    for shape in SHAPES {
        for (ta, tb) in TRANSPOSES {
            for (da, db, dc) in
                [(F32, F32, F32), (Bf16, Bf16, Bf16), (F32, Bf16, F32), (Bf16, F32, Bf16), (Bf16, Bf16, F32)]
            {
                let case = Case::new(shape, (da, db), ta, tb);
                let expected = case.expected();
                for ctx in &paths {
                    let mut c = buf_on(ctx, dc, &vec![7.0; case.m * case.n]);
                    case.run(ctx, &mut c, false);
                    assert_close(&format!("{shape:?} {ta} {tb} {da:?} {db:?}"), &c, &expected, op_tolerance(dc));
                }
            }
        }
    }
}

#[test]
fn accumulating_adds_the_finished_product() {
    for ctx in [Some(ctx()), invariant_gpu(), older_gpu()].into_iter().flatten() {
        for shape in SHAPES {
            for (da, dc) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
                // Rows of C that are aligned in one type only may take another kernel, whose bits differ.
                if ctx.device.as_cuda().is_some() && shape.1 % 8 == 4 {
                    continue;
                }
                let case = Case::new(shape, (da, Bf16), false, true);
                let old = buf(dc, &normals(3, case.m * case.n, 100.0));
                let mut product = ctx.zeros(F32, case.m * case.n);
                case.run(&ctx, &mut product, false);
                let mut c = ctx.here(old.clone());
                case.run(&ctx, &mut c, true);
                let sums: Vec<f32> =
                    old.view().to_f32().iter().zip(product.view().to_f32()).map(|(old, new)| old + new).collect();
                assert_same_bits(&format!("{shape:?}"), &c, &buf(dc, &sums));
            }
        }
    }
}

/// Also where the library computes it, and where a long sum is cut into pieces.
#[test]
fn gradients_of_weights_accumulate() {
    for ctx in paths() {
        for (m, n, k) in [(64, 136, 5000), (17, 33, 3001), (8, 8, 0)] {
            for (da, db) in [(F32, F32), (Bf16, Bf16), (F32, Bf16)] {
                let case = Case::new((m, n, k), (da, db), true, false);
                let mut c = buf_on(&ctx, F32, &vec![2.0; m * n]);
                case.run(&ctx, &mut c, true);
                let expected: Vec<f64> = case.expected().iter().map(|x| x + 2.0).collect();
                assert_close(&format!("{m}, {n}, {k}, {da:?}, {db:?}"), &c, &expected, op_tolerance(F32));
                let mut again = buf_on(&ctx, F32, &vec![2.0; m * n]);
                case.run(&ctx, &mut again, true);
                assert_same_bits("twice", &c, &again);
            }
        }
    }
}

#[test]
fn same_bits_for_every_thread_count() {
    for isa in isas() {
        let contexts = thread_counts(isa);
        // The last two are cut into more tasks for more workers.
        for (shape, dtypes) in [
            ((300, 200, 257), (F32, Bf16)),
            ((16, 300, 600), (Bf16, Bf16)),
            ((241, 65, 100), (Bf16, Bf16)),
            ((500, 400, 180), (Bf16, Bf16)),
            ((520, 70, 1100), (Bf16, Bf16)),
        ] {
            for (ta, tb) in TRANSPOSES {
                let case = Case::new(shape, dtypes, ta, tb);
                let run = |ctx: &Ctx| {
                    let mut c = buf(F32, &normals(4, case.m * case.n, 1.0));
                    case.run(ctx, &mut c, true);
                    c
                };
                let first = run(&contexts[0]);
                for ctx in &contexts[1..] {
                    assert_same_bits("threads", &first, &run(ctx));
                }
            }
        }
    }
}

#[test]
fn linear_and_its_gradients() {
    for ctx in paths() {
        for (n, rows, cols) in [(1, 40, 64), (70, 33, 100), (0, 5, 6), (300, 128, 48)] {
            for d in [F32, Bf16] {
                let (x, w) =
                    (buf_on(&ctx, d, &normals(7, n * cols, 1.0)), buf_on(&ctx, d, &normals(8, rows * cols, 0.1)));
                let dy = buf_on(&ctx, d, &normals(9, n * rows, 1.0));
                let weight = Weight { data: w.view(), experts: 1, rows, cols };
                let mut y = ctx.zeros(d, n * rows);
                linear(&ctx, x.view(), &weight, y.view_mut());
                assert_close("y", &y, &reference::linear(&wide(&x), &wide(&w), rows, cols), op_tolerance(d));
                let (ex, ew) = reference::linear_backward(&wide(&x), &wide(&w), &wide(&dy), rows, cols);
                let mut dx = ctx.zeros(d, n * cols);
                linear_backward_input(&ctx, dy.view(), &weight, dx.view_mut(), false);
                assert_close("dx", &dx, &ex, op_tolerance(d));
                // All of a matrix, and all but the first columns of a wider one, whose rows may begin on lines of the cache, all
                // between them, or as they come.
                let wider = |first: usize| [(first, first + cols), (first, (first + cols).next_multiple_of(16))];
                for (first, ld) in [0, 2, 16].into_iter().flat_map(wider) {
                    let mut dw = buf_on(&ctx, F32, &vec![1.0; rows * ld]);
                    let c = MatMut { data: dw.view_mut().slice(first..rows * ld), ld };
                    linear_backward_weight(&ctx, x.view(), dy.view(), rows, cols, c, true);
                    let expected = |base: f64| -> Vec<f64> {
                        let column = |i: usize| (i % ld).checked_sub(first).filter(|&c| c < cols);
                        let at = |i: usize| column(i).map(|c| ew[i / ld * cols + c] + base);
                        (0..rows * ld).map(|i| at(i).unwrap_or(1.0)).collect()
                    };
                    assert_close("dw", &dw, &expected(1.0), op_tolerance(F32));
                    let c = MatMut { data: dw.view_mut().slice(first..rows * ld), ld };
                    linear_backward_weight(&ctx, x.view(), dy.view(), rows, cols, c, false);
                    assert_close("overwritten dw", &dw, &expected(0.0), op_tolerance(F32));
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "B [3, 4] with ld 4 in 11")]
fn a_short_operand_is_refused() {
    let ctx = ctx();
    let (a, b, mut c) = (ctx.zeros(F32, 6), ctx.zeros(F32, 11), ctx.zeros(F32, 8));
    let (a, b) = (Mat { data: a.view(), ld: 3 }, Mat { data: b.view(), ld: 4 });
    let c = MatMut { data: c.view_mut(), ld: 4 };
    gemm(&ctx, Gemm { m: 2, n: 4, k: 3, a, ta: false, b, tb: false, c, accumulate: false });
}

/// Large enough for the largest tiles of every level, more rows than are turned at once included.
#[test]
fn the_largest_tiles() {
    for ctx in paths() {
        let case = Case::new((2048, 2048, 40), (Bf16, Bf16), true, false);
        let (a, b) = (wide(&case.a), wide(&case.b));
        let mut c = ctx.zeros(F32, case.m * case.n);
        case.run(&ctx, &mut c, false);
        let c = c.view().to_f32();
        for i in (0..case.m).step_by(37) {
            for j in (0..case.n).step_by(41) {
                let exact: f64 = (0..case.k).map(|k| a[k * case.m + i] * b[k * case.n + j]).sum();
                let found = f64::from(c[i * case.n + j]);
                assert!((found - exact).abs() < 1e-4, "[{i}, {j}]: {found}, expected {exact}");
            }
        }
    }
}

/// A result that is written past the caches has the bits of its parts, which are too small for that: of whole lines, with a
/// last group that is none, and with rows that begin within lines.
#[test]
fn large_results_have_the_bits_of_their_parts() {
    let (m, k) = (1036, 36);
    for isa in isas() {
        let ctx = crate::testing::ctx_of(2, isa);
        for (n, dtype) in [(1040, F32), (1040, Bf16), (1050, F32)] {
            for ta in [false, true] {
                let case = Case::new((m, n, k), (dtype, dtype), ta, false);
                let product = |rows: std::ops::Range<usize>, c: &mut Buf| {
                    let a = case.a.view().slice(if ta { rows.start } else { rows.start * k }..m * k);
                    let lda = if ta { m } else { k };
                    gemm(
                        &ctx,
                        Gemm {
                            m: rows.len(),
                            n,
                            k,
                            a: Mat { data: a, ld: lda },
                            ta,
                            b: Mat { data: case.b.view(), ld: n },
                            tb: false,
                            c: MatMut { data: c.view_mut(), ld: n },
                            accumulate: false,
                        },
                    );
                };
                let mut whole = ctx.zeros(F32, m * n);
                product(0..m, &mut whole);
                let whole = whole.view().to_f32();
                for first in (0..m).step_by(259) {
                    let rows = first..m.min(first + 259);
                    let mut part = ctx.zeros(F32, rows.len() * n);
                    product(rows.clone(), &mut part);
                    let expected = buf(F32, &whole[rows.start * n..rows.end * n]);
                    assert_same_bits("a part of a large result", &part, &expected);
                }
            }
        }
    }
}
