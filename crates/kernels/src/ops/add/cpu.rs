//! Elementwise over pieces of the output; the pieces are large enough that starting a task costs little.

use crate::{Cpu, Elem, View, ViewMut};

/// Elements per task.
const PIECE: usize = 1 << 14;

pub fn add<A: Elem, B: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    let (a, b) = (A::of(a), B::of(b));
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| {
        for ((o, a), b) in out.iter_mut().zip(&a[i * PIECE..]).zip(&b[i * PIECE..]) {
            *o = T::round(a.f32() + b.f32());
        }
    });
}

pub fn accumulate<A: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| {
        for (o, a) in out.iter_mut().zip(&a[i * PIECE..]) {
            *o = T::round(o.f32() + a.f32());
        }
    });
}

pub fn convert<A: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| {
        for (o, a) in out.iter_mut().zip(&a[i * PIECE..]) {
            *o = T::round(a.f32());
        }
    });
}

pub fn blend<A: Elem, T: Elem>(cpu: &Cpu, weight: f32, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| {
        for (o, a) in out.iter_mut().zip(&a[i * PIECE..]) {
            *o = T::round(o.f32() + weight * (a.f32() - o.f32()));
        }
    });
}
