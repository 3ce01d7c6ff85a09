//! AdamW elementwise against torch.optim.AdamW on given gradients and moments of every magnitude.

use super::load::{contexts, root};
use hadal_kernels::Ctx;
use hadal_kernels::ops::adamw::{self, Segment};
use safetensors::SafeTensors;

/// Rounding of a sum is relative to its terms, of which one is the value before: a few ulps of the two. Below the
/// smallest normal number a value may be flushed.
fn check(name: &str, found: &[f32], expected: &[f32], before: &[f32]) {
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        let allowed = 5e-7 * (b.abs() + before[i].abs()) + f32::MIN_POSITIVE;
        assert!((a - b).abs() <= allowed, "{name}[{i}]: {a:e}, expected {b:e}");
    }
}

#[test]
fn adamw_elementwise() {
    contexts().iter().for_each(check_adamw_elementwise);
}

fn check_adamw_elementwise(ctx: &Ctx) {
    let bytes = std::fs::read(root().join("adamw_op.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (grad, norm) = (ctx.from_f32(&tensor("g")), ctx.from_f32(&[1.0]));
    assert!(grad.len() > 300);
    for (t, label, decay) in [(1, "decay", true), (1, "plain", false), (7, "decay", true), (7, "plain", false)] {
        let [mut w, mut m, mut v] = ["w", "m", "v"].map(|n| ctx.from_f32(&tensor(n)));
        let schedule = ctx.from_f32(&adamw::schedule(1e-3, 0.9, 0.95, 0.1, t));
        let a = adamw::AdamW {
            master: w.view_mut(),
            grad: grad.view(),
            m: m.view_mut(),
            v: v.view_mut(),
            compute: None,
            segments: &[Segment { range: 0..grad.len(), decay }],
            norm: norm.view(),
            clip: f32::INFINITY,
            schedule: schedule.view(),
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
        };
        adamw::step(ctx, a);
        for (kind, found) in [("w", &w), ("m", &m), ("v", &v)] {
            let name = format!("t{t}.{label}.{kind}");
            check(&name, &found.view().to_f32(), &tensor(&name), &tensor(kind));
        }
    }
}
