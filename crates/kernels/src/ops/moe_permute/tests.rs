use super::*;
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, contexts, ctx, finite_difference, gpu, levels, normals, op_tolerance,
};
use crate::{Buf, DType};
use hadal_numerics::{Purpose, Rng};

/// A batch: tokens, experts, K, D and the choice.
struct Case {
    experts: usize,
    top_k: usize,
    dim: usize,
    indices: Vec<i32>,
}

impl Case {
    /// Distinct experts for each token among those that `allowed` names.
    fn random(tokens: usize, experts: usize, top_k: usize, dim: usize, allowed: &[i32]) -> Self {
        let rng = Rng::new(1, Purpose::Test, (tokens * experts) as u64);
        let mut indices = Vec::new();
        for n in 0..tokens {
            let mut left = allowed.to_vec();
            for k in 0..top_k {
                indices.push(left.swap_remove(rng.below((n * top_k + k) as u64, left.len() as u64) as usize));
            }
        }
        Self { experts, top_k, dim, indices }
    }

    fn tokens(&self) -> usize {
        self.indices.len() / self.top_k
    }

    fn plan(&self, ctx: &Ctx) -> [Buf; 3] {
        let slots = self.indices.len();
        let [mut offsets, mut rows, mut slot_of_row] =
            [self.experts + 1, slots, slots].map(|n| ctx.zeros(DType::I32, n));
        let indices = ctx.from_i32(&self.indices);
        plan(ctx, indices.view(), self.experts, offsets.view_mut(), rows.view_mut(), slot_of_row.view_mut());
        [offsets, rows, slot_of_row]
    }
}

/// V3 and V2-Lite scaled down, columns past a tile, one expert gets all, most experts empty, K = 1, one token, none.
fn cases() -> Vec<Case> {
    let all = |e: i32| (0..e).collect::<Vec<_>>();
    vec![
        Case::random(37, 32, 8, 56, &all(32)),
        Case::random(21, 16, 6, 33, &all(16)),
        Case::random(5, 4, 2, 1025, &all(4)),
        Case::random(40, 8, 1, 16, &[5]),
        Case::random(19, 64, 3, 7, &[0, 31, 63]),
        Case::random(1, 3, 3, 1, &all(3)),
        Case::random(0, 4, 2, 8, &all(4)),
    ]
}

fn wide(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Rows in expert order, from slot order.
fn to_rows(slots: &[f64], dim: usize, slot_of_row: &Buf) -> Vec<f64> {
    slot_of_row.view().to_i32().iter().flat_map(|&s| slots[s as usize * dim..][..dim].to_vec()).collect()
}

#[test]
fn reference_gradient_is_the_difference_quotient() {
    let (tokens, top_k, dim) = (3, 2, 4);
    let values = |stream, n| -> Vec<f64> { normals(stream, n, 1.0).iter().map(|&v| v.into()).collect() };
    let (x, d_slots) = (values(1, tokens * dim), values(5, tokens * top_k * dim));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    finite_difference("dx", &x, &reference::gather(&d_slots, dim, top_k), |x| {
        dot(&reference::spread(x, dim, top_k), &d_slots)
    });
}

#[test]
fn plan_matches_the_reference() {
    // Beside the others, more slots than a block of a GPU takes, and more experts than it has threads.
    let all: Vec<i32> = (0..300).collect();
    let large = [Case::random(900, 64, 6, 1, &all[..64]), Case::random(1100, 300, 1, 1, &all)];
    for case in cases().into_iter().chain(large) {
        let expected = reference::plan(&case.indices, case.experts);
        for ctx in contexts().into_iter().chain(gpu()) {
            let [offsets, rows, slots] = case.plan(&ctx);
            assert_eq!(offsets.view().to_i32(), expected.0);
            assert_eq!(rows.view().to_i32(), expected.1);
            assert_eq!(slots.view().to_i32(), expected.2);
        }
    }
}

#[test]
fn permutation_matches_the_reference() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for case in cases() {
                let (dim, k) = (case.dim, case.top_k);
                let [_, row_of_slot, slot_of_row] = case.plan(&ctx);
                let x = buf_on(&ctx, dtype, &normals(1, case.tokens() * dim, 1.0));
                let mut rows = ctx.zeros(dtype, case.indices.len() * dim);
                permute(&ctx, x.view(), dim, k, [row_of_slot.view(), slot_of_row.view()], rows.view_mut());
                assert_eq!(wide(&rows), to_rows(&reference::spread(&wide(&x), dim, k), dim, &slot_of_row));

                let d_slots = wide(&buf(dtype, &normals(2, rows.len(), 1.0)));
                let narrow: Vec<f32> = to_rows(&d_slots, dim, &slot_of_row).iter().map(|&v| v as f32).collect();
                let d_rows = buf_on(&ctx, dtype, &narrow);
                let mut expected = reference::gather(&d_slots, dim, k);
                let mut dx = x.clone();
                permute_backward(&ctx, d_rows.view(), dim, k, row_of_slot.view(), dx.view_mut(), false);
                assert_close("dx", &dx, &expected, op_tolerance(dtype));
                let mut dx = x.clone();
                permute_backward(&ctx, d_rows.view(), dim, k, row_of_slot.view(), dx.view_mut(), true);
                expected.iter_mut().zip(wide(&x)).for_each(|(e, x)| *e += x);
                assert_close("dx, accumulated", &dx, &expected, op_tolerance(dtype));
            }
        }
    }
}

/// Everything that combining reads, rows in expert order.
struct Combined {
    rows: Buf,
    weights: Buf,
    base: Buf,
    extra: Buf,
    dy: Buf,
}

impl Combined {
    fn new(ctx: &Ctx, case: &Case, dtype: DType) -> Self {
        let (slots, n) = (case.indices.len(), case.tokens() * case.dim);
        Self {
            rows: buf_on(ctx, dtype, &normals(3, slots * case.dim, 1.0)),
            weights: buf_on(ctx, DType::F32, &normals(4, slots, 1.0)),
            base: buf_on(ctx, dtype, &normals(5, n, 1.0)),
            extra: buf_on(ctx, dtype, &normals(6, n, 1.0)),
            dy: buf_on(ctx, dtype, &normals(7, n, 1.0)),
        }
    }

    fn forward(&self, ctx: &Ctx, case: &Case, base: bool, extra: bool) -> Buf {
        let mut y = ctx.zeros(self.dy.dtype(), self.dy.len());
        combine(
            ctx,
            Combine {
                rows: self.rows.view(),
                dim: case.dim,
                top_k: case.top_k,
                row_of_slot: case.plan(ctx)[1].view(),
                weights: self.weights.view(),
                base: base.then(|| self.base.view()),
                extra: extra.then(|| self.extra.view()),
                y: y.view_mut(),
            },
        );
        y
    }

    /// The rows in slot order.
    fn slots(&self, case: &Case) -> Vec<f64> {
        let rows = wide(&self.rows);
        let [_, row_of_slot, _] = case.plan(&ctx());
        to_rows(&rows, case.dim, &row_of_slot)
    }
}

#[test]
fn combine_matches_the_dense_formula() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for case in cases() {
                let c = Combined::new(&ctx, &case, dtype);
                for (base, extra) in [(true, true), (true, false), (false, true), (false, false)] {
                    let part = |on, b: &Buf| if on { wide(b) } else { vec![0.0; b.len()] };
                    let expected = reference::combine(
                        &c.slots(&case),
                        &wide(&c.weights),
                        &part(base, &c.base),
                        &part(extra, &c.extra),
                        case.dim,
                        case.top_k,
                    );
                    assert_close("y", &c.forward(&ctx, &case, base, extra), &expected, op_tolerance(dtype));
                }
            }
        }
    }
}

/// The whole way: tokens to their experts, each expert its own map, back with weights.
#[test]
fn permute_then_combine_is_the_dense_mixture() {
    for case in cases() {
        let (dim, k, ctx) = (case.dim, case.top_k, ctx());
        let [offsets, row_of_slot, slot_of_row] = case.plan(&ctx);
        let x = buf(DType::F32, &normals(8, case.tokens() * dim, 1.0));
        let weights = buf(DType::F32, &normals(9, case.indices.len(), 1.0));
        let mut rows = ctx.zeros(DType::F32, case.indices.len() * dim);
        permute(&ctx, x.view(), dim, k, [row_of_slot.view(), slot_of_row.view()], rows.view_mut());
        // Expert e multiplies by e + 1.
        for (e, range) in offsets.view().i32().windows(2).enumerate() {
            let own = range[0] as usize * dim..range[1] as usize * dim;
            rows.view_mut().f32()[own].iter_mut().for_each(|v| *v *= (e + 1) as f32);
        }
        let mut y = ctx.zeros(DType::F32, x.len());
        let (base, extra) = (None, None);
        let (rows, row_of_slot) = (rows.view(), row_of_slot.view());
        combine(
            &ctx,
            Combine { rows, dim, top_k: k, row_of_slot, weights: weights.view(), base, extra, y: y.view_mut() },
        );
        let mut expected = vec![0.0; x.len()];
        for (slot, &e) in case.indices.iter().enumerate() {
            for i in 0..dim {
                let x = f64::from(x.view().f32()[slot / k * dim + i]);
                expected[slot / k * dim + i] += f64::from(weights.view().f32()[slot]) * f64::from(e + 1) * x;
            }
        }
        assert_close("y", &y, &expected, op_tolerance(DType::F32));
    }
}

#[test]
fn same_bits_on_every_device() {
    for case in [Case::random(700, 16, 4, 96, &(0..16).collect::<Vec<_>>()), Case::random(9, 8, 2, 2050, &[0, 1, 7])] {
        let run = |ctx: &Ctx| {
            let c = Combined::new(ctx, &case, DType::Bf16);
            let [_, row_of_slot, slot_of_row] = case.plan(ctx);
            let mut rows = ctx.zeros(DType::Bf16, c.rows.len());
            permute(ctx, c.dy.view(), case.dim, case.top_k, [row_of_slot.view(), slot_of_row.view()], rows.view_mut());
            let mut dx = c.base.clone();
            permute_backward(ctx, c.rows.view(), case.dim, case.top_k, row_of_slot.view(), dx.view_mut(), true);
            [rows, dx, c.forward(ctx, &case, true, true)]
        };
        let first = run(&ctx());
        for ctx in contexts().into_iter().chain(gpu()) {
            run(&ctx).iter().zip(&first).for_each(|(a, b)| assert_same_bits("bits", a, b));
        }
    }
}

/// A token's sum does not depend on where its rows lie.
#[test]
fn a_token_keeps_its_bits_in_any_batch() {
    let case = Case::random(30, 8, 3, 64, &(0..8).collect::<Vec<_>>());
    for ctx in [ctx()].into_iter().chain(gpu()) {
        let c = Combined::new(&ctx, &case, DType::F32);
        let whole = c.forward(&ctx, &case, true, true);
        let (t, k, dim) = (17, case.top_k, case.dim);
        let one = Case { experts: 8, top_k: k, dim, indices: case.indices[t * k..][..k].to_vec() };
        let slots = c.slots(&case)[t * k * dim..][..k * dim].to_vec();
        let rows: Vec<f32> = to_rows(&slots, dim, &one.plan(&ctx)[2]).iter().map(|&v| v as f32).collect();
        let part = |b: &Buf, width: usize| ctx.from_f32(&b.view().to_f32()[t * width..][..width]);
        let alone = Combined {
            rows: ctx.from_f32(&rows),
            weights: part(&c.weights, k),
            base: part(&c.base, dim),
            extra: part(&c.extra, dim),
            dy: part(&c.dy, dim),
        };
        let y = alone.forward(&ctx, &one, true, true);
        assert_eq!(y.view().to_f32(), whole.view().to_f32()[t * dim..][..dim]);
    }
}

#[test]
#[should_panic(expected = "slot 3 chose 4, expected one of 4 experts")]
fn a_choice_out_of_range_is_refused() {
    Case { experts: 4, top_k: 2, dim: 1, indices: vec![0, 1, 2, 4] }.plan(&ctx());
}
