//! Sums of squares on the cores. Blocks are counted from each tensor's start, so that neither its place in the arena
//! nor its neighbours change its sum.

use crate::Cpu;
use crate::isa::{Cache, Isa, ask, vectorised};
use std::ops::Range;

const BLOCK: usize = 16_384;
/// Lines are asked for so many bytes before their turn: what the CPU fetches on its own keeps too few on their way.
const AHEAD: usize = 8 << 10;
/// Independent sums within a block, so that the additions overlap and vectorise.
const LANES: usize = 16;

/// out = sqrt(sum over tensors, in order, of their sums of squares).
pub fn norm(cpu: &Cpu, grad: &[f32], tensors: &[Range<usize>], out: &mut f32) {
    let blocks: Vec<Range<usize>> = tensors.iter().flat_map(blocks_of).collect();
    let mut partial = vec![0.0f64; blocks.len()];
    cpu.chunks_mut(&mut partial, 1, |i, sum| sum[0] = sum_of_squares(cpu.isa(), &grad[blocks[i].clone()]));
    let mut rest = partial.as_slice();
    let mut total = 0.0f64;
    for t in tensors {
        let (own, tail) = rest.split_at(t.len().div_ceil(BLOCK));
        total += own.iter().fold(0.0, |sum, p| sum + p);
        rest = tail;
    }
    *out = total.sqrt() as f32;
}

fn blocks_of(tensor: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = tensor.end;
    tensor.clone().step_by(BLOCK).map(move |start| start..end.min(start + BLOCK))
}

vectorised! {
    fn sum_of_squares(isa: Isa, x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            ask(Cache::Second, chunk.as_ptr().cast::<u8>().wrapping_add(AHEAD));
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                let x = f64::from(x);
                *lane += x * x;
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(tail) {
            *lane += f64::from(x) * f64::from(x);
        }
        lanes.iter().sum()
    }
}
