//! SwiGLU on the cores, in blocks of rows; every element is on its own, so the cut changes no bits.

use super::lines;
use crate::buffer::{words, words_mut};
use crate::isa::{Job, Lanes, Level};
use crate::math::sigmoid_fused;
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
            let done = lines::forward(cpu.isa(), x, y);
            if done < width {
                cpu.isa().run(ForwardRow { x, y, done });
            }
        }
    });
}

/// The elements behind those that are done.
struct ForwardRow<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
    done: usize,
}

impl<T: Elem> Job for ForwardRow<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (gate, up) = self.x.split_at(self.y.len());
        let (gate, up, y) = (&gate[self.done..], &up[self.done..], &mut self.y[self.done..]);
        // Two elements at a time take more registers than the narrowest level has.
        let whole = if V::LEVEL == Level::Portable { 0 } else { y.len() / T::PARTS * T::PARTS };
        let (y, y_tail) = y.split_at_mut(whole);
        let ((gate, gate_tail), (up, up_tail)) = (gate.split_at(whole), up.split_at(whole));
        let (y, gate, up) = (words_mut(y).0, words(gate).0, words(up).0);
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            let (gate, up) = (u32::from_le_bytes(*gate), u32::from_le_bytes(*up));
            let mut parts = [0.0; 2];
            for i in 0..T::PARTS {
                parts[i] = forward_element(V::FMA, T::part(gate, i), T::part(up, i));
            }
            *y = T::word(parts).to_le_bytes();
        }
        for ((y, gate), up) in y_tail.iter_mut().zip(gate_tail).zip(up_tail) {
            *y = T::round(forward_element(V::FMA, gate.f32(), up.f32()));
        }
    }
}

#[inline(always)]
fn forward_element(fused: bool, gate: f32, up: f32) -> f32 {
    gate * sigmoid_fused(fused, gate) * up
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
                backward_row(cpu, dy, x, 1.0);
            }
        });
    };
    let mut pairs: Vec<_> = gate_up.chunks_mut(block * 2 * width).zip(d_weights[..rows].chunks_mut(block)).collect();
    cpu.chunks2_mut((dy, block * width), (&mut pairs, 1), |b, dy, pair| {
        let (x, d_weights) = &mut pair[0];
        let rows = dy.chunks_exact_mut(width).zip(x.chunks_exact_mut(2 * width)).zip(d_weights.iter_mut());
        for (((dy, x), d), &weight) in rows.zip(&weights[b * block..]) {
            *d = backward_row(cpu, dy, x, weight);
        }
    });
}

/// dy . y of a row, and in its place what [`backward`] says.
fn backward_row<T: Elem>(cpu: &Cpu, dy: &mut [T], x: &mut [T], weight: f32) -> f32 {
    let (done, dot) = lines::backward(cpu.isa(), dy, x, weight);
    let mut rest = 0.0;
    if done < dy.len() {
        cpu.isa().run(BackwardRow { dy, x, done, weight, dot: &mut rest });
    }
    dot + rest
}

/// Words computed at once, each with sums of its own for a dot product.
const WORDS: usize = 16;

/// The elements behind those that are done; their dy . y goes to `dot`.
struct BackwardRow<'a, T> {
    dy: &'a mut [T],
    x: &'a mut [T],
    done: usize,
    weight: f32,
    dot: &'a mut f32,
}

impl<T: Elem> Job for BackwardRow<'_, T> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let weight = self.weight;
        let (gate, up) = self.x.split_at_mut(self.dy.len());
        let (gate, up, dy) = (&mut gate[self.done..], &mut up[self.done..], &mut self.dy[self.done..]);
        let whole = dy.len() / (WORDS * T::PARTS) * (WORDS * T::PARTS);
        let (dy, dy_tail) = dy.split_at_mut(whole);
        let ((gate, gate_tail), (up, up_tail)) = (gate.split_at_mut(whole), up.split_at_mut(whole));
        let blocks = |x| words_mut::<T>(x).0.as_chunks_mut::<WORDS>().0;
        let mut sums = [[0.0f32; WORDS]; 2];
        for ((dy, gate), up) in blocks(dy).iter_mut().zip(blocks(gate)).zip(blocks(up)) {
            for j in 0..WORDS {
                let (g, u, d) = (u32::from_le_bytes(gate[j]), u32::from_le_bytes(up[j]), u32::from_le_bytes(dy[j]));
                let mut out = [[0.0; 2]; 3];
                for i in 0..T::PARTS {
                    let e = backward_element::<T>(V::FMA, T::part(g, i), T::part(u, i), T::part(d, i), weight);
                    (out[0][i], out[1][i], out[2][i]) = (e.gate, e.up, e.y);
                    sums[i][j] += e.dot;
                }
                [gate[j], up[j], dy[j]] = out.map(|parts| T::word(parts).to_le_bytes());
            }
        }
        let tail = dy_tail.iter_mut().zip(gate_tail).zip(up_tail);
        for (sum, ((dy, gate), up)) in sums.as_flattened_mut().iter_mut().zip(tail) {
            let e = backward_element::<T>(V::FMA, gate.f32(), up.f32(), dy.f32(), weight);
            (*gate, *up, *dy) = (T::round(e.gate), T::round(e.up), T::round(e.y));
            *sum += e.dot;
        }
        *self.dot = sums.as_flattened().iter().sum();
    }
}

/// What [`backward_element`] finds, not yet rounded.
struct Gradient {
    gate: f32,
    up: f32,
    /// weight * y, of y as the forward rounded it.
    y: f32,
    /// dy * y.
    dot: f32,
}

#[inline(always)]
fn backward_element<T: Elem>(fused: bool, g: f32, u: f32, d: f32, weight: f32) -> Gradient {
    let s = sigmoid_fused(fused, g);
    let y = T::round(g * s * u).f32();
    let weighted = d * weight;
    Gradient { gate: weighted * u * (s * (1.0 + g * (1.0 - s))), up: weighted * (g * s), y: weight * y, dot: d * y }
}
