//! SwiGLU on the cores, in blocks of rows; every element is on its own, so the cut changes no bits.

use crate::isa::{Isa, vectorised};
use crate::math::sigmoid;
use crate::{Cpu, Elem};

/// Rows of one task: about 16,384 outputs.
fn block_rows(width: usize) -> usize {
    (16_384 / width).max(1)
}

/// Writes the first `rows` rows of y (all if there are fewer).
pub fn forward<T: Elem>(cpu: &Cpu, gate_up: &[T], width: usize, rows: usize, y: &mut [T]) {
    let live = rows.saturating_mul(width).min(y.len());
    let block = block_rows(width);
    cpu.chunks_mut(&mut y[..live], block * width, |b, y| {
        let inputs = gate_up[b * block * 2 * width..].chunks_exact(2 * width);
        for (y, x) in y.chunks_exact_mut(width).zip(inputs) {
            forward_row(cpu.isa(), x, y);
        }
    });
}

vectorised! {
    fn forward_row<T: Elem>(isa: Isa, x: &[T], y: &mut [T]) {
        let (gate, up) = x.split_at(y.len());
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            let g = g.f32();
            *y = T::round(g * sigmoid(g) * u.f32());
        }
    }
}

/// Writes the first `rows` rows of d_gate_up (all if there are fewer).
pub fn backward<T: Elem>(cpu: &Cpu, dy: &[T], gate_up: &[T], width: usize, rows: usize, d_gate_up: &mut [T]) {
    let live = rows.saturating_mul(2 * width).min(d_gate_up.len());
    let block = block_rows(width);
    cpu.chunks_mut(&mut d_gate_up[..live], block * 2 * width, |b, d| {
        let inputs = gate_up[b * block * 2 * width..].chunks_exact(2 * width);
        let grads = dy[b * block * width..].chunks_exact(width);
        for ((d, x), dy) in d.chunks_exact_mut(2 * width).zip(inputs).zip(grads) {
            backward_row(cpu.isa(), dy, x, d);
        }
    });
}

vectorised! {
    fn backward_row<T: Elem>(isa: Isa, dy: &[T], x: &[T], d: &mut [T]) {
        let (d_gate, d_up) = d.split_at_mut(dy.len());
        let (gate, up) = x.split_at(dy.len());
        for ((((dg, du), g), u), dy) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dy) {
            let (g, u, dy) = (g.f32(), u.f32(), dy.f32());
            let s = sigmoid(g);
            *dg = T::round(dy * u * (s * (1.0 + g * (1.0 - s))));
            *du = T::round(dy * (g * s));
        }
    }
}
