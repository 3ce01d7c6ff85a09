use super::*;
use crate::ops::gemm::{Gemm, Mat, MatMut, gemm};
use crate::testing::{buf, ctx_of, isas, normals, thread_counts};
use crate::{Buf, Ctx, DType::Bf16, DType::F32};

/// Rows that the large products' kernels are asked for.
const MANY: usize = 40;

/// Strided operands whose gaps hold NaN, so small here and there that products are lost below the least number.
struct Case {
    n: usize,
    k: usize,
    x: Buf,
    w: Buf,
    old: Buf,
}

impl Case {
    fn new((n, k): (usize, usize), [x, w, c]: [DType; 3]) -> Self {
        let operand = |stream, dtype, rows: usize| {
            let mut v = normals(stream, rows * (k + 3), 1.0);
            v.iter_mut().step_by(7).for_each(|v| *v *= 1e-30);
            v.iter_mut().step_by(5).for_each(|v| *v *= 0.0);
            v.chunks_exact_mut(k + 3).for_each(|row| row[k..].fill(f32::NAN));
            buf(dtype, &v)
        };
        let old = buf(c, &normals(3, MANY * (n + 2), 1.0));
        Self { n, k, x: operand(1, x, MANY), w: operand(2, w, n), old }
    }

    /// C of `m` rows from `first`, with the gaps between its rows.
    fn run(&self, ctx: &Ctx, first: usize, m: usize, accumulate: bool) -> Vec<u32> {
        let (n, k, ld) = (self.n, self.k, self.n + 2);
        let rows = first * ld..(first + m) * ld;
        let mut c = buf(self.old.dtype(), &self.old.view().to_f32()[rows]);
        let a = Mat { data: self.x.view().slice(first * (k + 3)..MANY * (k + 3)), ld: k + 3 };
        let b = Mat { data: self.w.view(), ld: k + 3 };
        gemm(ctx, Gemm { m, n, k, a, ta: false, b, tb: true, c: MatMut { data: c.view_mut(), ld }, accumulate });
        c.view().to_f32().into_iter().map(f32::to_bits).collect()
    }
}

/// Every number of rows has the bits of the same rows among many, for all types, on all levels: less than a unit of
/// k, several spans, and columns that end within a group.
#[test]
fn few_rows_have_the_bits_of_many() {
    let shapes =
        [(16, 1), (17, 8), (31, 15), (33, 16), (16, 17), (160, 31), (49, 33), (40, 127), (23, 1021), (19, 4403)];
    for isa in isas() {
        let ctx = ctx_of(2, isa);
        for (i, shape) in shapes.into_iter().enumerate() {
            for types in [[F32, F32, F32], [Bf16, Bf16, Bf16], [Bf16, Bf16, F32], [Bf16, F32, F32], [F32, Bf16, Bf16]] {
                let (case, accumulate) = (Case::new(shape, types), i % 2 == 1);
                let all = case.run(&ctx, 0, MANY, accumulate);
                for m in 1..=ROWS + 1 {
                    let first = m * 5 % (MANY - m);
                    let ld = case.n + 2;
                    let same = case.run(&ctx, first, m, accumulate) == all[first * ld..(first + m) * ld];
                    assert!(same, "{isa:?}, {m} rows from {first}, n and k {shape:?}, {types:?}");
                }
            }
        }
    }
}

/// Also where columns are cut into tasks.
#[test]
fn few_rows_have_the_same_bits_for_every_thread_count() {
    for isa in isas() {
        let case = Case::new((1000, 700), [Bf16; 3]);
        let contexts = thread_counts(isa);
        for m in [1, 7, 16] {
            let found: Vec<_> = contexts.iter().map(|ctx| case.run(ctx, 0, m, false)).collect();
            assert!(found.iter().all(|f| *f == found[0]), "{isa:?}, {m} rows");
        }
    }
}

/// Tasks partition the columns of the products with few rows, and begin with whole groups.
#[test]
fn tasks_partition_the_columns() {
    let data = crate::View::Bf16(&[]);
    let none = panel::Operand::new(data, 0, true);
    for threads in [1, 2, 5, 64] {
        let product = |(m, n, k)| Product { m, n, k, a: none, b: none, c: 0, ldc: n };
        let products =
            [(1, 2050, 2048), (17, 64, 64), (3, 15, 64), (0, 64, 64), (16, 160, 512), (2, 99, 7)].map(product);
        let tasks = tasks(threads, || products.iter().filter(|p| takes(Level::Avx2, p)), GROUP);
        for (p, product) in products.iter().enumerate() {
            let mut of: Vec<_> = tasks.iter().filter(|t| std::ptr::eq(t.p, product)).map(|t| t.cols.clone()).collect();
            let found = if cfg!(target_arch = "x86_64") && [0, 4, 5].contains(&p) { product.n } else { 0 };
            assert_eq!(of.iter().map(Range::len).sum::<usize>(), found, "{p}, {threads} threads");
            of.sort_by_key(|cols| cols.start);
            assert!(of.windows(2).all(|w| w[0].end == w[1].start));
            assert!(of.iter().all(|cols| cols.start.is_multiple_of(GROUP)));
        }
    }
}
