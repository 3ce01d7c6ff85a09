mod case;
mod not_finite;

use super::{Shape, reference, scratch};
use crate::testing::{
    assert_close, assert_same_bits, buf, ctx, ctx_of, finite_difference, gpu, isas, levels, normals, older_gpu,
    op_tolerance, thread_counts,
};
use crate::{DType, Level};
use case::{Case, Results, even_shapes, f64s, kinds, rows, shape, shapes};
use hadal_numerics::Tolerance;
use std::panic::AssertUnwindSafe;

#[test]
fn reference_backward_is_the_derivative() {
    for sequences in [&[(3, 3), (2, 4)][..], &[(4, 2), (1, 1)]] {
        let s = Shape { k_pe_stride: 3, ..shape(2, 3, 2, 4) };
        let case = Case::new(DType::F32, s, sequences);
        let (x, dout) = (case.reference(), f64s(&case.dout));
        let loss =
            |x: &reference::Inputs| -> f64 { reference::forward(&s, x).0.iter().zip(&dout).map(|(o, g)| o * g).sum() };
        let g = reference::backward(&s, &x, &reference::forward(&s, &x).0, &dout);
        finite_difference("dq", &x.q, &g.dq, |q| loss(&reference::Inputs { q: q.to_vec(), ..x.clone() }));
        finite_difference("dkv_up", &x.kv_up, &g.dkv_up, |kv| {
            loss(&reference::Inputs { kv_up: kv.to_vec(), ..x.clone() })
        });
        // The gradient's rows are dense, the input's are not.
        let nk = x.k_pe.len() / 3;
        let strided: Vec<f64> = (0..nk).flat_map(|k| [g.dk_pe[2 * k], g.dk_pe[2 * k + 1], 0.0]).collect();
        finite_difference("dk_pe", &x.k_pe, &strided, |pe| loss(&reference::Inputs { k_pe: pe.to_vec(), ..x.clone() }));
    }
}

#[test]
fn agrees_with_the_reference() {
    for ctx in levels().into_iter().chain(older_gpu()) {
        let batches: [&[(usize, usize)]; 4] = [
            &[],
            &[(0, 0), (1, 1), (5, 5), (0, 3), (2, 0)],
            &[(63, 63), (64, 64), (65, 65)],
            &[(1, 130), (70, 129), (80, 70)],
        ];
        for dtype in [DType::F32, DType::Bf16] {
            for shape in shapes() {
                for batch in batches {
                    Case::new(dtype, shape, batch).check(&ctx);
                }
            }
            for shape in even_shapes() {
                Case::new(dtype, shape, &[(64, 64), (1, 1), (65, 65)]).check(&ctx);
                Case::new(dtype, shape, &[(70, 129), (80, 70), (1, 130)]).check(&ctx);
            }
            Case::new(dtype, shape(1, 8, 4, 8), &[(300, 300)]).check(&ctx);
        }
    }
}

/// Scores in the hundreds: exp of them overflows unless the maximum is taken off. Gradients are only asked to be
/// finite, since an f32 score of 500 leaves the probabilities themselves 3e-5 uncertain.
#[test]
fn large_scores_neither_overflow_nor_vanish() {
    for ctx in levels() {
        let mut case = Case::new(DType::F32, shape(2, 6, 2, 4), &[(100, 100)]);
        case.q = buf(DType::F32, &normals(1, case.q.len(), 100.0));
        let r = case.run(&ctx);
        let (out, lse) = reference::forward(&case.shape, &case.reference());
        assert!(lse.iter().any(|x| *x > 300.0), "the scores are not large");
        assert_close("lse", &r.lse, &lse, Tolerance::F32_OP);
        let worst = out.iter().zip(f64s(&r.out)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-3, "out is off by {worst}");
        for b in [&r.dq, &r.dkv_up] {
            let b = b.view().to_f32();
            assert!(b.iter().all(|x| x.is_finite()) && b.iter().any(|x| *x != 0.0));
        }
    }
}

/// Later keys are longer, so that scores rise far above those that sums were measured from before, for some queries and
/// not for others; what one query does must not change another's bits.
#[test]
fn scores_that_rise() {
    for ctx in levels() {
        let (n, s) = (260, shape(2, 12, 6, 10));
        let mut case = Case::new(DType::Bf16, s, &[(n, n)]);
        let mut kv_up = case.kv_up.view().to_f32();
        for (i, row) in kv_up.chunks_mut(s.nope + s.v).enumerate() {
            let longer = 1.0 + (i / s.heads) as f32 / 10.0;
            row[..s.nope].iter_mut().for_each(|x| *x *= longer);
        }
        case.kv_up = buf(DType::Bf16, &kv_up);
        let r = case.run(&ctx);
        let (out, lse) = reference::forward(&s, &case.reference());
        assert_close("out", &r.out, &out, op_tolerance(DType::Bf16));
        assert_close("lse", &r.lse, &lse, Tolerance::F32_OP);
        for (from, to) in [(0, 37), (37, 201), (201, n)] {
            let mut part = Case::new(DType::Bf16, s, &[(to - from, to)]);
            part.q = rows(&case.q, from, to - from, s.heads * (s.nope + s.rope));
            part.kv_up = rows(&case.kv_up, 0, to, s.heads * (s.nope + s.v));
            part.k_pe = rows(&case.k_pe, 0, to, s.k_pe_stride);
            let p = part.run(&ctx);
            assert_same_bits("out", &rows(&r.out, from, to - from, s.heads * s.v), &p.out);
            assert_same_bits("lse", &rows(&r.lse, from, to - from, s.heads), &p.lse);
        }
    }
}

#[test]
fn a_query_without_keys_gets_zeros() {
    for (ctx, dtype) in levels().into_iter().flat_map(|ctx| [DType::F32, DType::Bf16].map(|d| (ctx.clone(), d))) {
        let case = Case::new(dtype, shape(2, 4, 4, 6), &[(70, 3)]);
        let r = case.run(&ctx);
        let (out, lse, dq) = (r.out.view().to_f32(), r.lse.view().to_f32(), r.dq.view().to_f32());
        assert!(lse[..67 * 2].iter().all(|&x| x == f32::NEG_INFINITY));
        assert!(out[..67 * 2 * 6].iter().all(|&x| x == 0.0));
        assert!(dq[..67 * 2 * 8].iter().all(|&x| x == 0.0));
        assert!(lse[67 * 2..].iter().all(|x| x.is_finite()));
    }
}

#[test]
fn thread_count_changes_no_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new(dtype, shape(3, 12, 6, 10), &[(70, 70), (3, 90), (140, 140)]);
        for isa in isas() {
            let runs: Vec<Results> = thread_counts(isa).iter().map(|c| case.run(c)).collect();
            for r in &runs[1..] {
                for (name, a, b) in [
                    ("out", &runs[0].out, &r.out),
                    ("lse", &runs[0].lse, &r.lse),
                    ("dq", &runs[0].dq, &r.dq),
                    ("dkv_up", &runs[0].dkv_up, &r.dkv_up),
                    ("dk_pe", &runs[0].dk_pe, &r.dk_pe),
                ] {
                    assert_same_bits(name, a, b);
                }
            }
        }
    }
}

/// On a GPU blocks add to dq in turns. Over many tiles of queries and keys every run gives the same bits, the right ones.
#[test]
fn a_gpu_repeats_its_bits() {
    let Some(ctx) = gpu() else { return };
    for shape in even_shapes() {
        let case = Case::new(DType::Bf16, Shape { heads: 3, ..shape }, &[(700, 700), (300, 900), (1, 1), (450, 450)]);
        case.check(&ctx);
        let first = case.run(&ctx);
        for _ in 0..8 {
            let r = case.run(&ctx);
            for (name, a, b) in
                [("dq", &first.dq, &r.dq), ("dkv_up", &first.dkv_up, &r.dkv_up), ("dk_pe", &first.dk_pe, &r.dk_pe)]
            {
                assert_same_bits(name, a, b);
            }
        }
    }
}

#[test]
fn a_sequence_alone_equals_itself_among_others() {
    for ctx in levels() {
        for (dtype, s) in kinds() {
            let sequences = [(67, 67), (130, 130), (5, 100), (1, 1)];
            let all = Case::new(dtype, s, &sequences);
            let r = all.run(&ctx);
            let (mut q0, mut k0) = (0, 0);
            let (d, up) = (s.heads * (s.nope + s.rope), s.heads * (s.nope + s.v));
            for (nq, nk) in sequences {
                let mut one = Case::new(dtype, s, &[(nq, nk)]);
                one.q = rows(&all.q, q0, nq, d);
                one.kv_up = rows(&all.kv_up, k0, nk, up);
                one.k_pe = rows(&all.k_pe, k0, nk, s.k_pe_stride);
                one.dout = rows(&all.dout, q0, nq, s.heads * s.v);
                let alone = one.run(&ctx);
                assert_same_bits("out", &rows(&r.out, q0, nq, s.heads * s.v), &alone.out);
                assert_same_bits("lse", &rows(&r.lse, q0, nq, s.heads), &alone.lse);
                assert_same_bits("dq", &rows(&r.dq, q0, nq, d), &alone.dq);
                assert_same_bits("dkv_up", &rows(&r.dkv_up, k0, nk, up), &alone.dkv_up);
                assert_same_bits("dk_pe", &rows(&r.dk_pe, k0, nk, s.k_pe_stride), &alone.dk_pe);
                (q0, k0) = (q0 + nq, k0 + nk);
            }
        }
    }
}

/// A prompt prefilled in chunks gives each token the bits that the whole prompt gives it.
#[test]
fn chunks_equal_the_whole() {
    for (ctx, (dtype, s)) in levels().iter().flat_map(|ctx| kinds().into_iter().map(move |kind| (ctx, kind))) {
        let n = 150;
        let whole = Case::new(dtype, s, &[(n, n)]);
        let r = whole.run(ctx);
        for (from, to) in [(0, 37), (37, 101), (101, 102), (102, 150)] {
            let mut part = Case::new(dtype, s, &[(to - from, to)]);
            part.q = rows(&whole.q, from, to - from, s.heads * (s.nope + s.rope));
            part.kv_up = rows(&whole.kv_up, 0, to, s.heads * (s.nope + s.v));
            part.k_pe = rows(&whole.k_pe, 0, to, s.k_pe_stride);
            let p = part.run(ctx);
            assert_same_bits("out", &rows(&r.out, from, to - from, s.heads * s.v), &p.out);
            assert_same_bits("lse", &rows(&r.lse, from, to - from, s.heads), &p.lse);
        }
    }
}

#[test]
#[should_panic(expected = "kv_up of 4 keys x 2 heads x 16 + 16")]
fn a_wrong_size_is_named() {
    let mut case = Case::new(DType::F32, shape(2, 16, 8, 16), &[(4, 4)]);
    case.kv_up = buf(DType::F32, &[0.0; 7]);
    case.run(&ctx());
}

/// What a worker takes grows with the sequence as `scratch` says. One head of one sequence is computed by the caller.
#[test]
fn scratch_grows_with_the_sequence() {
    for isa in isas() {
        for dtype in [DType::F32, DType::Bf16] {
            let s = shape(1, 40, 20, 33);
            let ctx = ctx_of(1, isa);
            let taken = |n: usize| {
                scratch::TAKEN.set(0);
                Case::new(dtype, s, &[(n, n)]).run(&ctx);
                (scratch::TAKEN.get(), scratch(ctx.host().workers(), dtype, &s, 1, n))
            };
            let ((short, short_said), (long, long_said)) = (taken(64), taken(640));
            assert_eq!(long - short, long_said - short_said, "{:?} {dtype:?}", isa.level());
            assert!(long_said > 0 && long_said <= long);
        }
    }
    let workers = crate::Workers { level: Level::Amx, threads: 2 };
    let v3 = shape(128, 128, 64, 128);
    assert_eq!(
        scratch(workers, DType::Bf16, &v3, 1, 4096),
        2 * 128 * 72 * 1024,
        "tiles of 1 KiB for each of two workers"
    );
    assert_eq!(scratch(workers, DType::Bf16, &Shape { heads: 1, ..v3 }, 1, 4096), 128 * 72 * 1024, "one task");
}

#[test]
fn a_scale_that_is_not_above_zero_is_refused() {
    for scale in [0.0, -0.5, f32::NAN] {
        let case = Case::new(DType::Bf16, Shape { scale, ..shape(2, 16, 8, 16) }, &[(4, 4)]);
        let refused = std::panic::catch_unwind(AssertUnwindSafe(|| case.run(&ctx()))).err().expect("refused");
        let message = refused.downcast_ref::<String>().expect("a message");
        assert_eq!(message, &format!("attention with a scale of {scale}"));
    }
}
