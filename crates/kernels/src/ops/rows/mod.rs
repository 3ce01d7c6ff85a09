//! Moving rows: gather by index, its adjoint, and a strided copy. Values are moved, not computed, except that
//! `scatter_add` adds in f32 and rounds once.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// `out[n, D]` = `x[index[n]]`; index i32 `[n]` within x's rows.
pub fn gather(ctx: &Ctx, x: View<'_>, dim: usize, index: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("rows", sizes![x, dim, index, out]);
    assert_eq!(out.len(), index.len() * dim, "gather of {} rows of {dim}", index.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::gather(cuda, x, dim, index, out),
        Device::Cpu(cpu) => {
            super::by_dtype!(x.dtype(), T => cpu::gather::<T>(cpu, crate::Elem::of(x), dim, index.i32(), crate::Elem::of_mut(out)))
        }
    }
}

/// `x[index[n]]` += `d[n]`. No index occurs twice (a contract breach, asserted in debug builds), so the order of n does
/// not matter.
pub fn scatter_add(ctx: &Ctx, d: View<'_>, dim: usize, index: View<'_>, x: ViewMut<'_>) {
    let _timer = ctx.timer("rows", sizes![d, dim, index, x]);
    assert_eq!(d.len(), index.len() * dim, "scatter of {} rows of {dim}", index.len());
    debug_assert!(!index.is_host() || distinct(index.i32()), "scatter to {index:?}: an index occurs twice");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::scatter_add(cuda, d, dim, index, x),
        Device::Cpu(_) => {
            super::by_dtype!(d.dtype(), T => cpu::scatter_add::<T>(crate::Elem::of(d), dim, index.i32(), crate::Elem::of_mut(x)))
        }
    }
}

fn distinct(index: &[i32]) -> bool {
    let mut seen = std::collections::HashSet::new();
    index.iter().all(|i| seen.insert(i))
}

/// Copies `rows` rows of `width` elements; row r begins at r * stride of each side.
pub fn copy_strided(
    ctx: &Ctx,
    (from, from_stride): (View<'_>, usize),
    (to, to_stride): (ViewMut<'_>, usize),
    rows: usize,
    width: usize,
) {
    let _timer = ctx.timer("rows", sizes![from, from_stride, to, to_stride, rows, width]);
    assert!(width <= from_stride && width <= to_stride, "rows of {width} overlap at {from_stride}, {to_stride}");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::copy_strided(cuda, (from, from_stride), (to, to_stride), rows, width),
        Device::Cpu(cpu) => super::by_dtype!(from.dtype(), T => cpu::copy_strided::<T>(
            cpu, (crate::Elem::of(from), from_stride), (crate::Elem::of_mut(to), to_stride), rows, width)),
    }
}
