use super::*;
use crate::testing::{assert_close, buf_on, contexts, gpu, normals, op_tolerance};
use crate::{Buf, DType};

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().iter().map(|&x| f64::from(x)).collect()
}

fn devices() -> impl Iterator<Item = Ctx> {
    contexts().into_iter().chain(gpu())
}

/// (rows of x, D, index).
fn cases() -> Vec<(usize, usize, Vec<i32>)> {
    vec![
        (5, 3, vec![4, 0, 2]),
        (1, 1, vec![0]),
        (3, 2, vec![]),
        (200, 7, (0..199).rev().collect()),
        (50, 264, (3..47).collect()),
    ]
}

#[test]
fn gather_moves_rows() {
    for ctx in devices() {
        for dtype in [DType::F32, DType::Bf16] {
            for (rows, dim, index) in cases().into_iter().chain([(3, 2, vec![1, 1, 0, 1])]) {
                let x = buf_on(&ctx, dtype, &normals(1, rows * dim, 1.0));
                let mut y = ctx.zeros(dtype, index.len() * dim);
                gather(&ctx, x.view(), dim, ctx.from_i32(&index).view(), y.view_mut());
                assert_eq!(wide(&y), reference::gather(&wide(&x), dim, &index));
            }
        }
    }
}

/// Into values other than zero: rows that are hit keep what they had, rows that are not keep every bit.
#[test]
fn scatter_adds_to_what_is_there() {
    for ctx in devices() {
        for dtype in [DType::F32, DType::Bf16] {
            for (rows, dim, index) in cases() {
                let x = buf_on(&ctx, dtype, &normals(2, rows * dim, 1.0));
                let d = buf_on(&ctx, dtype, &normals(3, index.len() * dim, 1.0));
                let mut y = x.clone();
                scatter_add(&ctx, d.view(), dim, ctx.from_i32(&index).view(), y.view_mut());
                let expected = reference::scatter_add(&wide(&d), dim, &index, &wide(&x));
                assert_close("scatter", &y, &expected, op_tolerance(dtype));
                let (xs, ys) = (wide(&x), wide(&y));
                for r in (0..rows).filter(|&r| !index.contains(&(r as i32))) {
                    assert_eq!(ys[r * dim..][..dim], xs[r * dim..][..dim]);
                }
            }
        }
    }
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "an index occurs twice")]
fn an_index_twice_is_refused() {
    let ctx = crate::testing::ctx();
    let mut x = ctx.zeros(DType::F32, 4);
    scatter_add(&ctx, ctx.zeros(DType::F32, 4).view(), 2, ctx.from_i32(&[1, 1]).view(), x.view_mut());
}

#[test]
fn strided_copy_leaves_the_rest() {
    for ctx in devices() {
        let x = buf_on(&ctx, DType::F32, &normals(2, 300 * 5, 1.0));
        let mut y: Buf = buf_on(&ctx, DType::F32, &vec![9.0; 300 * 7]);
        copy_strided(&ctx, (x.view().slice(2..1500), 5), (y.view_mut().slice(1..2100), 7), 300, 3);
        let (xs, ys) = (x.view().to_f32(), y.view().to_f32());
        for r in 0..300 {
            assert_eq!(ys[r * 7], 9.0);
            assert_eq!(ys[r * 7 + 1..][..3], xs[r * 5 + 2..][..3]);
            assert_eq!(ys[r * 7 + 4..][..3], [9.0; 3]);
        }
    }
}
