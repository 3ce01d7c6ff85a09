//! Operands and results whose rows lie apart, begin anywhere, or are one only.

use super::*;

#[test]
fn strides_are_respected() {
    for ctx in paths() {
        for (m, n, k) in [(9, 33, 20), (70, 65, 300), (1, 5, 3)] {
            for (ta, tb) in TRANSPOSES {
                for d in [F32, Bf16] {
                    let case = Case::new((m, n, k), (d, d), ta, tb);
                    let (ra, ca) = if ta { (k, m) } else { (m, k) };
                    let (rb, cb) = if tb { (n, k) } else { (k, n) };
                    let (a, b) = (strided(&case.a, ra, ca, ca + 3), strided(&case.b, rb, cb, cb + 5));
                    let (a, b) = (ctx.here(a), ctx.here(b));
                    let mut c = buf_on(&ctx, d, &vec![-3.0; m * (n + 2)]);
                    let g = Gemm {
                        m,
                        n,
                        k,
                        a: Mat { data: a.view(), ld: ca + 3 },
                        ta,
                        b: Mat { data: b.view(), ld: cb + 5 },
                        tb,
                        c: MatMut { data: c.view_mut(), ld: n + 2 },
                        accumulate: false,
                    };
                    gemm(&ctx, g);
                    let c = c.view().to_f32();
                    for i in 0..m {
                        assert_eq!(c[i * (n + 2) + n..][..2], [-3.0, -3.0], "gap after row {i}");
                    }
                    let rows: Vec<f32> = c.chunks_exact(n + 2).flat_map(|row| &row[..n]).copied().collect();
                    assert_close(
                        &format!("{m}, {n}, {k}, {ta}, {tb}"),
                        &buf(d, &rows),
                        &case.expected(),
                        op_tolerance(d),
                    );
                    // Kernels of our own take the same order of sums however operands lie in memory.
                    if ctx.device.as_cuda().is_none_or(|cuda| cuda.invariant()) {
                        let mut dense = ctx.zeros(d, m * n);
                        case.run(&ctx, &mut dense, false);
                        assert_same_bits("strided and dense", &buf(d, &rows), &dense);
                    }
                }
            }
        }
    }
}

/// Pairs of bf16 may be read where they lie if every row begins at a whole word, and are copied if not.
#[test]
fn rows_of_pairs_begin_anywhere() {
    for ctx in levels() {
        for (m, n, k) in [(70, 65, 300), (33, 40, 1100), (250, 36, 258)] {
            let case = Case::new((m, n, k), (Bf16, Bf16), false, false);
            let mut dense = ctx.zeros(F32, m * n);
            case.run(&ctx, &mut dense, false);
            assert_close(&format!("{m}, {n}, {k}"), &dense, &case.expected(), op_tolerance(F32));
            let b = ctx.here(case.b.clone());
            for (ld, before) in [(k + 6, 0), (k + 6, 1), (k + 6, 2), (k + 5, 0), (k + 5, 1)] {
                let rows = strided(&case.a, m, k, ld).view().to_f32();
                let shifted: Vec<f32> = std::iter::repeat_n(f32::NAN, before).chain(rows).collect();
                let a = buf_on(&ctx, Bf16, &shifted);
                let a = Mat { data: a.view().slice(before..before + m * ld), ld };
                let mut found = ctx.zeros(F32, m * n);
                let (b, c) = (Mat { data: b.view(), ld: n }, MatMut { data: found.view_mut(), ld: n });
                gemm(&ctx, Gemm { m, n, k, a, ta: false, b, tb: false, c, accumulate: false });
                if ctx.device.as_cuda().is_none() {
                    assert_same_bits(&format!("{ld} apart from {before}"), &found, &dense);
                }
            }
        }
    }
}

/// The distance of rows is any number where there is one row only.
#[test]
fn a_single_row_lies_any_distance_from_the_next() {
    let ld = |rows: usize, cols: usize| if rows == 1 { usize::MAX } else { cols };
    for ctx in isas().into_iter().map(|isa| crate::testing::ctx_of(2, isa)) {
        for (m, n, k) in [(1, 40, 70), (1, 5, 3), (40, 1, 70), (1, 1, 300), (40, 70, 1), (600, 40, 1)] {
            for (ta, tb) in TRANSPOSES {
                for d in [F32, Bf16] {
                    let case = Case::new((m, n, k), (d, d), ta, tb);
                    let (lda, ldb) = (if ta { ld(k, m) } else { ld(m, k) }, if tb { ld(n, k) } else { ld(k, n) });
                    let (a, b) = (Mat { data: case.a.view(), ld: lda }, Mat { data: case.b.view(), ld: ldb });
                    let mut found = ctx.zeros(d, m * n);
                    let c = MatMut { data: found.view_mut(), ld: ld(m, n) };
                    gemm(&ctx, Gemm { m, n, k, a, ta, b, tb, c, accumulate: false });
                    assert_close(&format!("{m}, {n}, {k}, {ta}, {tb}"), &found, &case.expected(), op_tolerance(d));
                }
            }
        }
    }
}

/// Nor does it matter where there is no element: of sums of nothing C is zeros, or stays as it is.
#[test]
fn rows_without_elements_lie_any_distance_apart() {
    let ld = |rows: usize, cols: usize| if rows <= 1 || cols == 0 { usize::MAX } else { cols };
    for ctx in isas().into_iter().map(|isa| crate::testing::ctx_of(2, isa)) {
        let shapes = [(40, 70, 0), (1, 33, 0), (20, 1, 0), (600, 300, 0), (0, 5, 4), (5, 0, 4), (0, 0, 0), (0, 0, 3)];
        for ((m, n, k), (ta, tb)) in shapes.into_iter().flat_map(|shape| TRANSPOSES.map(|t| (shape, t))) {
            for (d, accumulate) in [(F32, false), (F32, true), (Bf16, false), (Bf16, true)] {
                let case = Case::new((m, n, k), (d, d), ta, tb);
                let (lda, ldb) = (if ta { ld(k, m) } else { ld(m, k) }, if tb { ld(n, k) } else { ld(k, n) });
                let (a, b) = (Mat { data: case.a.view(), ld: lda }, Mat { data: case.b.view(), ld: ldb });
                let mut found = buf(d, &vec![7.0; m * n]);
                let c = MatMut { data: found.view_mut(), ld: ld(m, n) };
                gemm(&ctx, Gemm { m, n, k, a, ta, b, tb, c, accumulate });
                let expected = buf(d, &vec![if accumulate { 7.0 } else { 0.0 }; m * n]);
                assert_same_bits(&format!("{m}, {n}, {k}, {ta}, {tb}"), &found, &expected);
            }
        }
    }
}
