use super::{Backward, Inputs, Outputs, backward, cpu::SLICE, forward, reference};
use crate::testing::{
    assert_close, assert_same_bits, buf, ctx, finite_difference, isas, levels, normals, op_tolerance, thread_counts,
};
use crate::{Buf, Ctx, DType, Weight};
use hadal_numerics::{Purpose, Rng, Tolerance};

/// One set of inputs and output gradients.
struct Case {
    n: usize,
    d: usize,
    v: usize,
    g: usize,
    temperature: f32,
    hidden: Buf,
    weight: Buf,
    targets: Buf,
    given: Buf,
    d_logp: Buf,
    d_entropy: Buf,
    d_given: Buf,
}

impl Case {
    fn new(dtype: DType, [n, d, v, g]: [usize; 4], temperature: f32) -> Self {
        let ids = Rng::new(1, Purpose::Test, 90);
        let id = |i: usize| ids.below(i as u64, v as u64) as i32;
        // One row in four has no target.
        let targets: Vec<i32> = (0..n).map(|r| if r % 4 == 2 { -1 } else { id(r) }).collect();
        let given: Vec<i32> = (0..n * g).map(|i| id(1000 + i)).collect();
        let f32s = |stream, len| buf(DType::F32, &normals(stream, len, 1.0));
        Self {
            n,
            d,
            v,
            g,
            temperature,
            hidden: buf(dtype, &normals(10, n * d, 1.0)),
            weight: buf(dtype, &normals(11, v * d, 2.0 / (d as f32).sqrt())),
            targets: ctx().from_i32(&targets),
            given: ctx().from_i32(&given),
            d_logp: f32s(12, n),
            d_entropy: f32s(13, n),
            d_given: f32s(14, n * g),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            hidden: self.hidden.view(),
            weight: Weight::new(self.weight.view(), self.v, self.d),
            targets: self.targets.view(),
            temperature: self.temperature,
            given: (self.g > 0).then(|| self.given.view()),
        }
    }

    /// lse, logp, entropy, given_logp, top ids, top logp.
    fn forward(&self, ctx: &Ctx, k: usize) -> [Buf; 6] {
        let f = |len| ctx.zeros(DType::F32, len);
        let n = self.n;
        let mut out = [f(n), f(n), f(n), f(n * self.g), ctx.zeros(DType::I32, n * k), f(n * k)];
        let [lse, logp, entropy, given, ids, top] = &mut out;
        let given_logp = (self.g > 0).then(|| given.view_mut());
        let top = (k > 0).then(|| (ids.view_mut(), top.view_mut()));
        let (lse, logp, entropy) = (lse.view_mut(), logp.view_mut(), entropy.view_mut());
        forward(ctx, self.inputs(), Outputs { lse, logp, entropy, given_logp, top });
        out
    }

    /// d_hidden (of `dtype`) and d_weight, added to `before`.
    fn backward(&self, ctx: &Ctx, dtype: DType, before: &Buf, want: [bool; 2]) -> [Buf; 2] {
        let [lse, _, entropy, ..] = self.forward(ctx, 0);
        let mut dh = buf(dtype, &vec![7.0; self.n * self.d]);
        let mut dw = before.clone();
        let b = Backward {
            lse: lse.view(),
            entropy: entropy.view(),
            d_logp: self.d_logp.view(),
            d_entropy: Some(self.d_entropy.view()),
            d_given: (self.g > 0).then(|| self.d_given.view()),
            d_hidden: want[0].then(|| dh.view_mut()),
            d_weight: want[1].then(|| dw.view_mut()),
        };
        backward(ctx, self.inputs(), b);
        [dh, dw]
    }

    /// Row `r` alone.
    fn row(&self, r: usize) -> Self {
        let f = |b: &Buf, w: usize| buf(b.dtype(), &b.view().slice(r * w..(r + 1) * w).to_f32());
        let i = |b: &Buf, w: usize| ctx().from_i32(b.view().slice(r * w..(r + 1) * w).i32());
        Self {
            n: 1,
            hidden: f(&self.hidden, self.d),
            weight: self.weight.clone(),
            targets: i(&self.targets, 1),
            given: i(&self.given, self.g),
            d_logp: f(&self.d_logp, 1),
            d_entropy: f(&self.d_entropy, 1),
            d_given: f(&self.d_given, self.g),
            ..*self
        }
    }
}

fn widen(b: &Buf) -> Vec<f64> {
    b.view().to_f32().iter().map(|&x| f64::from(x)).collect()
}

/// N, D, V, G: one id, one id each side of a slice, ragged, more rows than a task, several slices.
const SHAPES: [[usize; 4]; 8] = [
    [1, 1, 1, 1],
    [3, 8, SLICE - 1, 2],
    [5, 16, SLICE, 0],
    [17, 24, SLICE + 1, 3],
    [33, 40, 2 * SLICE + 77, 1],
    [16, 7, 13, 5],
    [1, 64, 3 * SLICE, 4],
    [0, 8, 20, 2],
];

fn each_case(mut f: impl FnMut(DType, Case)) {
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for dtype in [DType::F32, DType::Bf16] {
            f(dtype, Case::new(dtype, shape, [1.0, 0.7, 2.5][i % 3]));
        }
    }
}

#[test]
fn reference_gradients_agree_with_finite_differences() {
    for temperature in [1.0, 0.6] {
        let c = Case::new(DType::F32, [6, 3, 9, 2], temperature);
        let (hidden, weight) = (widen(&c.hidden), widen(&c.weight));
        let (d_logp, d_entropy, d_given) = (widen(&c.d_logp), widen(&c.d_entropy), widen(&c.d_given));
        let (targets, given) = (c.targets.view().i32(), c.given.view().i32());
        let at = reference::Inputs {
            hidden: &hidden,
            weight: &weight,
            d: c.d,
            targets,
            temperature: f64::from(temperature),
            given,
        };
        let loss = |hidden: &[f64], weight: &[f64]| {
            let o = reference::forward(&reference::Inputs { hidden, weight, ..at });
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&o.logp, &d_logp) + dot(&o.entropy, &d_entropy) + dot(&o.given_logp, &d_given)
        };
        let (dh, dw) = reference::backward(&at, &d_logp, &d_entropy, &d_given);
        finite_difference("d_hidden", &hidden, &dh, |h| loss(h, &weight));
        finite_difference("d_weight", &weight, &dw, |w| loss(&hidden, w));
    }
}

#[test]
fn agrees_with_the_reference() {
    for ctx in levels() {
        let tol = Tolerance::F32_OP;
        each_case(|dtype, c| {
            let (hidden, weight) = (widen(&c.hidden), widen(&c.weight));
            let temperature = f64::from(c.temperature);
            let (targets, given) = (c.targets.view().i32(), c.given.view().i32());
            let x = reference::Inputs { hidden: &hidden, weight: &weight, d: c.d, targets, temperature, given };
            let want = reference::forward(&x);
            let k = c.v.min(6);
            let [lse, logp, entropy, given_logp, top_ids, top_logp] = c.forward(&ctx, k);
            assert_close("lse", &lse, &want.lse, tol);
            assert_close("logp", &logp, &want.logp, tol);
            assert_close("entropy", &entropy, &want.entropy, tol);
            assert_close("given_logp", &given_logp, &want.given_logp, tol);
            let ids: Vec<i32> = want.ranked.iter().flat_map(|(ids, _)| ids[..k].to_vec()).collect();
            assert_eq!(top_ids.view().i32(), ids);
            let top: Vec<f64> = want.ranked.iter().flat_map(|(_, logp)| logp[..k].to_vec()).collect();
            assert_close("top_logp", &top_logp, &top, tol);

            let before = buf(DType::F32, &normals(20, c.v * c.d, 1.0));
            let (d_logp, d_entropy, d_given) = (widen(&c.d_logp), widen(&c.d_entropy), widen(&c.d_given));
            let (want_dh, mut want_dw) = reference::backward(&x, &d_logp, &d_entropy, &d_given);
            want_dw.iter_mut().zip(widen(&before)).for_each(|(w, b)| *w += b);
            let [dh, dw] = c.backward(&ctx, dtype, &before, [true, true]);
            assert_close("d_hidden", &dh, &want_dh, op_tolerance(dtype));
            // In bf16 the gradients of the logits are rounded before their products.
            assert_close("d_weight", &dw, &want_dw, op_tolerance(dtype));
        });
    }
}

#[test]
fn same_bits_on_any_number_of_threads_and_whichever_gradient_is_asked_for() {
    each_case(|dtype, c| {
        let before = buf(DType::F32, &normals(20, c.v * c.d, 1.0));
        for contexts in isas().into_iter().map(thread_counts) {
            let outputs = c.forward(&contexts[0], c.v.min(3));
            let [dh, dw] = c.backward(&contexts[0], dtype, &before, [true, true]);
            for ctx in &contexts {
                let found = c.forward(ctx, c.v.min(3));
                assert_eq!(found[4].view().i32(), outputs[4].view().i32());
                for i in [0, 1, 2, 3, 5] {
                    assert_same_bits("forward", &found[i], &outputs[i]);
                }
                assert_same_bits("d_hidden alone", &c.backward(ctx, dtype, &before, [true, false])[0], &dh);
                assert_same_bits("d_weight alone", &c.backward(ctx, dtype, &before, [false, true])[1], &dw);
            }
        }
    });
}

/// What a row gives alone is what it gives among others.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    for ctx in levels() {
        each_case(|dtype, c| {
            let outputs = c.forward(&ctx, c.v.min(3));
            let before = buf(DType::F32, &vec![0.0; c.v * c.d]);
            let [dh, _] = c.backward(&ctx, dtype, &before, [true, false]);
            for r in (0..c.n).step_by(4).chain(c.n.checked_sub(1)) {
                let alone = c.row(r);
                for (all, one) in outputs.iter().zip(&alone.forward(&ctx, c.v.min(3))) {
                    let w = one.len();
                    if one.dtype() == DType::I32 {
                        assert_eq!(all.view().slice(r * w..(r + 1) * w).i32(), one.view().i32());
                    } else {
                        let part = buf(DType::F32, &all.view().slice(r * w..(r + 1) * w).to_f32());
                        assert_same_bits("forward", &part, one);
                    }
                }
                let part = buf(dtype, &dh.view().slice(r * c.d..(r + 1) * c.d).to_f32());
                assert_same_bits("d_hidden", &part, &alone.backward(&ctx, dtype, &before, [true, false])[0]);
            }
        });
    }
}

/// All ids equal, K past a slice: the lowest ids in order; and a larger one that comes late goes first.
#[test]
fn top_ties_go_to_the_lowest_id() {
    let (v, k) = (2 * SLICE, SLICE + 5);
    let mut c = Case::new(DType::F32, [2, 1, v, 0], 1.0);
    let mut weight = vec![0.5; v];
    (weight[v - 3], weight[v - 1]) = (1.0, 1.0);
    c.weight = buf(DType::F32, &weight);
    c.hidden = buf(DType::F32, &[1.0, 0.0]);
    let [.., ids, _] = c.forward(&ctx(), k);
    let ids = ids.view().i32();
    let first: Vec<i32> = [v as i32 - 3, v as i32 - 1].into_iter().chain(0..k as i32 - 2).collect();
    assert_eq!(&ids[..k], first);
    assert_eq!(&ids[k..], (0..k as i32).collect::<Vec<_>>());
}

/// Logits far apart: no overflow on the way, whichever slice holds the largest.
#[test]
fn large_logits_stay_finite() {
    for largest in [0, SLICE - 1, SLICE + 3] {
        let v = SLICE + 4;
        let mut c = Case::new(DType::F32, [1, 1, v, 0], 0.5);
        let mut weight = vec![-1e4; v];
        weight[largest] = 1e4;
        c.weight = buf(DType::F32, &weight);
        c.hidden = buf(DType::F32, &[1.0]);
        c.targets = ctx().from_i32(&[1]);
        let [lse, logp, entropy, ..] = c.forward(&ctx(), 0);
        assert_eq!(lse.view().f32(), [2e4]);
        assert_eq!(logp.view().f32(), [if largest == 1 { 0.0 } else { -4e4 }]);
        assert_eq!(entropy.view().f32(), [0.0]);
    }
}

/// A NaN in one row shows in that row and in no other; a row without gradients takes none from it.
#[test]
fn a_row_that_is_not_finite_stays_alone() {
    let mut c = Case::new(DType::F32, [4, 8, SLICE + 9, 2], 1.0);
    let clean = c.forward(&ctx(), 2);
    let mut hidden = c.hidden.view().to_f32();
    hidden[2 * 8] = f32::NAN;
    c.hidden = buf(DType::F32, &hidden);
    let found = c.forward(&ctx(), 2);
    for (name, i) in [("lse", 0), ("entropy", 2)] {
        for r in 0..4 {
            let (a, b) = (found[i].view().f32()[r], clean[i].view().f32()[r]);
            assert!(if r == 2 { a.is_nan() } else { a.to_bits() == b.to_bits() }, "{name}[{r}]: {a}, clean {b}");
        }
    }
    let zero_row_2 = |b: &Buf, w: usize| {
        let mut x = b.view().to_f32();
        x[2 * w..3 * w].fill(0.0);
        buf(DType::F32, &x)
    };
    c.d_entropy = zero_row_2(&c.d_entropy, 1);
    c.d_given = zero_row_2(&c.d_given, 2);
    let before = buf(DType::F32, &vec![0.0; c.v * c.d]);
    let [dh, _] = c.backward(&ctx(), DType::F32, &before, [true, false]);
    assert!(dh.view().f32().iter().all(|x| x.is_finite()));
    assert!(dh.view().f32()[16..24].iter().all(|&x| x == 0.0));
}

/// The size of a small model's training step: entropy at initialisation is near that of V equal choices.
#[test]
fn a_training_step_of_a_small_model() {
    let (n, d, v) = (2048, 256, 4096);
    let mut c = Case::new(DType::Bf16, [n, d, v, 0], 1.0);
    c.weight = buf(DType::Bf16, &normals(11, v * d, 0.006));
    let [_, logp, entropy, ..] = c.forward(&ctx(), 0);
    let uniform = (v as f32).ln();
    assert!(entropy.view().f32().iter().all(|h| (h - uniform).abs() < 0.02));
    assert!(logp.view().f32().iter().all(|l| *l == 0.0 || (l + uniform).abs() < 1.0));
    // Gradients of logp over all ids add up to zero in each column of the weight's, but for their rounding to bf16: those
    // of a token, of which the sizes add up to twice that of d_logp, change by 2^-9 of themselves at most.
    c.d_entropy = buf(DType::F32, &vec![0.0; n]);
    let [_, dw] = c.backward(&ctx(), DType::Bf16, &buf(DType::F32, &vec![0.0; v * d]), [true, true]);
    let (dw, hidden, d_logp) = (dw.view().f32(), widen(&c.hidden), widen(&c.d_logp));
    for i in 0..d {
        let sum: f64 = (0..v).map(|j| f64::from(dw[j * d + i])).sum();
        let size: f64 = (0..n).map(|r| (d_logp[r] * hidden[r * d + i]).abs()).sum();
        assert!(sum.abs() < 2.0 / 512.0 * size, "column {i}: {sum:e} of {size:e}");
    }
}

#[test]
#[should_panic(expected = "target [1] is 20, expected -1..20")]
fn a_target_out_of_range_is_named() {
    let mut c = Case::new(DType::F32, [2, 8, 20, 0], 1.0);
    c.targets = ctx().from_i32(&[-1, 20]);
    c.forward(&ctx(), 0);
}
