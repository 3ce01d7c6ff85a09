//! SwiGLU: y = silu(gate) * up, with gate and up side by side in one row: gate_up [N, 2F], gate first. In f32, rounded
//! once.

use crate::{Ctx, View, ViewMut};

/// y[N, F] from gate_up[N, 2F]. `rows`: compute only the first rows[0] rows (i32 [1] on the device); None for all.
pub fn forward(ctx: &Ctx, gate_up: View<'_>, width: usize, rows: Option<View<'_>>, y: ViewMut<'_>) {
    todo!()
}

/// d_gate_up[N, 2F] from dy[N, F] and the forward's gate_up.
pub fn backward(
    ctx: &Ctx,
    dy: View<'_>,
    gate_up: View<'_>,
    width: usize,
    rows: Option<View<'_>>,
    d_gate_up: ViewMut<'_>,
) {
    todo!()
}
