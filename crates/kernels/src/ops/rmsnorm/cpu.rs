//! Rows are independent, so tasks are blocks of rows; sums over a row go through a fixed number of partial sums, which
//! the compiler keeps in vectors. The weight's gradient sums blocks of rows apart, then the blocks in order.

use super::{BackwardInput, Forward};
use crate::{Cpu, Elem, View, ViewMut};

/// Elements per task, at least.
const PIECE: usize = 1 << 13;
/// Partial sums of a row.
const PARTIAL: usize = 16;
/// Rows whose share of the weight's gradient is summed by one task.
const BLOCK: usize = 64;

/// Sum of f(i) for i in 0..n in the fixed order of this function.
#[inline(always)]
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut partial = [0.0f32; PARTIAL];
    let whole = n / PARTIAL * PARTIAL;
    for i in (0..whole).step_by(PARTIAL) {
        for (j, p) in partial.iter_mut().enumerate() {
            *p += f(i + j);
        }
    }
    for i in whole..n {
        partial[i - whole] += f(i);
    }
    let mut half = PARTIAL / 2;
    while half > 0 {
        for j in 0..half {
            partial[j] += partial[j + half];
        }
        half /= 2;
    }
    partial[0]
}

pub fn forward<T: Elem>(cpu: &Cpu, a: Forward<'_>) {
    let w = a.weight.f32();
    let (x, d) = (T::of(a.x), w.len());
    let rows = PIECE.div_ceil(d);
    cpu.chunks2_mut((T::of_mut(a.y), rows * d), (a.rstd.f32(), rows), |i, y, rstd| {
        for (r, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
            let x = &x[(i * rows + r) * a.x_stride..][..d];
            let squares = sum(d, |j| x[j].f32() * x[j].f32());
            *rstd = 1.0 / (squares / d as f32 + a.eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = T::round(x.f32() * *rstd * w);
            }
        }
    });
}

/// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)).
pub fn backward_input<T: Elem>(cpu: &Cpu, a: BackwardInput<'_>) {
    let (w, rstd) = (a.weight.f32(), a.rstd.f32());
    let (dy, x, d) = (T::of(a.dy), T::of(a.x), w.len());
    let rows = PIECE.div_ceil(d);
    let Some(last) = rstd.len().checked_sub(1) else { return };
    let dx = &mut T::of_mut(a.dx)[..last * a.dx_stride + d];
    cpu.chunks_mut(dx, rows * a.dx_stride, |i, dx| {
        for (r, dx) in dx.chunks_mut(a.dx_stride).enumerate() {
            let n = i * rows + r;
            let (dy, x, rstd) = (&dy[n * d..][..d], &x[n * a.x_stride..][..d], rstd[n]);
            let dot = sum(d, |j| dy[j].f32() * w[j] * x[j].f32());
            let share = rstd * rstd * (dot / d as f32);
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                let g = rstd * (dy.f32() * w - x.f32() * share);
                *dx = T::round(if a.accumulate { dx.f32() + g } else { g });
            }
        }
    });
}

pub fn backward_weight<T: Elem>(
    cpu: &Cpu,
    dy: View<'_>,
    x: View<'_>,
    x_stride: usize,
    rstd: View<'_>,
    dw: ViewMut<'_>,
) {
    let (dy, x, rstd, dw) = (T::of(dy), T::of(x), rstd.f32(), dw.f32());
    let d = dw.len();
    let mut partial = cpu.empty::<f32>(rstd.len().div_ceil(BLOCK) * d);
    cpu.chunks_mut(&mut partial, d, |block, partial| {
        partial.fill(0.0);
        for n in block * BLOCK..((block + 1) * BLOCK).min(rstd.len()) {
            let (dy, x) = (&dy[n * d..][..d], &x[n * x_stride..][..d]);
            for ((p, dy), x) in partial.iter_mut().zip(dy).zip(x) {
                *p += dy.f32() * (x.f32() * rstd[n]);
            }
        }
    });
    let Some((total, rest)) = partial.split_at_mut_checked(d) else { return };
    for block in rest.chunks_exact(d) {
        total.iter_mut().zip(block).for_each(|(t, p)| *t += p);
    }
    dw.iter_mut().zip(total).for_each(|(dw, t)| *dw += *t);
}
