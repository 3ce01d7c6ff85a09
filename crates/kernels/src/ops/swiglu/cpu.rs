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

/// In place over the first `rows` rows: y (times its weight) for dy, d_gate_up for gate_up, dy . y beside the weights.
pub fn backward<T: Elem>(
    cpu: &Cpu,
    dy: &mut [T],
    gate_up: &mut [T],
    width: usize,
    rows: usize,
    weights: Option<(&[f32], &mut [f32])>,
) {
    let block = block_rows(width);
    let (dy, gate_up) = (&mut dy[..rows * width], &mut gate_up[..rows * 2 * width]);
    let Some((weights, d_weights)) = weights else {
        return cpu.chunks2_mut((dy, block * width), (gate_up, block * 2 * width), |_, dy, x| {
            for (dy, x) in dy.chunks_exact_mut(width).zip(x.chunks_exact_mut(2 * width)) {
                backward_row(cpu.isa(), dy, x, 1.0);
            }
        });
    };
    let mut pairs: Vec<_> = gate_up.chunks_mut(block * 2 * width).zip(d_weights[..rows].chunks_mut(block)).collect();
    cpu.chunks2_mut((dy, block * width), (&mut pairs, 1), |b, dy, pair| {
        let (x, d_weights) = &mut pair[0];
        let rows = dy.chunks_exact_mut(width).zip(x.chunks_exact_mut(2 * width)).zip(d_weights.iter_mut());
        for (((dy, x), d), &weight) in rows.zip(&weights[b * block..]) {
            *d = backward_row(cpu.isa(), dy, x, weight);
        }
    });
}

/// Independent sums of a dot product.
const LANES: usize = 16;

vectorised! {
    /// Returns dy . y.
    fn backward_row<T: Elem>(isa: Isa, dy: &mut [T], x: &mut [T], weight: f32) -> f32 {
        let (gate, up) = x.split_at_mut(dy.len());
        let (dy, dy_tail) = dy.as_chunks_mut::<LANES>();
        let (gate, gate_tail) = gate.as_chunks_mut::<LANES>();
        let (up, up_tail) = up.as_chunks_mut::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for ((dy, gate), up) in dy.iter_mut().zip(gate).zip(up) {
            for i in 0..LANES {
                lanes[i] += backward_element(&mut dy[i], &mut gate[i], &mut up[i], weight);
            }
        }
        for (((lane, dy), gate), up) in lanes.iter_mut().zip(dy_tail).zip(gate_tail).zip(up_tail) {
            *lane += backward_element(dy, gate, up, weight);
        }
        lanes.iter().sum()
    }
}

/// Returns dy * y.
#[inline(always)]
fn backward_element<T: Elem>(dy: &mut T, gate: &mut T, up: &mut T, weight: f32) -> f32 {
    let (g, u, d) = (gate.f32(), up.f32(), dy.f32());
    let s = sigmoid(g);
    let y = T::round(g * s * u).f32();
    let weighted = d * weight;
    *gate = T::round(weighted * u * (s * (1.0 + g * (1.0 - s))));
    *up = T::round(weighted * (g * s));
    *dy = T::round(weight * y);
    d * y
}
