use super::{Rope, apply, reference};
use crate::testing::{
    assert_close, assert_same_bits, buf, buf_on, contexts, ctx, finite_difference, levels, normals, op_tolerance,
};
use crate::{Buf, Ctx, DType};
use hadal_numerics::Tolerance;

/// N tokens with rotary parts of `width` inside wider rows.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tokens: usize,
    heads: usize,
    width: usize,
    head_stride: usize,
    offset: usize,
    token_stride: usize,
    interleaved: bool,
}

impl Layout {
    /// Where token n's head h begins.
    fn at(&self, n: usize, h: usize) -> usize {
        n * self.token_stride + self.offset + h * self.head_stride
    }

    fn len(&self) -> usize {
        self.tokens * self.token_stride
    }

    fn positions(&self) -> Vec<i32> {
        // Not in order, repeated, and far out.
        (0..self.tokens).map(|n| [0, 1, 7, 4095, 163_839][n * 3 % 5] - (n / 5) as i32 % 2).map(|p| p.max(0)).collect()
    }

    fn inv_freq(&self) -> Vec<f32> {
        let half = self.width / 2;
        (0..half).map(|i| 10000f32.powf(-(i as f32) / half as f32)).collect()
    }

    fn run(&self, ctx: &Ctx, x: &mut Buf, factor: f32, inverse: bool) {
        let (positions, inv_freq) = (ctx.from_i32(&self.positions()), ctx.from_f32(&self.inv_freq()));
        let Self { token_stride, offset, heads, head_stride, interleaved, .. } = *self;
        apply(
            ctx,
            Rope {
                x: x.view_mut(),
                token_stride,
                offset,
                heads,
                head_stride,
                positions: positions.view(),
                inv_freq: inv_freq.view(),
                factor,
                interleaved,
                inverse,
            },
        );
    }

    fn reference(&self, x: &[f64], factor: f32, inverse: bool) -> Vec<f64> {
        let inv_freq: Vec<f64> = self.inv_freq().into_iter().map(f64::from).collect();
        let mut y = x.to_vec();
        for (n, &p) in self.positions().iter().enumerate() {
            for h in 0..self.heads {
                let head = self.at(n, h)..self.at(n, h) + self.width;
                let turned =
                    reference::rotate(&x[head.clone()], p, &inv_freq, factor.into(), self.interleaved, inverse);
                y[head].copy_from_slice(&turned);
            }
        }
        y
    }
}

/// A query head's tail, a key shared by all heads at the end of kv_a's rows, dense heads, many heads, and nothing.
fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for interleaved in [true, false] {
        for (tokens, heads, width, head_stride, offset, token_stride) in [
            (37, 3, 64, 192, 128, 576),
            (5, 1, 8, 0, 24, 32),
            (17, 2, 6, 6, 0, 12),
            (50, 20, 64, 72, 8, 1448),
            (1, 1, 2, 2, 0, 2),
            (0, 4, 8, 8, 0, 32),
            (3, 0, 8, 8, 0, 4),
        ] {
            all.push(Layout { tokens, heads, width, head_stride, offset, token_stride, interleaved });
        }
    }
    all
}

fn f64s(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

#[test]
fn the_inverse_is_the_derivative() {
    for l in layouts().into_iter().filter(|l| l.tokens == 17) {
        let x: Vec<f64> = normals(1, l.len(), 1.0).into_iter().map(f64::from).collect();
        let dy: Vec<f64> = normals(2, l.len(), 1.0).into_iter().map(f64::from).collect();
        let gradient = l.reference(&dy, 1.3, true);
        finite_difference("rope", &x, &gradient, |x| {
            l.reference(x, 1.3, false).iter().zip(&dy).map(|(y, g)| y * g).sum()
        });
    }
}

#[test]
fn agrees_with_the_reference_and_leaves_the_rest_alone() {
    for ctx in levels() {
        for l in layouts() {
            for dtype in [DType::F32, DType::Bf16] {
                for (factor, inverse) in [(1.0, false), (0.92104, true)] {
                    let before = buf_on(&ctx, dtype, &normals(1, l.len(), 1.0));
                    let mut x = before.clone();
                    l.run(&ctx, &mut x, factor, inverse);
                    let expected = l.reference(&f64s(&before), factor, inverse);
                    assert_close(&format!("{l:?}"), &x, &expected, op_tolerance(dtype));
                    let (before, after) = (before.view().to_f32(), x.view().to_f32());
                    let rotated = |i: usize| {
                        let inside = |h| (0..l.width).contains(&(i % l.token_stride).wrapping_sub(l.at(0, h)));
                        (0..l.heads).any(inside)
                    };
                    for i in (0..l.len()).filter(|&i| !rotated(i)) {
                        assert_eq!(before[i].to_bits(), after[i].to_bits(), "{l:?}: element {i} is not rotary");
                    }
                }
            }
        }
    }
}

#[test]
fn inverse_undoes_forward() {
    for ctx in levels() {
        for l in layouts() {
            let before = buf_on(&ctx, DType::F32, &normals(1, l.len(), 1.0));
            let mut x = before.clone();
            l.run(&ctx, &mut x, 1.0, false);
            l.run(&ctx, &mut x, 1.0, true);
            assert_close(&format!("{l:?}"), &x, &f64s(&before), Tolerance::F32_OP);
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let l = layouts()[0];
    for dtype in [DType::F32, DType::Bf16] {
        let runs: Vec<Buf> = contexts()
            .iter()
            .map(|c| {
                let mut x = buf(dtype, &normals(1, l.len(), 1.0));
                l.run(c, &mut x, 1.0, false);
                x
            })
            .collect();
        assert_same_bits("2 threads", &runs[0], &runs[1]);
        assert_same_bits("5 threads", &runs[0], &runs[2]);
    }
}

#[test]
#[should_panic(expected = "overlap")]
fn heads_that_overlap_are_refused() {
    let l = Layout { tokens: 1, heads: 2, width: 8, head_stride: 4, offset: 0, token_stride: 16, interleaved: true };
    l.run(&ctx(), &mut buf(DType::F32, &[0.0; 16]), 1.0, false);
}

/// Turns from the device's table and those of a call that has a position too far for it, by the bit; the table of
/// another model, a longer context and another factor are not taken for it.
#[test]
fn a_table_changes_no_bits() {
    let layout =
        Layout { tokens: 40, heads: 3, width: 72, head_stride: 80, offset: 5, token_stride: 250, interleaved: true };
    let inv_freq = |base: f32| (0..36).map(|i| base.powf(-(i as f32) / 36.0)).collect::<Vec<_>>();
    for (ctx, dtype) in levels().iter().flat_map(|ctx| [DType::F32, DType::Bf16].map(|dtype| (ctx, dtype))) {
        let x = normals(1, layout.len(), 1.0);
        let run = |positions: &[i32], base, factor, inverse| {
            let mut x = buf_on(ctx, dtype, &x);
            let (positions, inv_freq) = (ctx.from_i32(positions), ctx.from_f32(&inv_freq(base)));
            let a = Rope {
                x: x.view_mut(),
                token_stride: layout.token_stride,
                offset: layout.offset,
                heads: layout.heads,
                head_stride: layout.head_stride,
                positions: positions.view(),
                inv_freq: inv_freq.view(),
                factor,
                interleaved: true,
                inverse,
            };
            apply(ctx, a);
            x.view().to_f32()
        };
        for (step, base, factor) in [(1, 1e4, 1.0), (5, 1e4, 1.0), (5, 3e4, 1.0), (2, 3e4, 0.5)] {
            for inverse in [false, true] {
                let near: Vec<i32> = (0..layout.tokens as i32).map(|n| n * step).collect();
                let mut far = near.clone();
                *far.last_mut().unwrap() = 1 << 20;
                let same = (layout.tokens - 1) * layout.token_stride;
                let (a, b) = (run(&near, base, factor, inverse), run(&far, base, factor, inverse));
                let bits = |x: &[f32]| x[..same].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&a), bits(&b), "{dtype:?}, every {step}th, base {base}, factor {factor}, {inverse}");
            }
        }
    }
}
