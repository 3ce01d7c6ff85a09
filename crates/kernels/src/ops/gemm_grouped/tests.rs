use super::*;
use crate::ops::gemm;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, ctx, finite_difference, gpu, invariant_gpu, isas, levels, normals,
    older_gpu, op_tolerance, thread_counts,
};
use crate::{Buf, DType, DType::Bf16, DType::F32};

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Rows beyond the last offset: their contents must be neither read (NaN) nor written.
const SPARE: usize = 3;

struct Case {
    offsets: Vec<i32>,
    rows: usize,
    cols: usize,
    x: Buf,
    dy: Buf,
    w: Buf,
}

impl Case {
    fn new(counts: &[i32], rows: usize, cols: usize, d: DType) -> Self {
        let mut offsets = vec![0];
        counts.iter().for_each(|c| offsets.push(offsets[offsets.len() - 1] + c));
        let n = offsets[counts.len()] as usize;
        let spare = |mut v: Vec<f32>, cols: usize| {
            v.resize(v.len() + SPARE * cols, f32::NAN);
            buf(d, &v)
        };
        Self {
            x: spare(normals(1, n * cols, 1.0), cols),
            dy: spare(normals(2, n * rows, 1.0), rows),
            w: buf(d, &normals(3, counts.len() * rows * cols, 0.1)),
            offsets,
            rows,
            cols,
        }
    }

    fn n(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    fn weight<'a>(&self, w: &'a Buf) -> Weight<'a> {
        Weight { data: w.view(), experts: self.offsets.len() - 1, rows: self.rows, cols: self.cols }
    }

    /// (y, dx, dW); outputs start as 5.
    fn run(&self, ctx: &Ctx) -> (Buf, Buf, Buf) {
        let d = self.w.dtype();
        let fives = |d, len| buf_on(ctx, d, &vec![5.0; len]);
        let (mut y, mut dx) = (fives(d, self.dy.len()), fives(d, self.x.len()));
        let mut dw = fives(F32, self.w.len());
        let here = |b: &Buf| ctx.here(b.clone());
        let (x, dy, w, offsets) = (here(&self.x), here(&self.dy), here(&self.w), ctx.from_i32(&self.offsets));
        grouped(ctx, x.view(), offsets.view(), &self.weight(&w), y.view_mut());
        grouped_backward_input(ctx, dy.view(), offsets.view(), &self.weight(&w), dx.view_mut());
        let (x, dy, offsets) = (x.view(), dy.view(), offsets.view());
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, dw.view_mut(), true);
        // Zero and then added to is the same as overwritten.
        let (mut added, mut fresh) = (ctx.zeros(F32, dw.len()), fives(F32, dw.len()));
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, added.view_mut(), true);
        grouped_backward_weight(ctx, x, dy, offsets, self.rows, self.cols, fresh.view_mut(), false);
        assert!(added.view().to_f32() == fresh.view().to_f32(), "an overwritten dW");
        (y, dx, dw)
    }
}

/// Rows per expert: even, ragged, all to one, none, one expert, one past a tile.
const COUNTS: [&[i32]; 6] = [&[4, 4, 4], &[1, 0, 17, 33, 0], &[0, 0, 70, 0], &[0, 0], &[241], &[2, 130, 1, 64]];

#[test]
fn reference_gradients() {
    let (offsets, rows, cols) = ([0, 2, 2, 5], 3, 4);
    let wide = |s, len| normals(s, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (x, dy, w) = (wide(1, 5 * cols), wide(2, 5 * rows), wide(3, 3 * rows * cols));
    let loss = |y: &[f64]| y.iter().zip(&dy).map(|(a, b)| a * b).sum::<f64>();
    let (dx, dw) = reference::backward(&x, &dy, &offsets, &w, rows, cols);
    finite_difference("dx", &x, &dx, |x| loss(&reference::forward(x, &offsets, &w, rows, cols)));
    finite_difference("dw", &w, &dw, |w| loss(&reference::forward(&x, &offsets, w, rows, cols)));
}

#[test]
fn matches_reference() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        for counts in COUNTS {
            for (rows, cols) in [(48, 64), (33, 257), (1, 5), (136, 264)] {
                for d in [F32, Bf16] {
                    let case = Case::new(counts, rows, cols, d);
                    let n = case.n();
                    let (y, dx, dw) = case.run(&ctx);
                    let ey = reference::forward(&wide(&case.x), &case.offsets, &wide(&case.w), rows, cols);
                    let (ex, ew) =
                        reference::backward(&wide(&case.x), &wide(&case.dy), &case.offsets, &wide(&case.w), rows, cols);
                    let spare = |mut v: Vec<f64>, cols| {
                        v.resize((n + SPARE) * cols, 5.0);
                        v
                    };
                    assert_close("y", &y, &spare(ey, rows), op_tolerance(d));
                    assert_close("dx", &dx, &spare(ex, cols), op_tolerance(d));
                    assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
                }
            }
        }
    }
}

#[test]
fn rows_beyond_the_last_offset_stay_untouched() {
    for ctx in [Some(ctx()), gpu(), older_gpu()].into_iter().flatten() {
        for d in [F32, Bf16] {
            let case = Case::new(&[3, 0, 2], 8, 16, d);
            let (y, dx, _) = case.run(&ctx);
            assert!(y.view().to_f32()[5 * 8..].iter().all(|x| *x == 5.0));
            assert!(dx.view().to_f32()[5 * 16..].iter().all(|x| *x == 5.0));
        }
    }
}

#[test]
fn same_bits_for_every_thread_count() {
    for isa in isas() {
        let contexts = thread_counts(isa);
        for counts in COUNTS {
            let case = Case::new(counts, 65, 300, Bf16);
            let first = case.run(&contexts[0]);
            for ctx in &contexts[1..] {
                let other = case.run(ctx);
                assert_same_bits("y", &first.0, &other.0);
                assert_same_bits("dx", &first.1, &other.1);
                assert_same_bits("dw", &first.2, &other.2);
            }
        }
    }
}

/// Every expert's rows have the bits of a plain product of those rows alone, whatever the others got.
#[test]
fn a_row_does_not_depend_on_the_split() {
    for ctx in [Some(ctx()), invariant_gpu(), older_gpu()].into_iter().flatten() {
        for (rows, cols) in [(40, 300), (64, 256)] {
            for d in [F32, Bf16] {
                rows_alone(&ctx, &Case::new(&[1, 0, 17, 33, 130, 1, 7], rows, cols, d));
            }
        }
    }
}

fn rows_alone(ctx: &Ctx, case: &Case) {
    let (rows, cols, d) = (case.rows, case.cols, case.w.dtype());
    let (y, dx, _) = case.run(ctx);
    let (y, dx) = (y.view().to_f32(), dx.view().to_f32());
    let (x, dy, w) = (ctx.here(case.x.clone()), ctx.here(case.dy.clone()), ctx.here(case.w.clone()));
    for e in 0..case.offsets.len() - 1 {
        let w = case.weight(&w).expert(e);
        for t in case.offsets[e] as usize..case.offsets[e + 1] as usize {
            let (mut y1, mut dx1) = (ctx.zeros(d, rows), ctx.zeros(d, cols));
            gemm::linear(ctx, x.view().slice(t * cols..(t + 1) * cols), &w, y1.view_mut());
            let dy = dy.view().slice(t * rows..(t + 1) * rows);
            gemm::linear_backward_input(ctx, dy, &w, dx1.view_mut(), false);
            assert_eq!(y1.view().to_f32(), y[t * rows..(t + 1) * rows], "y of row {t}");
            assert_eq!(dx1.view().to_f32(), dx[t * cols..(t + 1) * cols], "dx of row {t}");
        }
    }
}

/// Many experts, most of them with few rows or none, as a trained router leaves them; the same bits when run again.
#[test]
fn many_experts() {
    let counts: Vec<i32> = (0..96).map(|e| if e % 3 == 0 { 0 } else { 40 / (1 + e) }).chain([200]).collect();
    for ctx in levels().into_iter().chain(older_gpu()) {
        for d in [F32, Bf16] {
            let case = Case::new(&counts, 24, 40, d);
            let (y, dx, dw) = case.run(&ctx);
            let (wx, wdy, ww) = (wide(&case.x), wide(&case.dy), wide(&case.w));
            let n = case.n();
            let ey = reference::forward(&wx, &case.offsets, &ww, 24, 40);
            let (ex, ew) = reference::backward(&wx, &wdy, &case.offsets, &ww, 24, 40);
            let first = |b: &Buf, len: usize| buf(d, &b.view().to_f32()[..len]);
            assert_close("y", &first(&y, n * 24), &ey, op_tolerance(d));
            assert_close("dx", &first(&dx, n * 40), &ex, op_tolerance(d));
            assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
            let again = case.run(&ctx);
            assert_same_bits("y twice", &y, &again.0);
            assert_same_bits("dx twice", &dx, &again.1);
            assert_same_bits("dw twice", &dw, &again.2);
        }
    }
}

/// As a router at the start of training may: one expert with most of the rows, whose gradient many compute together.
#[test]
fn an_expert_with_most_of_the_rows() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        for d in [F32, Bf16] {
            let case = Case::new(&[300, 0, 3001, 1500, 5, 64, 0, 750], 24, 72, d);
            let (_, _, dw) = case.run(&ctx);
            let (_, ew) = reference::backward(&wide(&case.x), &wide(&case.dy), &case.offsets, &wide(&case.w), 24, 72);
            assert_close("dw", &dw, &ew.iter().map(|w| w + 5.0).collect::<Vec<_>>(), op_tolerance(F32));
            assert_same_bits("dw twice", &dw, &case.run(&ctx).2);
        }
    }
}

#[test]
#[should_panic(expected = "9 rows of 4 in a buffer of 20")]
fn more_rows_than_the_capacity_are_refused() {
    let ctx = ctx();
    let (x, w, mut y) = (ctx.zeros(F32, 20), ctx.zeros(F32, 24), ctx.zeros(F32, 27));
    let weight = Weight { data: w.view(), experts: 2, rows: 3, cols: 4 };
    grouped(&ctx, x.view(), ctx.from_i32(&[0, 4, 9]).view(), &weight, y.view_mut());
}
