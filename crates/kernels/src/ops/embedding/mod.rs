//! Token embedding: `y[n]` = `table[ids[n]]`.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, Weight};

/// `y[N, D]` = `table[ids]`. ids i32 `[N]`, table `[V, D]` in y's dtype or f32 (then rounded). An id outside 0..V is a
/// contract breach (callers check their tokens first).
pub fn forward(ctx: &Ctx, ids: View<'_>, table: &Weight<'_>, y: ViewMut<'_>) {
    let _timer = ctx.timer("embedding forward", sizes![ids, table, y]);
    let (v, d) = (table.rows, table.cols);
    assert!(table.experts == 1 && table.data.len() == v * d, "table [{v}, {d}] in {}", table.data.len());
    assert_eq!(y.len(), ids.len() * d, "y [{}, {d}]", ids.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, ids, table, y),
        Device::Cpu(cpu) => by_dtype!(table.data.dtype(), W => by_dtype!(y.dtype(), T => {
            cpu::forward::<W, T>(cpu, ids.i32(), table, y)
        })),
    }
}

/// `dtable[V, D]` (f32) = sum of `dy[n]` over the positions n that hold each id, in order of n, or if `accumulate`, the
/// same added to what is there. The sum is complete before it is added.
pub fn backward(ctx: &Ctx, ids: View<'_>, dy: View<'_>, mut dtable: ViewMut<'_>, accumulate: bool) {
    let _timer = ctx.timer("embedding backward", sizes![ids, dy, dtable]);
    let n = ids.len();
    // A GPU writes the rows of the ids that there are; a CPU passes over all of them.
    if !accumulate && (n == 0 || ctx.device.as_cuda().is_some()) {
        dtable.reborrow().clear();
    }
    if n == 0 {
        return;
    }
    let d = dy.len() / n;
    assert!(
        u32::try_from(n).is_ok() && d > 0 && dy.len() == n * d && dtable.len().is_multiple_of(d),
        "dy [{n}, {d}] to {}",
        dtable.len()
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward(cuda, ids, dy, d, dtable),
        Device::Cpu(cpu) => by_dtype!(dy.dtype(), T => cpu::backward::<T>(cpu, ids.i32(), dy, d, dtable, accumulate)),
    }
}
