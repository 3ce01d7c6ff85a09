//! Every operation on small ragged shapes, forward and backward, in FP32 and BF16, on a GPU alone: what the sanitizer's
//! memcheck and racecheck run, which make a kernel a hundred times slower. Outputs must be finite (with debug
//! assertions scratch and outputs begin as NaN) and the same bits twice; whether they are right, the operations' own
//! tests say. The same cases on devices that are not there tell which kernels there are to compile: `compiled.rs`.

mod products;
mod rows;

use crate::testing::{buf_on, invariant_gpu, normals, older_gpu};
use crate::{Buf, Ctx, DType};

/// Runs an operation; what it wrote.
pub(super) type Case = fn(&Ctx, DType) -> Vec<Buf>;

/// A list of cases by name, and a test for each.
macro_rules! cases {
    ($list:ident: $($module:ident { $($name:ident),* $(,)? })*) => {
        /// All of them.
        pub(super) const $list: &[Case] = &[$($($module::$name),*),*];

        $($(
            #[test]
            fn $name() {
                check(stringify!($name), $module::$name);
            }
        )*)*
    };
}

cases!(CASES:
    rows {
        adamw, add, bias_update, embedding, expert_load, grad_norm, kv_store, moe_permute, rmsnorm, rope, router, rows,
        sample, seq_balance, swiglu,
    }
    products { gemm, gemm_grouped, head_loss, mla_decode, mla_prefill }
);

/// On the GPU's own kernels and on those of older ones.
fn check(name: &str, case: Case) {
    for ctx in [invariant_gpu(), older_gpu()].into_iter().flatten() {
        for dtype in [DType::F32, DType::Bf16] {
            let [a, b] = [0, 1].map(|_| case(&ctx, dtype));
            assert_eq!(a.len(), b.len());
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                if a.dtype() == DType::I32 {
                    assert_eq!(a.view().to_i32(), b.view().to_i32(), "{name} {dtype:?}, output {i}");
                    continue;
                }
                let (a, b) = (a.view().to_f32(), b.view().to_f32());
                let broken = a.iter().position(|x| !x.is_finite());
                assert!(broken.is_none(), "{name} {dtype:?}, output {i}: [{broken:?}] of {} is not finite", a.len());
                let differs = a.iter().zip(&b).position(|(x, y)| x.to_bits() != y.to_bits());
                assert!(differs.is_none(), "{name} {dtype:?}, output {i}: [{differs:?}] differs from run to run");
            }
        }
    }
}

/// `n` normals.
fn numbers(ctx: &Ctx, dtype: DType, stream: u64, n: usize) -> Buf {
    buf_on(ctx, dtype, &normals(stream, n, 1.0))
}

/// As [`numbers`], in f32.
fn floats(ctx: &Ctx, stream: u64, n: usize) -> Buf {
    numbers(ctx, DType::F32, stream, n)
}

/// `n` integers below `below`, without a pattern.
fn integers(ctx: &Ctx, n: usize, below: usize) -> Buf {
    ctx.from_i32(&(0..n).map(|i| ((i * i + 7 * i + i / 3) % below) as i32).collect::<Vec<_>>())
}

/// Where the prefixes of these lengths end.
fn cumulative(ctx: &Ctx, lengths: &[i32]) -> Buf {
    let ends = lengths.iter().scan(0, |at, n| {
        *at += n;
        Some(*at)
    });
    ctx.from_i32(&std::iter::once(0).chain(ends).collect::<Vec<_>>())
}
