use super::*;
use crate::testing::{assert_close, assert_same_bits, buf, buf_on, contexts, ctx, levels, normals, op_tolerance};
use crate::{Buf, DType, DType::Bf16, DType::F32};

const LENGTHS: [usize; 6] = [0, 1, 7, 1000, 16384, 40001];
const DTYPES: [DType; 2] = [F32, Bf16];

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

#[test]
fn matches_reference_in_every_dtype() {
    for ctx in levels() {
        for n in LENGTHS {
            for (da, db) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
                let (a, b) = (buf_on(&ctx, da, &normals(1, n, 1.0)), buf_on(&ctx, db, &normals(2, n, 1.0)));
                let expected = reference::add(&wide(&a), &wide(&b));
                for d in DTYPES {
                    let mut out = buf_on(&ctx, d, &vec![9.0; n]);
                    add(&ctx, a.view(), b.view(), out.view_mut());
                    assert_close("add", &out, &expected, op_tolerance(d));
                }
                let mut out = b.clone();
                accumulate(&ctx, a.view(), out.view_mut());
                assert_close("accumulate", &out, &expected, op_tolerance(db));
            }
        }
    }
}

/// One rounding of the f32 sum, not a sum of rounded terms: both give the same bits as add.
#[test]
fn accumulate_is_add_in_place() {
    for ctx in levels() {
        let (a, b) = (buf_on(&ctx, F32, &normals(1, 5000, 1.0)), buf_on(&ctx, Bf16, &normals(2, 5000, 1.0)));
        let mut sum = ctx.zeros(Bf16, 5000);
        add(&ctx, b.view(), a.view(), sum.view_mut());
        let mut out = b.clone();
        accumulate(&ctx, a.view(), out.view_mut());
        assert_same_bits("accumulate", &out, &sum);
    }
}

#[test]
fn convert_rounds_once_and_widens_exactly() {
    for ctx in levels() {
        for n in LENGTHS {
            let x = normals(3, n, 1.0);
            for (from, to) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
                let a = buf_on(&ctx, from, &x);
                let mut out = ctx.zeros(to, n);
                convert(&ctx, a.view(), out.view_mut());
                assert_same_bits("convert", &out, &buf(to, &a.view().to_f32()));
            }
        }
    }
}

/// Views that begin anywhere: what cannot be read 16 bytes at a time is read one by one, and nothing around it changes.
#[test]
fn parts_that_begin_anywhere() {
    for ctx in levels() {
        for (first, len) in [(1, 1000), (4, 999), (3, 5), (8, 16)] {
            let (a, b) = (buf_on(&ctx, Bf16, &normals(6, 1024, 1.0)), buf_on(&ctx, F32, &normals(7, 1024, 1.0)));
            let mut out = b.clone();
            let part = first..first + len;
            accumulate(&ctx, a.view().slice(part.clone()), out.view_mut().slice(part.clone()));
            let mut expected = wide(&b);
            let sum = reference::add(&wide(&a)[part.clone()], &expected[part.clone()]);
            expected[part].copy_from_slice(&sum);
            assert_close("part", &out, &expected, op_tolerance(F32));
        }
    }
}

#[test]
fn same_bits_for_every_thread_count() {
    let (a, b) = (buf(Bf16, &normals(1, 50000, 1.0)), buf(F32, &normals(2, 50000, 1.0)));
    let run = |ctx: &Ctx| {
        let mut out = ctx.zeros(F32, 50000);
        add(ctx, a.view(), b.view(), out.view_mut());
        out
    };
    let contexts = contexts();
    let first = run(&contexts[0]);
    for ctx in &contexts[1..] {
        assert_same_bits("threads", &first, &run(ctx));
    }
}

#[test]
#[should_panic(expected = "3 + 4 to 4")]
fn unequal_lengths_are_refused() {
    let ctx = ctx();
    let (a, b, mut out) = (ctx.zeros(F32, 3), ctx.zeros(F32, 4), ctx.zeros(F32, 4));
    add(&ctx, a.view(), b.view(), out.view_mut());
}

#[test]
fn blend_matches_reference_on_any_threads() {
    for n in LENGTHS {
        for (da, d) in [(F32, F32), (Bf16, F32), (F32, Bf16)] {
            let (a, before) = (buf(da, &normals(4, n, 1.0)), buf(d, &normals(5, n, 1.0)));
            let expected = reference::blend(f64::from(0.3f32), &wide(&a), &wide(&before));
            let mut results = Vec::new();
            for ctx in contexts().into_iter().chain(levels()) {
                let (a, mut out) = (ctx.upload(&a), ctx.upload(&before));
                blend(&ctx, 0.3, a.view(), out.view_mut());
                assert_close("blend", &out, &expected, op_tolerance(d));
                results.push(out);
            }
            results[1..3].iter().for_each(|r| assert_same_bits("blend", r, &results[0]));
        }
    }
}
