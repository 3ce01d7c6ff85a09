//! Elementwise over pieces of the output; the pieces are large enough that starting a task costs little.

use crate::isa::{Isa, vectorised};
use crate::{Cpu, Elem, View, ViewMut};

/// Elements per task.
const PIECE: usize = 1 << 14;

pub fn add<A: Elem, B: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    let (a, b) = (A::of(a), B::of(b));
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| add_piece(cpu.isa(), &a[i * PIECE..], &b[i * PIECE..], out));
}

vectorised! {
    fn add_piece<A: Elem, B: Elem, T: Elem>(isa: Isa, a: &[A], b: &[B], out: &mut [T]) {
        for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
            *o = T::round(a.f32() + b.f32());
        }
    }
}

pub fn accumulate<A: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| accumulate_piece(cpu.isa(), &a[i * PIECE..], out));
}

vectorised! {
    fn accumulate_piece<A: Elem, T: Elem>(isa: Isa, a: &[A], out: &mut [T]) {
        for (o, a) in out.iter_mut().zip(a) {
            *o = T::round(o.f32() + a.f32());
        }
    }
}

pub fn convert<A: Elem, T: Elem>(cpu: &Cpu, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| convert_piece(cpu.isa(), &a[i * PIECE..], out));
}

vectorised! {
    /// out = a, as far as out goes.
    pub(in crate::ops) fn convert_piece<A: Elem, T: Elem>(isa: Isa, a: &[A], out: &mut [T]) {
        for (o, a) in out.iter_mut().zip(a) {
            *o = T::round(a.f32());
        }
    }
}

pub fn blend<A: Elem, T: Elem>(cpu: &Cpu, weight: f32, a: View<'_>, out: ViewMut<'_>) {
    let a = A::of(a);
    cpu.chunks_mut(T::of_mut(out), PIECE, |i, out| blend_piece(cpu.isa(), weight, &a[i * PIECE..], out));
}

vectorised! {
    fn blend_piece<A: Elem, T: Elem>(isa: Isa, weight: f32, a: &[A], out: &mut [T]) {
        for (o, a) in out.iter_mut().zip(a) {
            *o = T::round(o.f32() + weight * (a.f32() - o.f32()));
        }
    }
}
