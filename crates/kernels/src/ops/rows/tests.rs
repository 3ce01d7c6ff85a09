use super::*;
use crate::testing::{buf, contexts, normals};
use crate::{Buf, DType};

#[test]
fn gather_then_scatter_is_the_adjoint() {
    for ctx in contexts() {
        for dtype in [DType::F32, DType::Bf16] {
            for (rows, dim, index) in
                [(5, 3, vec![4, 0, 2]), (1, 1, vec![0]), (3, 2, vec![]), (200, 7, (0..199).rev().collect())]
            {
                let x = buf(dtype, &normals(1, rows * dim, 1.0));
                let idx = ctx.from_i32(&index);
                let mut y = ctx.zeros(dtype, index.len() * dim);
                gather(&ctx, x.view(), dim, idx.view(), y.view_mut());
                let (xs, ys) = (x.view().to_f32(), y.view().to_f32());
                for (n, &i) in index.iter().enumerate() {
                    assert_eq!(ys[n * dim..][..dim], xs[i as usize * dim..][..dim]);
                }
                let mut back = ctx.zeros(dtype, rows * dim);
                scatter_add(&ctx, y.view(), dim, idx.view(), back.view_mut());
                for (r, row) in back.view().to_f32().chunks(dim).enumerate() {
                    let hit = index.contains(&(r as i32));
                    for (c, v) in row.iter().enumerate() {
                        assert_eq!(*v, if hit { xs[r * dim + c] } else { 0.0 });
                    }
                }
            }
        }
    }
}

#[test]
fn strided_copy_leaves_the_rest() {
    for ctx in contexts() {
        let x = buf(DType::F32, &normals(2, 300 * 5, 1.0));
        let mut y: Buf = buf(DType::F32, &vec![9.0; 300 * 7]);
        copy_strided(&ctx, (x.view().slice(2..1500), 5), (y.view_mut().slice(1..2100), 7), 300, 3);
        let (xs, ys) = (x.view().to_f32(), y.view().to_f32());
        for r in 0..300 {
            assert_eq!(ys[r * 7], 9.0);
            assert_eq!(ys[r * 7 + 1..][..3], xs[r * 5 + 2..][..3]);
            assert_eq!(ys[r * 7 + 4..][..3], [9.0; 3]);
        }
    }
}
