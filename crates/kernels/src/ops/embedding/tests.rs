use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, contexts, ctx, finite_difference, levels, normals, op_tolerance,
};
use crate::{Buf, DType, DType::Bf16, DType::F32};

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Ids that repeat, unevenly.
fn ids(n: usize, vocabulary: usize) -> Vec<i32> {
    (0..n).map(|i| ((i * i * 31 + i / 3) % vocabulary) as i32).collect()
}

/// (N, V, D): scaled down, ragged, one, one past a block of rows, empty, many of an id, ids of more than one digit of a
/// sort.
const SHAPES: [(usize, usize, usize); 7] =
    [(100, 50, 64), (7, 65, 100), (1, 1, 1), (300, 129, 33), (0, 5, 4), (2000, 3, 130), (3000, 1100, 24)];

#[test]
fn reference_gradient() {
    let (n, v, d) = (7, 4, 3);
    let ids = ids(n, v);
    let wide = |s, len| normals(s, len, 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (table, dy) = (wide(1, v * d), wide(2, n * d));
    let gradient = reference::backward(&ids, &dy, d, v);
    finite_difference("dtable", &table, &gradient, |t| {
        reference::forward(&ids, t, d).iter().zip(&dy).map(|(a, b)| a * b).sum()
    });
}

#[test]
fn matches_reference() {
    for ctx in levels() {
        for (n, v, d) in SHAPES {
            let ids = ids(n, v);
            let id_buf = ctx.from_i32(&ids);
            for (dw, dt) in [(F32, F32), (F32, Bf16), (Bf16, Bf16)] {
                let table = buf_on(&ctx, dw, &normals(1, v * d, 1.0));
                let mut y = ctx.zeros(dt, n * d);
                let weight = Weight { data: table.view(), experts: 1, rows: v, cols: d };
                forward(&ctx, id_buf.view(), &weight, y.view_mut());
                // A copy, rounded at most once: exact.
                let expected: Vec<f32> = reference::forward(&ids, &wide(&table), d).iter().map(|&x| x as f32).collect();
                assert_same_bits("y", &y, &buf(dt, &expected));
            }
            for dt in [F32, Bf16] {
                let dy = buf_on(&ctx, dt, &normals(2, n * d, 1.0));
                for accumulate in [true, false] {
                    let mut dtable = ctx.from_f32(&vec![1.0; v * d]);
                    backward(&ctx, id_buf.view(), dy.view(), dtable.view_mut(), accumulate);
                    let before = if accumulate { 1.0 } else { 0.0 };
                    let sums = reference::backward(&ids, &wide(&dy), d, v);
                    let expected: Vec<f64> = sums.iter().map(|x| x + before).collect();
                    assert_close("dtable", &dtable, &expected, op_tolerance(F32));
                }
            }
        }
    }
}

fn gradient(ctx: &Ctx, ids: &[i32], dy: &Buf, old: &Buf) -> Buf {
    let mut dtable = old.clone();
    backward(ctx, ctx.from_i32(ids).view(), dy.view(), dtable.view_mut(), true);
    dtable
}

#[test]
fn same_bits_for_every_thread_count() {
    let (n, v, d): (usize, usize, usize) = (3000, 200, 70);
    let dy = buf(DType::Bf16, &normals(3, n * d, 1.0));
    let old = buf(F32, &normals(4, v * d, 1.0));
    let contexts = contexts();
    let first = gradient(&contexts[0], &ids(n, v), &dy, &old);
    for ctx in &contexts[1..] {
        assert_same_bits("dtable", &first, &gradient(ctx, &ids(n, v), &dy, &old));
    }
}

/// The gradient of a batch is added as if computed alone, in order of position.
#[test]
fn a_finished_sum_is_added() {
    for ctx in levels() {
        for (n, v, d) in [(500, 9, 70), (2500, 700, 64), (1100, 1, 5)] {
            let dy = buf_on(&ctx, F32, &normals(5, n * d, 1.0));
            let old = buf_on(&ctx, F32, &normals(6, v * d, 100.0));
            let alone = gradient(&ctx, &ids(n, v), &dy, &ctx.zeros(F32, v * d));
            let (mut in_order, values) = (vec![0.0f32; v * d], dy.view().to_f32());
            for (i, id) in ids(n, v).into_iter().enumerate() {
                for c in 0..d {
                    in_order[id as usize * d + c] += values[i * d + c];
                }
            }
            assert_same_bits("alone", &alone, &buf(F32, &in_order));
            let sum: Vec<f32> = old.view().to_f32().iter().zip(&in_order).map(|(a, b)| a + b).collect();
            assert_same_bits("added", &gradient(&ctx, &ids(n, v), &dy, &old), &buf(F32, &sum));
        }
    }
}

#[test]
#[should_panic(expected = "token id 5 outside a table of 5 rows")]
fn an_unknown_id_is_refused() {
    let ctx = ctx();
    let (table, mut y) = (ctx.zeros(F32, 20), ctx.zeros(F32, 4));
    let weight = Weight { data: table.view(), experts: 1, rows: 5, cols: 4 };
    forward(&ctx, ctx.from_i32(&[5]).view(), &weight, y.view_mut());
}
