use super::*;
use crate::testing::{assert_close, assert_same_bits, contexts, ctx, gpu, levels, normals};
use crate::{Buf, DType, Elem, bf16};
use hadal_numerics::{Tolerance, close};

/// One arena with everything that a step reads and writes.
#[derive(Clone)]
struct Arena {
    master: Buf,
    m: Buf,
    v: Buf,
    compute: Buf,
}

impl Arena {
    fn new(ctx: &Ctx, w: &[f32]) -> Self {
        let zeros = |dtype| ctx.zeros(dtype, w.len());
        Self { master: ctx.from_f32(w), m: zeros(DType::F32), v: zeros(DType::F32), compute: zeros(DType::Bf16) }
    }

    /// One step with the hyperparameters of V3 (report 4.2) at a test's learning rate.
    fn step(&mut self, ctx: &Ctx, grad: &[f32], norm: f32, clip: f32, t: u64, segments: &[Segment], copy: bool) {
        step(
            ctx,
            AdamW {
                master: self.master.view_mut(),
                grad: ctx.from_f32(grad).view(),
                m: self.m.view_mut(),
                v: self.v.view_mut(),
                compute: copy.then(|| self.compute.view_mut()),
                segments,
                norm: ctx.from_f32(&[norm]).view(),
                clip,
                schedule: ctx.from_f32(&schedule(0.01, 0.9, 0.95, 0.1, t)).view(),
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
            },
        );
    }

    fn assert_same(&self, other: &Self) {
        assert_same_bits("master", &self.master, &other.master);
        assert_same_bits("m", &self.m, &other.m);
        assert_same_bits("v", &self.v, &other.v);
        assert_same_bits("compute", &self.compute, &other.compute);
    }
}

fn all(n: usize) -> Vec<Segment> {
    vec![Segment { range: 0..n, decay: true }]
}

/// Ragged, empty, one element, one past a block; not in order; gaps between.
fn ragged() -> (usize, Vec<Segment>) {
    let s = |range, decay| Segment { range, decay };
    (
        60_000,
        vec![s(40_000..59_990, true), s(3..4, false), s(7..7, true), s(10..16_395, true), s(16_395..33_000, false)],
    )
}

#[test]
fn ten_steps_match_the_reference() {
    for ctx in levels() {
        let (n, segments) = ragged();
        let w = normals(1, n, 0.5);
        let mut arena = Arena::new(&ctx, &w);
        let mut expected: Vec<[f64; 3]> = w.iter().map(|&w| [w.into(), 0.0, 0.0]).collect();
        for t in 1..=10 {
            let grad = normals(1 + t, n, 0.1);
            // Above and below the clip.
            let norm = if t % 2 == 0 { 3.7 } else { 0.2 };
            arena.step(&ctx, &grad, norm, 1.0, t, &segments, true);
            let s = reference::Step {
                norm: f64::from(norm),
                clip: 1.0,
                lr: f64::from(0.01f32),
                beta1: f64::from(0.9f32),
                beta2: f64::from(0.95f32),
                eps: f64::from(1e-8f32),
                weight_decay: f64::from(0.1f32),
                t: t as i32,
            };
            for segment in &segments {
                for i in segment.range.clone() {
                    let [w, m, v] = &mut expected[i];
                    reference::update(&s, segment.decay, w, grad[i].into(), m, v);
                }
            }
        }
        for (k, (name, found)) in [("w", &arena.master), ("m", &arena.m), ("v", &arena.v)].into_iter().enumerate() {
            let expected: Vec<f64> = expected.iter().map(|e| e[k]).collect();
            assert_close(name, found, &expected, Tolerance::F32_OP);
        }
        let inside: Vec<bool> = (0..n).map(|i| segments.iter().any(|s| s.range.contains(&i))).collect();
        let (master, compute) = (arena.master.view().to_f32(), arena.compute.view().to_f32());
        for i in 0..n {
            let (found, copy) = (master[i], compute[i]);
            if inside[i] {
                assert_eq!(copy.to_bits(), Elem::f32(<bf16 as Elem>::round(found)).to_bits(), "copy of {i}");
            } else {
                assert_eq!((found.to_bits(), copy.to_bits()), (w[i].to_bits(), 0), "{i} is in no segment");
            }
        }
    }
}

/// Three steps of `torch.optim.AdamW` (2.x, betas 0.9 and 0.95, eps 1e-8, decay 0.1, lr 0.01) after
/// `clip_grad_norm_(1.0)`.
#[test]
fn three_steps_match_pytorch() {
    for ctx in levels() {
        let mut arena = Arena::new(&ctx, &[0.5, -1.25, 2.0, 0.003, -0.75]);
        let steps: [([f32; 5], f32, [f32; 5]); 3] = [
            ([0.3, -2.0, 1e-3, 0.7, 0.0], 2.140_093_6, [0.4895, -1.238_75, 1.988_000_3, -0.007_002_999, -0.749_25]),
            (
                [-1.5, 0.25, 4.0, -0.02, 1e-8],
                4.279_357_4,
                [0.493_393_57, -1.231_209_2, 1.978_659_4, -0.013_674_012, -0.749_554_34],
            ),
            (
                [0.6, 0.6, -3.0, 2.5, -0.9],
                4.096_339_7,
                [0.493_775_4, -1.226_121_4, 1.976_098_2, -0.021_586_688, -0.742_572_6],
            ),
        ];
        for (t, (grad, norm, expected)) in steps.iter().enumerate() {
            arena.step(&ctx, grad, *norm, 1.0, t as u64 + 1, &all(5), false);
            close("w", &arena.master.view().to_f32(), expected, Tolerance { element: 1e-6, cosine: 1e-9 }).unwrap();
        }
    }
}

#[test]
fn same_bits_on_every_device_and_for_any_cut_of_a_segment() {
    let n = 50_000;
    let (w, grad) = (normals(1, n, 1.0), normals(2, n, 0.3));
    let run = |ctx: &Ctx, segments: &[Segment]| {
        let mut arena = Arena::new(ctx, &w);
        for t in 1..=3 {
            arena.step(ctx, &grad, 2.0, 1.0, t, segments, true);
        }
        arena
    };
    let whole = run(&ctx(), &all(n));
    for c in contexts().into_iter().chain(gpu()) {
        whole.assert_same(&run(&c, &all(n)));
    }
    for c in [ctx()].into_iter().chain(gpu()) {
        for cut in [1, 4_095, 8_192, 16_384, 33_333, n - 1] {
            let parts = [Segment { range: 0..cut, decay: true }, Segment { range: cut..n, decay: true }];
            whole.assert_same(&run(&c, &parts));
        }
    }
}

#[test]
fn the_copy_changes_nothing_else() {
    let (n, segments) = ragged();
    let (w, grad) = (normals(1, n, 1.0), normals(2, n, 0.3));
    for ctx in levels() {
        let (mut with, mut without) = (Arena::new(&ctx, &w), Arena::new(&ctx, &w));
        with.step(&ctx, &grad, 2.0, 1.0, 1, &segments, true);
        without.step(&ctx, &grad, 2.0, 1.0, 1, &segments, false);
        without.compute = with.compute.clone();
        with.assert_same(&without);
    }
}

#[test]
fn clipping() {
    for ctx in levels() {
        let m_after = |norm, clip| {
            let mut arena = Arena::new(&ctx, &[1.0]);
            arena.step(&ctx, &[2.0], norm, clip, 1, &all(1), false);
            arena.m.view().to_f32()[0]
        };
        let open = m_after(0.5, 1.0);
        assert!((open - 0.2).abs() < 1e-6);
        assert_eq!(m_after(1e9, f32::INFINITY), open);
        assert_eq!(m_after(f32::NAN, f32::INFINITY), open);
        assert!((m_after(4.0, 1.0) - open / 4.0).abs() < 1e-6);
        assert_eq!(m_after(f32::INFINITY, 1.0), 0.0);
        assert!(m_after(f32::NAN, 1.0).is_nan());
    }
}

#[test]
fn late_steps_have_no_bias_left() {
    for ctx in levels() {
        let mut arena = Arena::new(&ctx, &[1.0]);
        arena.m = ctx.from_f32(&[0.5]);
        arena.v = ctx.from_f32(&[0.25]);
        arena.step(&ctx, &[0.5], 0.5, 1.0, 1_000_000_000, &[Segment { range: 0..1, decay: false }], false);
        assert!((arena.master.view().to_f32()[0] - 0.99).abs() < 1e-6);
    }
}

#[test]
fn nothing_to_update() {
    for ctx in levels() {
        let mut arena = Arena::new(&ctx, &[]);
        arena.step(&ctx, &[], 0.0, 1.0, 1, &[], true);
        let mut arena = Arena::new(&ctx, &[1.0]);
        arena.step(&ctx, &[1.0], 1.0, 1.0, 1, &[], true);
        arena.assert_same(&Arena::new(&ctx, &[1.0]));
    }
}

#[test]
#[should_panic(expected = "segment 2..5 overlaps 3")]
fn overlapping_segments_are_refused() {
    let ctx = ctx();
    let s = |range| Segment { range, decay: true };
    Arena::new(&ctx, &[0.0; 5]).step(&ctx, &[0.0; 5], 1.0, 1.0, 1, &[s(0..3), s(2..5)], false);
}
