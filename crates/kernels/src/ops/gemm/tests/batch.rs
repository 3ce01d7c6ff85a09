//! Batch invariance: what a row is does not depend on the rows beside it.

use super::*;

/// Every row alone, and in batches of 2 to 130 rows that begin anywhere, has the bits it has among all.
#[test]
fn a_row_does_not_depend_on_the_batch() {
    rows_alone_and_in_company(&ctx(), 1..=M);
    for ctx in invariant_paths() {
        rows_alone_and_in_company(&ctx, (1..=17).chain([31, 33, 48, 64, 100, M - 1, M]));
    }
}

const M: usize = 130;

fn rows_alone_and_in_company(ctx: &Ctx, counts: impl Iterator<Item = usize> + Clone) {
    let columns_and_depths = [
        (1, 1),
        (1, 300),
        (3, 2),
        (5, 3),
        (16, 16),
        (15, 257),
        (17, 40),
        (64, 256),
        (65, 258),
        (100, 513),
        (300, 77),
        (70, 2080),
    ];
    for (n, k) in columns_and_depths {
        for d in [F32, Bf16] {
            for tb in [false, true] {
                // Negative zeros and exact zeros too: a sum's sign of zero is part of its bits.
                let mut x = normals(5, M * k, 1.0);
                x.iter_mut().step_by(3).for_each(|x| *x *= 0.0);
                let b = buf_on(ctx, d, &normals(6, k * n, 1.0));
                let a = buf_on(ctx, d, &x);
                let rows = |first: usize, m: usize| {
                    let mut c = ctx.zeros(F32, m * n);
                    let g = Gemm {
                        m,
                        n,
                        k,
                        a: Mat { data: a.view().slice(first * k..(first + m) * k), ld: k },
                        ta: false,
                        b: Mat { data: b.view(), ld: if tb { k } else { n } },
                        tb,
                        c: MatMut { data: c.view_mut(), ld: n },
                        accumulate: false,
                    };
                    gemm(ctx, g);
                    c.view().to_f32()
                };
                let all = rows(0, M);
                for m in counts.clone() {
                    let firsts = if m == 1 { (0..M).collect() } else { vec![(m * 37) % (M - m + 1)] };
                    for first in firsts {
                        let part = rows(first, m);
                        let same = part.iter().zip(&all[first * n..][..m * n]).all(|(x, y)| x.to_bits() == y.to_bits());
                        assert!(same, "{m} rows from {first}, n {n}, k {k}, {d:?}, tb {tb}");
                    }
                }
            }
        }
    }
}

/// Also where the batch is large enough for the largest tiles, which the microkernels block otherwise.
#[test]
fn a_row_of_a_large_batch_has_the_bits_it_has_alone() {
    for ctx in [Some(ctx()), invariant_gpu(), older_gpu()].into_iter().flatten() {
        large_batches(&ctx);
    }
}

fn large_batches(ctx: &Ctx) {
    let ours = [(2048, 512, 300, F32), (2048, 512, 300, Bf16), (1200, 700, 601, F32), (1500, 1400, 256, Bf16)];
    for (m, n, k, d) in ours {
        for tb in [false, true] {
            let all = Case::new((m, n, k), (d, d), false, tb);
            let mut c = ctx.zeros(F32, m * n);
            all.run(ctx, &mut c, false);
            let c = c.view().to_f32();
            let few = [(0, 1), (m - 1, 1), (m / 2, 7), (m / 3, 12), (239, 40), (200, 100)];
            for (first, rows) in few {
                let x = &all.a.view().to_f32()[first * k..(first + rows) * k];
                let part = Case { m: rows, n, k, a: buf(d, x), b: all.b.clone(), ta: false, tb };
                let mut found = ctx.zeros(F32, rows * n);
                part.run(ctx, &mut found, false);
                let expected = buf(F32, &c[first * n..(first + rows) * n]);
                assert_same_bits(&format!("{rows} rows from {first} of {m}, {n}, {k}, tb {tb}"), &found, &expected);
            }
        }
    }
}
