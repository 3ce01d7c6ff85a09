//! Rotation on the CPU: a token's cosines and sines are computed once and used for all its heads.

use super::Rope;
use crate::isa::{Isa, vectorised};
use crate::math::sin_cos;
use crate::{Cpu, Elem};

/// Tokens per task.
const TOKENS: usize = 16;
/// Pairs rotated at once: loops of a fixed length become vectors however few pairs a head has.
const PAIRS: usize = 16;

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
        let (mut cos, mut sin) = (vec![0.0; width / 2], vec![0.0; width / 2]);
        for (token, &position) in tokens.chunks_mut(token_stride).zip(&positions[i * TOKENS..]) {
            let position = f64::from(position) * if inverse { -1.0 } else { 1.0 };
            fill(cpu.isa(), position, inv_freq, f64::from(factor), &mut cos, &mut sin);
            rotate(cpu.isa(), &mut token[offset..], heads, head_stride, interleaved, &cos, &sin);
        }
    });
}

vectorised! {
    /// Cosines and sines times the factor. The angle is taken in f64: at position 100,000 an f32 angle is off by 4e-3.
    fn fill(isa: Isa, position: f64, inv_freq: &[f32], factor: f64, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), &f) in cos.iter_mut().zip(sin).zip(inv_freq) {
            let (s, c) = sin_cos(position * f64::from(f));
            *cos = (c * factor) as f32;
            *sin = (s * factor) as f32;
        }
    }
}

vectorised! {
    /// All heads of a token.
    fn rotate<T: Elem>(
        isa: Isa, token: &mut [T], heads: usize, head_stride: usize, interleaved: bool, cos: &[f32], sin: &[f32],
    ) {
        let pairs = cos.len();
        let whole = pairs / PAIRS * PAIRS;
        for h in 0..heads {
            let head = &mut token[h * head_stride..][..2 * pairs];
            for i in (0..whole).step_by(PAIRS) {
                rotate_pairs::<T, PAIRS>(head, i, interleaved, cos, sin);
            }
            for i in whole..pairs {
                rotate_pairs::<T, 1>(head, i, interleaved, cos, sin);
            }
        }
    }
}

/// N pairs of a head, from the i-th on.
#[inline(always)]
fn rotate_pairs<T: Elem, const N: usize>(head: &mut [T], i: usize, interleaved: bool, cos: &[f32], sin: &[f32]) {
    let (cos, sin) = (&cos[i..i + N], &sin[i..i + N]);
    if interleaved {
        // Read and written in their order in memory, and sorted into sides in between.
        let x = &mut head.as_chunks_mut::<2>().0[i..i + N];
        let mut pairs = [[0.0f32; 2]; N];
        for (old, x) in pairs.as_flattened_mut().iter_mut().zip(x.as_flattened()) {
            *old = x.f32();
        }
        for j in 0..N {
            pairs[j] = rotated(pairs[j], cos[j], sin[j]);
        }
        for (x, pair) in x.as_flattened_mut().iter_mut().zip(pairs.as_flattened()) {
            *x = T::round(*pair);
        }
    } else {
        let (left, right) = head.split_at_mut(head.len() / 2);
        let (left, right) = (&mut left[i..i + N], &mut right[i..i + N]);
        let mut pairs = [[0.0f32; N]; 2];
        for j in 0..N {
            (pairs[0][j], pairs[1][j]) = (left[j].f32(), right[j].f32());
        }
        for j in 0..N {
            [pairs[0][j], pairs[1][j]] = rotated([pairs[0][j], pairs[1][j]], cos[j], sin[j]);
        }
        left.iter_mut().zip(&pairs[0]).for_each(|(x, y)| *x = T::round(*y));
        right.iter_mut().zip(&pairs[1]).for_each(|(x, y)| *x = T::round(*y));
    }
}

#[inline(always)]
fn rotated([a, b]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}
