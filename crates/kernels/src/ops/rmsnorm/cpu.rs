//! Rows are independent, so tasks are blocks of rows; sums over a row go through a fixed number of partial sums, which
//! the compiler keeps in vectors. The weight's gradient sums blocks of rows apart, then the blocks in order.

use super::{Backward, Forward, InputGradient, WeightGradient};
use crate::isa::{Isa, vectorised};
use crate::{Cpu, Elem};

/// Elements per task, at least.
const PIECE: usize = 1 << 13;
/// Partial sums of a row.
const PARTIAL: usize = 16;
/// Rows whose share of the weight's gradient is summed by one task.
const BLOCK: usize = 64;

/// The sum of partial sums, in the fixed order of this function.
#[inline(always)]
fn total(mut partial: [f32; PARTIAL]) -> f32 {
    let mut half = PARTIAL / 2;
    while half > 0 {
        for j in 0..half {
            partial[j] += partial[j + half];
        }
        half /= 2;
    }
    partial[0]
}

#[inline(always)]
fn sum_of_squares<T: Elem>(x: &[T]) -> f32 {
    let mut partial = [0.0f32; PARTIAL];
    let (chunks, tail) = x.as_chunks::<PARTIAL>();
    for x in chunks {
        for j in 0..PARTIAL {
            partial[j] += x[j].f32() * x[j].f32();
        }
    }
    partial.iter_mut().zip(tail).for_each(|(p, x)| *p += x.f32() * x.f32());
    total(partial)
}

/// Sum of dy * w * x.
#[inline(always)]
fn dot<T: Elem>(dy: &[T], w: &[f32], x: &[T]) -> f32 {
    let mut partial = [0.0f32; PARTIAL];
    let ((dy, dy_tail), (w, w_tail)) = (dy.as_chunks::<PARTIAL>(), w.as_chunks::<PARTIAL>());
    let (x, x_tail) = x.as_chunks::<PARTIAL>();
    for ((dy, w), x) in dy.iter().zip(w).zip(x) {
        for j in 0..PARTIAL {
            partial[j] += dy[j].f32() * w[j] * x[j].f32();
        }
    }
    for (((p, dy), w), x) in partial.iter_mut().zip(dy_tail).zip(w_tail).zip(x_tail) {
        *p += dy.f32() * w * x.f32();
    }
    total(partial)
}

pub fn forward<T: Elem>(cpu: &Cpu, a: Forward<'_>) {
    let w = a.weight.f32();
    let (x, d) = (T::of(a.x), w.len());
    let rows = PIECE.div_ceil(d);
    cpu.chunks2_mut((T::of_mut(a.y), rows * d), (a.rstd.f32(), rows), |i, y, rstd| {
        for (r, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
            *rstd = forward_row(cpu.isa(), &x[(i * rows + r) * a.x_stride..][..d], w, a.eps, y);
        }
    });
}

vectorised! {
    fn forward_row<T: Elem>(isa: Isa, x: &[T], w: &[f32], eps: f32, y: &mut [T]) -> f32 {
        let rstd = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = T::round(x.f32() * rstd * w);
        }
        rstd
    }
}

pub fn backward<T: Elem>(cpu: &Cpu, mut a: Backward<'_>) {
    let (input, weight) = (a.input.take(), a.weight_gradient.take());
    if let Some(i) = input {
        backward_input::<T>(cpu, &a, i);
    }
    if let Some(w) = weight {
        backward_weight::<T>(cpu, &a, w);
    }
}

/// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)).
fn backward_input<T: Elem>(cpu: &Cpu, a: &Backward<'_>, to: InputGradient<'_>) {
    let InputGradient { dx, dx_stride, accumulate } = to;
    let (w, rstd) = (a.weight.f32(), a.rstd.f32());
    let (dy, x, d) = (T::of(a.dy), T::of(a.x), w.len());
    let rows = PIECE.div_ceil(d);
    let Some(last) = rstd.len().checked_sub(1) else { return };
    let dx = &mut T::of_mut(dx)[..last * dx_stride + d];
    cpu.chunks_mut(dx, rows * dx_stride, |i, dx| {
        for (r, dx) in dx.chunks_mut(dx_stride).enumerate() {
            let n = i * rows + r;
            let (dy, x) = (&dy[n * d..][..d], &x[n * a.x_stride..][..d]);
            backward_row(cpu.isa(), dy, x, w, rstd[n], accumulate, dx);
        }
    });
}

vectorised! {
    fn backward_row<T: Elem>(isa: Isa, dy: &[T], x: &[T], w: &[f32], rstd: f32, accumulate: bool, dx: &mut [T]) {
        let share = rstd * rstd * (dot(dy, w, x) / w.len() as f32);
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            let g = rstd * (dy.f32() * w - x.f32() * share);
            *dx = T::round(if accumulate { dx.f32() + g } else { g });
        }
    }
}

fn backward_weight<T: Elem>(cpu: &Cpu, a: &Backward<'_>, to: WeightGradient<'_>) {
    let (dy, x, rstd, dw) = (T::of(a.dy), T::of(a.x), a.rstd.f32(), to.dw.f32());
    let (d, x_stride) = (dw.len(), a.x_stride);
    if !to.accumulate {
        dw.fill(0.0);
    }
    let mut partial = cpu.empty::<f32>(rstd.len().div_ceil(BLOCK) * d);
    cpu.chunks_mut(&mut partial, d, |block, partial| {
        partial.fill(0.0);
        for n in block * BLOCK..((block + 1) * BLOCK).min(rstd.len()) {
            let (dy, x) = (&dy[n * d..][..d], &x[n * x_stride..][..d]);
            add_row(cpu.isa(), dy, x, rstd[n], partial);
        }
    });
    let Some((total, rest)) = partial.split_at_mut_checked(d) else { return };
    for block in rest.chunks_exact(d) {
        total.iter_mut().zip(block).for_each(|(t, p)| *t += p);
    }
    dw.iter_mut().zip(total).for_each(|(dw, t)| *dw += *t);
}

vectorised! {
    fn add_row<T: Elem>(isa: Isa, dy: &[T], x: &[T], rstd: f32, dw: &mut [f32]) {
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy.f32() * (x.f32() * rstd);
        }
    }
}
