//! Rotation on the CPU: cosines and sines come from a table by position, which the device keeps from call to call, for
//! every layer asks for the same; of positions far beyond it they are computed for each token.

use super::Rope;
use crate::buffer::words_mut;
use crate::isa::{Isa, prefetch, vectorised};
use crate::math::sin_cos;
use crate::{Cpu, Elem};
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens per task.
const TOKENS: usize = 64;
/// Pairs rotated at once: loops of a fixed length become vectors however few pairs a head has.
const PAIRS: usize = 16;
/// Heads that are asked for before it is their turn: the parts that are rotated lie apart, which what the CPU fetches on
/// its own does not follow.
const AHEAD: usize = 16;
/// A table has at most so many numbers: 8,192 positions of 32 pairs, 2 MiB.
const TABLE: usize = 1 << 19;
/// A table is made for a call that has a token for so many of its positions.
const WORTH: usize = 8;

/// Cosines and sines of positions 0, 1, ..., as a device's calls last asked for them.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<Arc<Table>>);

/// For each position cosines of all pairs, then sines, times the factor.
#[derive(Debug, Default)]
struct Table {
    inv_freq: Vec<f32>,
    factor: f32,
    positions: usize,
    turns: Vec<f32>,
}

impl Turns {
    /// A table of positions below `end` for `tokens` of them, if it is not too large or too much work for so few.
    fn below(&self, cpu: &Cpu, end: usize, tokens: usize, inv_freq: &[f32], factor: f32) -> Option<Arc<Table>> {
        let row = 2 * inv_freq.len();
        if end > TABLE / row {
            return None;
        }
        // Not held while a table is made: a worker that waits for others may be given a task that asks for one.
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().clone();
        if kept.positions >= end && kept.factor.to_bits() == factor.to_bits() && kept.inv_freq == inv_freq {
            return Some(kept);
        }
        if end > WORTH * tokens {
            return None;
        }
        // A context that grows does not make a table for each of its lengths.
        let positions = end.next_power_of_two().min(TABLE / row);
        let mut turns = vec![0.0; positions * row];
        cpu.chunks_mut(&mut turns, TOKENS * row, |i, rows| {
            for (j, turns) in rows.chunks_mut(row).enumerate() {
                fill(cpu.isa(), (i * TOKENS + j) as f64, inv_freq, f64::from(factor), turns);
            }
        });
        let made = Arc::new(Table { inv_freq: inv_freq.to_vec(), factor, positions, turns });
        *lock() = made.clone();
        Some(made)
    }
}

/// See [`super::apply`].
pub fn apply<T: Elem>(cpu: &Cpu, a: Rope<'_>) {
    let Rope { token_stride, offset, heads, head_stride, factor, interleaved, inverse, .. } = a;
    let (positions, inv_freq) = (a.positions.i32(), a.inv_freq.f32());
    let width = 2 * inv_freq.len();
    if positions.is_empty() || heads == 0 || width == 0 {
        return;
    }
    // Negative ones are larger than any table.
    let end = positions.iter().map(|&p| p as u32).max().map_or(0, |p| p as usize + 1);
    let table = cpu.turns.below(cpu, end, positions.len(), inv_freq, factor);
    // What follows the last rotated element is not this call's.
    let end = (positions.len() - 1) * token_stride + offset + (heads - 1) * head_stride + width;
    let x = &mut T::of_mut(a.x)[..end];
    let ahead = AHEAD.div_ceil(heads);
    cpu.chunks_mut(x, TOKENS * token_stride, |i, tokens| {
        let mut own = vec![0.0; if table.is_some() { 0 } else { width }];
        for (j, &position) in positions[i * TOKENS..].iter().take(TOKENS).enumerate() {
            let first = |j: usize| j * token_stride + offset;
            for next in (0..heads).filter_map(|h| tokens.get(first(j + ahead) + h * head_stride..)) {
                prefetch(&next[..width.min(next.len())]);
            }
            let turns = match &table {
                Some(table) => &table.turns[position as usize * width..][..width],
                None => {
                    fill(cpu.isa(), f64::from(position), inv_freq, f64::from(factor), &mut own);
                    &own
                }
            };
            rotate(cpu.isa(), &mut tokens[first(j)..], heads, head_stride, interleaved, turns, inverse);
        }
    });
}

vectorised! {
    /// Cosines and sines times the factor. The angle is taken in f64: at position 100,000 an f32 angle is off by 4e-3.
    fn fill(isa: Isa, position: f64, inv_freq: &[f32], factor: f64, turns: &mut [f32]) {
        let (cos, sin) = turns.split_at_mut(inv_freq.len());
        for ((cos, sin), &f) in cos.iter_mut().zip(sin).zip(inv_freq) {
            let (s, c) = sin_cos(position * f64::from(f));
            *cos = (c * factor) as f32;
            *sin = (s * factor) as f32;
        }
    }
}

vectorised! {
    /// All heads of a token. Minus the angle is minus the sine, to the bit.
    fn rotate<T: Elem>(
        isa: Isa, token: &mut [T], heads: usize, head_stride: usize, interleaved: bool, turns: &[f32], inverse: bool,
    ) {
        let pairs = turns.len() / 2;
        let sign = if inverse { -1.0 } else { 1.0 };
        let whole = pairs / PAIRS * PAIRS;
        for h in 0..heads {
            let head = &mut token[h * head_stride..][..2 * pairs];
            for i in (0..whole).step_by(PAIRS) {
                rotate_pairs::<T, PAIRS>(head, i, interleaved, turns, sign);
            }
            for i in whole..pairs {
                rotate_pairs::<T, 1>(head, i, interleaved, turns, sign);
            }
        }
    }
}

/// N pairs of a head, from the i-th on.
#[inline(always)]
fn rotate_pairs<T: Elem, const N: usize>(head: &mut [T], i: usize, interleaved: bool, turns: &[f32], sign: f32) {
    let (cos, sin) = turns.split_at(turns.len() / 2);
    let (cos, sin) = (&cos[i..i + N], &sin[i..i + N]);
    if interleaved && T::PARTS == 2 {
        let pairs = &mut words_mut(head).0[i..i + N];
        for j in 0..N {
            let pair = u32::from_le_bytes(pairs[j]);
            pairs[j] = T::word(rotated([T::part(pair, 0), T::part(pair, 1)], cos[j], sign * sin[j])).to_le_bytes();
        }
    } else if interleaved {
        // Read and written in their order in memory, and sorted into sides in between.
        let x = &mut head.as_chunks_mut::<2>().0[i..i + N];
        let mut pairs = [[0.0f32; 2]; N];
        for (old, x) in pairs.as_flattened_mut().iter_mut().zip(x.as_flattened()) {
            *old = x.f32();
        }
        for j in 0..N {
            pairs[j] = rotated(pairs[j], cos[j], sign * sin[j]);
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
            [pairs[0][j], pairs[1][j]] = rotated([pairs[0][j], pairs[1][j]], cos[j], sign * sin[j]);
        }
        left.iter_mut().zip(&pairs[0]).for_each(|(x, y)| *x = T::round(*y));
        right.iter_mut().zip(&pairs[1]).for_each(|(x, y)| *x = T::round(*y));
    }
}

#[inline(always)]
fn rotated([a, b]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}
