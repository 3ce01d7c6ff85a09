//! SwiGLU: y = silu(gate) * up, with gate and up side by side in one row: gate_up `[N, 2F]`, gate first. In f32,
//! rounded once.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::{Ctx, Device, Elem, View, ViewMut};

/// `y[N, F]` from `gate_up[N, 2F]`. `rows`: compute only the first `rows[0]` rows (i32 `[1]` on the device); None for
/// all.
pub fn forward(ctx: &Ctx, gate_up: View<'_>, width: usize, rows: Option<View<'_>>, y: ViewMut<'_>) {
    let _timer = ctx.timer("swiglu forward");
    check(width, gate_up.len(), y.len(), rows);
    match &ctx.device {
        Device::Cpu(cpu) => {
            let rows = rows.map_or(usize::MAX, |r| count(r, y.len() / width));
            by_dtype!(y.dtype(), T => cpu::forward::<T>(cpu, T::of(gate_up), width, rows, T::of_mut(y)))
        }
    }
}

/// `d_gate_up[N, 2F]` from `dy[N, F]` and the forward's gate_up.
pub fn backward(
    ctx: &Ctx,
    dy: View<'_>,
    gate_up: View<'_>,
    width: usize,
    rows: Option<View<'_>>,
    d_gate_up: ViewMut<'_>,
) {
    let _timer = ctx.timer("swiglu backward");
    check(width, gate_up.len(), dy.len(), rows);
    assert_eq!(d_gate_up.len(), gate_up.len(), "swiglu: d_gate_up is not shaped as gate_up");
    match &ctx.device {
        Device::Cpu(cpu) => {
            let rows = rows.map_or(usize::MAX, |r| count(r, dy.len() / width));
            by_dtype!(dy.dtype(), T => {
                cpu::backward::<T>(cpu, T::of(dy), T::of(gate_up), width, rows, T::of_mut(d_gate_up))
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
