//! Rows are independent, so tasks are blocks of rows; sums over a row go through a fixed number of partial sums, which
//! the compiler keeps in vectors. The weight's gradient sums blocks of rows apart, then the blocks in order.

use super::{Backward, Forward};
use crate::isa::{Cache, Isa, ask_for, vectorised};
use crate::{Cpu, Elem};

/// Elements per task, at least.
const PIECE: usize = 1 << 13;
/// Partial sums of a row.
const PARTIAL: usize = 16;
/// Rows whose share of the weight's gradient is summed by one task.
const BLOCK: usize = 64;
/// A row is asked for about so many bytes before its turn: rows are short, and may lie apart.
const AHEAD: usize = 4 << 10;

/// Asks for the part of `x` that will be its turn when the first rows, `stride` elements apart, have passed.
fn ask_ahead<T>(x: &[T], stride: usize, d: usize) {
    let rows = (AHEAD / (stride * size_of::<T>())).max(1);
    if let Some(next) = x.get(rows * stride..) {
        ask_for(Cache::First, &next[..d.min(next.len())]);
    }
}

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

/// The same sum, and the row's share of the weight's gradient, of operands that are read once.
#[inline(always)]
fn dot_and_share<T: Elem>(dy: &[T], w: &[f32], x: &[T], rstd: f32, dw: &mut [f32]) -> f32 {
    let mut partial = [0.0f32; PARTIAL];
    let ((dy, dy_tail), (w, w_tail)) = (dy.as_chunks::<PARTIAL>(), w.as_chunks::<PARTIAL>());
    let ((x, x_tail), (dw, dw_tail)) = (x.as_chunks::<PARTIAL>(), dw.as_chunks_mut::<PARTIAL>());
    for (((dy, w), x), dw) in dy.iter().zip(w).zip(x).zip(dw) {
        for j in 0..PARTIAL {
            let (dy, x) = (dy[j].f32(), x[j].f32());
            partial[j] += dy * w[j] * x;
            dw[j] += dy * (x * rstd);
        }
    }
    for ((((p, dy), w), x), dw) in partial.iter_mut().zip(dy_tail).zip(w_tail).zip(x_tail).zip(dw_tail) {
        *p += dy.f32() * w * x.f32();
        *dw += dy.f32() * (x.f32() * rstd);
    }
    total(partial)
}

pub fn forward<T: Elem>(cpu: &Cpu, a: Forward<'_>) {
    let w = a.weight.f32();
    let (x, d) = (T::of(a.x), w.len());
    let rows = PIECE.div_ceil(d);
    cpu.chunks2_mut((T::of_mut(a.y), rows * d), (a.rstd.f32(), rows), |i, y, rstd| {
        for (r, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
            let x = &x[(i * rows + r) * a.x_stride..];
            ask_ahead(x, a.x_stride, d);
            *rstd = forward_row(cpu.isa(), &x[..d], w, a.eps, y);
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

/// Both gradients are taken of a row while it is in the first-level cache.
pub fn backward<T: Elem>(cpu: &Cpu, mut a: Backward<'_>) {
    let (input, weight) = (a.input.take(), a.weight_gradient.take());
    let (n, d) = (a.rstd.len(), a.weight.len());
    let rows = Rows::<T> {
        isa: cpu.isa(),
        dy: T::of(a.dy),
        x: T::of(a.x),
        x_stride: a.x_stride,
        w: a.weight.f32(),
        rstd: a.rstd.f32(),
    };
    let mut sums = weight.as_ref().map(|_| cpu.empty::<f32>(n.div_ceil(BLOCK) * d));
    let end = |stride: usize| n.checked_sub(1).map_or(0, |last| last * stride + d);
    let input = input.map(|i| (&mut T::of_mut(i.dx)[..end(i.dx_stride)], i.dx_stride, i.accumulate));
    let of_block = |block: usize| (block * BLOCK..n.min((block + 1) * BLOCK)).enumerate();
    match (input, &mut sums) {
        (Some((dx, stride, accumulate)), Some(sums)) => {
            cpu.chunks2_mut((dx, BLOCK * stride), (sums, d), |block, dx, sums| {
                sums.fill(0.0);
                for (r, n) in of_block(block) {
                    rows.input(n, accumulate, stride, &mut dx[r * stride..], Some(&mut *sums));
                }
            });
        }
        (Some((dx, stride, accumulate)), None) => cpu.chunks_mut(dx, BLOCK * stride, |block, dx| {
            of_block(block).for_each(|(r, n)| rows.input(n, accumulate, stride, &mut dx[r * stride..], None));
        }),
        (None, Some(sums)) => cpu.chunks_mut(sums, d, |block, sums| {
            sums.fill(0.0);
            for (_, n) in of_block(block) {
                rows.ask(n);
                rows.weight(n, sums);
            }
        }),
        (None, None) => {}
    }
    if let (Some(to), Some(sums)) = (weight, &mut sums) {
        add_up(cpu.isa(), to.dw.f32(), to.accumulate, sums);
    }
}

/// What both gradients read.
struct Rows<'a, T> {
    isa: Isa,
    dy: &'a [T],
    x: &'a [T],
    x_stride: usize,
    w: &'a [f32],
    rstd: &'a [f32],
}

impl<T: Elem> Rows<'_, T> {
    /// dy and x of row `n`.
    fn of(&self, n: usize) -> (&[T], &[T]) {
        let d = self.w.len();
        (&self.dy[n * d..][..d], &self.x[n * self.x_stride..][..d])
    }

    /// Asks for what follows row `n`.
    fn ask(&self, n: usize) {
        let d = self.w.len();
        ask_ahead(&self.dy[n * d..], d, d);
        ask_ahead(&self.x[n * self.x_stride..], self.x_stride, d);
    }

    /// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)), to the head of dx. And the row's share of the weight's
    /// gradient, added to `sums` if they are asked for.
    fn input(&self, n: usize, accumulate: bool, stride: usize, dx: &mut [T], sums: Option<&mut [f32]>) {
        self.ask(n);
        if accumulate {
            ask_ahead(dx, stride, self.w.len());
        }
        let (dy, x) = self.of(n);
        match sums {
            Some(dw) => backward_row_and_share(self.isa, dy, x, self.w, self.rstd[n], accumulate, dx, dw),
            None => backward_row(self.isa, dy, x, self.w, self.rstd[n], accumulate, dx),
        }
    }

    /// Adds the row's share of the weight's gradient.
    fn weight(&self, n: usize, sums: &mut [f32]) {
        let (dy, x) = self.of(n);
        add_row(self.isa, dy, x, self.rstd[n], sums);
    }
}

/// A row's dx, of its dot product.
#[inline(always)]
fn input_row<T: Elem>(dy: &[T], x: &[T], w: &[f32], rstd: f32, dot: f32, accumulate: bool, dx: &mut [T]) {
    let share = rstd * rstd * (dot / w.len() as f32);
    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
        let g = rstd * (dy.f32() * w - x.f32() * share);
        *dx = T::round(if accumulate { dx.f32() + g } else { g });
    }
}

vectorised! {
    fn backward_row<T: Elem>(isa: Isa, dy: &[T], x: &[T], w: &[f32], rstd: f32, accumulate: bool, dx: &mut [T]) {
        input_row(dy, x, w, rstd, dot(dy, w, x), accumulate, dx);
    }
}

vectorised! {
    /// The same, and the row's share of the weight's gradient.
    fn backward_row_and_share<T: Elem>(
        isa: Isa, dy: &[T], x: &[T], w: &[f32], rstd: f32, accumulate: bool, dx: &mut [T], dw: &mut [f32],
    ) {
        input_row(dy, x, w, rstd, dot_and_share(dy, w, x, rstd, dw), accumulate, dx);
    }
}

vectorised! {
    /// The sums of all blocks in order, to where the weight's gradient goes.
    fn add_up(isa: Isa, dw: &mut [f32], accumulate: bool, sums: &mut [f32]) {
        if !accumulate {
            dw.fill(0.0);
        }
        let Some((total, rest)) = sums.split_at_mut_checked(dw.len()) else { return };
        for block in rest.chunks_exact(dw.len()) {
            total.iter_mut().zip(block).for_each(|(t, p)| *t += p);
        }
        dw.iter_mut().zip(total).for_each(|(dw, t)| *dw += *t);
    }
}

vectorised! {
    fn add_row<T: Elem>(isa: Isa, dy: &[T], x: &[T], rstd: f32, dw: &mut [f32]) {
        for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
            *dw += dy.f32() * (x.f32() * rstd);
        }
    }
}
