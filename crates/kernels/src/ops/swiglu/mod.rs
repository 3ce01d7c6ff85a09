//! SwiGLU: y = silu(gate) * up, with gate and up side by side in one row: gate_up `[N, 2F]`, gate first. In f32,
//! rounded once.

mod cpu;
mod cuda;
mod lines;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::sizes::sizes;
use crate::{Ctx, Device, Elem, View, ViewMut};

/// `y[N, F]` from `gate_up[N, 2F]`. `rows`: compute only the first `rows[0]` rows (i32 `[1]` on the device); None for
/// all.
pub fn forward(ctx: &Ctx, gate_up: View<'_>, width: usize, rows: Option<View<'_>>, y: ViewMut<'_>) {
    let _timer = ctx.timer("swiglu forward", sizes![gate_up, width, rows, y]);
    check(width, gate_up.len(), y.len(), rows);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, gate_up, width, rows, y),
        Device::Cpu(cpu) => {
            let rows = rows.map_or(usize::MAX, |r| count(r, y.len() / width));
            by_dtype!(y.dtype(), T => cpu::forward::<T>(cpu, T::of(gate_up), width, rows, T::of_mut(y)))
        }
    }
}

/// Arguments of [`backward`]. With `weights`, what the network's output was multiplied by, row by row (the routing
/// weights of experts): the product after SwiGLU is linear, so that they may as well have multiplied SwiGLU's output.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[N, F]`: in, the gradient of y, not yet times the weights. Out, weights * y.
    pub dy: ViewMut<'a>,
    /// `[N, 2F]`: in, the forward's input. Out, its gradient.
    pub gate_up: ViewMut<'a>,
    /// F.
    pub width: usize,
    /// As in [`forward`]: later rows are neither read nor written.
    pub rows: Option<View<'a>>,
    /// (f32 `[N]`, f32 `[N]`): each row's weight, and where its gradient dy . y goes.
    pub weights: Option<(View<'a>, ViewMut<'a>)>,
}

/// Backward in place, which computes y again on its way: y is rounded as the forward's, then weights * y once more, the
/// gradient of gate_up once.
pub fn backward(ctx: &Ctx, b: Backward<'_>) {
    let _timer = ctx.timer("swiglu backward", sizes![b.dy, b.gate_up, b.width, b.rows, b.weights]);
    check(b.width, b.gate_up.len(), b.dy.len(), b.rows);
    let n = b.dy.len() / b.width;
    assert!(
        b.weights.as_ref().is_none_or(|(w, d)| w.len() == n && d.len() == n),
        "swiglu: {n} rows, but weights {:?}",
        b.weights.as_ref().map(|(w, d)| (w.len(), d.len()))
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward(cuda, b),
        Device::Cpu(cpu) => {
            let rows = b.rows.map_or(n, |r| count(r, n));
            let weights = b.weights.map(|(w, d)| (w.f32(), d.f32()));
            by_dtype!(b.dy.dtype(), T => {
                cpu::backward::<T>(cpu, T::of_mut(b.dy), T::of_mut(b.gate_up), b.width, rows, weights)
            })
        }
    }
}

fn check(width: usize, gate_up: usize, y: usize, rows: Option<View<'_>>) {
    assert!(
        width > 0 && y.is_multiple_of(width) && gate_up == 2 * y,
        "swiglu: gate_up has {gate_up} elements and y {y}, expected [N, 2 * {width}] and [N, {width}]"
    );
    assert!(rows.is_none_or(|r| r.len() == 1), "swiglu: rows has {} elements, expected 1", rows.map_or(0, |r| r.len()));
}

/// The row count a host buffer holds.
fn count(rows: View<'_>, capacity: usize) -> usize {
    let n = rows.i32()[0];
    assert!(n >= 0 && n as usize <= capacity, "swiglu: {n} rows in a buffer of {capacity}");
    n as usize
}
