//! Rotation on the CPU: a token's cosines and sines are computed once and used for all its heads.

use super::Rope;
use crate::{Cpu, Elem};

/// Tokens per task.
const TOKENS: usize = 16;

/// See [`super::apply`].
pub fn apply<T: Elem>(cpu: &Cpu, a: Rope<'_>) {
    let Rope { token_stride, offset, heads, head_stride, factor, interleaved, inverse, .. } = a;
    let (positions, inv_freq) = (a.positions.i32(), a.inv_freq.f32());
    let width = 2 * inv_freq.len();
    if positions.is_empty() || heads == 0 || width == 0 {
        return;
    }
    // What follows the last rotated element is not this call's.
    let end = (positions.len() - 1) * token_stride + offset + (heads - 1) * head_stride + width;
    let x = &mut T::of_mut(a.x)[..end];
    cpu.chunks_mut(x, TOKENS * token_stride, |i, tokens| {
        let mut turns = vec![(0.0, 0.0); inv_freq.len()];
        for (token, &position) in tokens.chunks_mut(token_stride).zip(&positions[i * TOKENS..]) {
            fill(&mut turns, position, inv_freq, factor, inverse);
            for h in 0..heads {
                let head = &mut token[offset + h * head_stride..][..width];
                if interleaved {
                    rotate_interleaved(head, &turns);
                } else {
                    rotate_halves(head, &turns);
                }
            }
        }
    });
}

/// (cos, sin) times the factor. The angle is taken in f64: at position 100,000 an f32 angle is off by 4e-3.
fn fill(turns: &mut [(f32, f32)], position: i32, inv_freq: &[f32], factor: f32, inverse: bool) {
    let position = f64::from(if inverse { -position } else { position });
    for (turn, &f) in turns.iter_mut().zip(inv_freq) {
        let (sin, cos) = (position * f64::from(f)).sin_cos();
        *turn = ((cos * f64::from(factor)) as f32, (sin * f64::from(factor)) as f32);
    }
}

fn rotate_interleaved<T: Elem>(head: &mut [T], turns: &[(f32, f32)]) {
    let (pairs, _) = head.as_chunks_mut::<2>();
    for (pair, turn) in pairs.iter_mut().zip(turns) {
        let (a, b) = rotated(pair[0].f32(), pair[1].f32(), *turn);
        *pair = [T::round(a), T::round(b)];
    }
}

fn rotate_halves<T: Elem>(head: &mut [T], turns: &[(f32, f32)]) {
    let (left, right) = head.split_at_mut(turns.len());
    for ((l, r), turn) in left.iter_mut().zip(right).zip(turns) {
        let (a, b) = rotated(l.f32(), r.f32(), *turn);
        (*l, *r) = (T::round(a), T::round(b));
    }
}

#[inline(always)]
fn rotated(a: f32, b: f32, (cos, sin): (f32, f32)) -> (f32, f32) {
    (a * cos - b * sin, a * sin + b * cos)
}
