//! Elementwise sums, blends and conversion, in f32, rounded once.

pub(super) mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::by_dtype;
use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// out = a + b (any float dtypes of equal length).
pub fn add(ctx: &Ctx, a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("add", sizes![a, b, out]);
    assert!(a.len() == out.len() && b.len() == out.len(), "{} + {} to {}", a.len(), b.len(), out.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::add(cuda, a, b, out),
        Device::Cpu(cpu) => by_dtype!(a.dtype(), A => by_dtype!(b.dtype(), B => by_dtype!(out.dtype(), T => {
            cpu::add::<A, B, T>(cpu, a, b, out)
        }))),
    }
}

/// out += a.
pub fn accumulate(ctx: &Ctx, a: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("add", sizes![a, out]);
    assert_eq!(a.len(), out.len(), "adding {} elements to {}", a.len(), out.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::accumulate(cuda, a, out),
        Device::Cpu(cpu) => by_dtype!(a.dtype(), A => by_dtype!(out.dtype(), T => {
            cpu::accumulate::<A, T>(cpu, a, out)
        })),
    }
}

/// out = a in out's dtype.
pub fn convert(ctx: &Ctx, a: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("add", sizes![a, out]);
    assert_eq!(a.len(), out.len(), "converting {} elements to {}", a.len(), out.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::convert(cuda, a, out),
        Device::Cpu(cpu) => by_dtype!(a.dtype(), A => by_dtype!(out.dtype(), T => {
            cpu::convert::<A, T>(cpu, a, out)
        })),
    }
}

/// out += weight * (a - out): the running average of what `a` holds from call to call (V3 report 3.2.3 keeps one of the
/// weights).
pub fn blend(ctx: &Ctx, weight: f32, a: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("add", sizes![a, out]);
    assert_eq!(a.len(), out.len(), "blending {} elements into {}", a.len(), out.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::blend(cuda, weight, a, out),
        Device::Cpu(cpu) => by_dtype!(a.dtype(), A => by_dtype!(out.dtype(), T => {
            cpu::blend::<A, T>(cpu, weight, a, out)
        })),
    }
}
