//! Panels for the microkernels: parts of an operand, widened to f32 and laid out as the kernel reads them.
//!
//! The kernel multiplies vectors of *lanes* (one operand's outer index, contiguous at each k) by broadcast elements of
//! the other operand, its *rows*. Zeros fill a lane panel up to its width and both panels up to `depth`, so that no
//! call has a shape for which the microkernels would sum in another order.

use super::super::by_dtype;
use crate::isa::{Isa, SQUARE, prefetch, transpose, vectorised};
use crate::{Elem, View};

/// op(A) or op(B) seen from its outer index: element (o, k) is at `o * ld + k` if `k_contiguous`, else at `k * ld + o`.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    pub data: View<'a>,
    pub ld: usize,
    pub k_contiguous: bool,
}

/// Which part of an operand: outer indices from `first`, k from `k0`, and how many of each.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub first: usize,
    pub count: usize,
    pub k0: usize,
    pub kc: usize,
    /// kc, or more where the kernel must not be called with so few.
    pub depth: usize,
}

/// Writes the lane panel `dst[k * width + lane]`.
pub fn lanes(isa: Isa, op: Operand<'_>, p: Part, width: usize, dst: &mut [f32]) {
    by_dtype!(op.data.dtype(), T => {
        let src = T::of(op.data);
        if op.k_contiguous {
            transposed(isa, src, op.ld, p, width, dst);
        } else {
            copied(isa, src, op.ld, p, width, dst);
        }
    });
    dst[p.kc * width..p.depth * width].fill(0.0);
}

/// Writes the rows and returns their strides (from row to row, from k to k).
pub fn rows(isa: Isa, op: Operand<'_>, p: Part, dst: &mut [f32]) -> (usize, usize) {
    by_dtype!(op.data.dtype(), T => {
        let src = T::of(op.data);
        if op.k_contiguous {
            // With the roles of k and the rows exchanged: a row per line, filled up to the depth.
            let turned = Part { first: p.k0, count: p.kc, k0: p.first, kc: p.count, depth: p.count };
            copied(isa, src, op.ld, turned, p.depth, dst);
            (p.depth, 1)
        } else {
            copied(isa, src, op.ld, p, p.count, dst);
            dst[p.kc * p.count..p.depth * p.count].fill(0.0);
            (1, p.count)
        }
    })
}

vectorised! {
    /// Copies the `count` elements at each k to lines of `width`, zeros after them.
    fn copied<T: Elem>(isa: Isa, src: &[T], ld: usize, p: Part, width: usize, dst: &mut [f32]) {
        for (k, out) in dst.chunks_exact_mut(width).take(p.kc).enumerate() {
            let (out, rest) = out.split_at_mut(p.count);
            for (o, x) in out.iter_mut().zip(&src[(p.k0 + k) * ld + p.first..][..p.count]) {
                *o = x.f32();
            }
            rest.fill(0.0);
        }
    }
}

/// Steps of k that are staged at once, and the distance of staged lanes.
const STAGE: usize = 256;
const STAGED: usize = STAGE + SQUARE;

vectorised! {
    /// As `copied`, of an operand whose lanes lie `ld` apart. Sixteen lanes at a time are first copied whole to lines a
    /// little apart: read square by square, lanes whose distance is a power of two would evict one another from the
    /// cache.
    fn transposed<T: Elem>(isa: Isa, src: &[T], ld: usize, p: Part, width: usize, dst: &mut [f32]) {
        let mut stage = [0.0f32; SQUARE * STAGED];
        for (l0, s0) in (0..width).step_by(SQUARE).flat_map(|l| (0..p.kc).step_by(STAGE).map(move |s| (l, s))) {
            let len = STAGE.min(p.kc - s0);
            let filled = p.count.saturating_sub(l0).min(SQUARE);
            for (i, line) in stage.chunks_exact_mut(STAGED).enumerate() {
                if i < filled {
                    let (row, next) = src[(p.first + l0 + i) * ld + p.k0 + s0..].split_at(len);
                    prefetch(&next[..len.min(next.len())]);
                    line.iter_mut().zip(row).for_each(|(o, x)| *o = x.f32());
                } else {
                    line[..len].fill(0.0);
                }
            }
            for k0 in (0..len).step_by(SQUARE) {
                let lines = SQUARE.min(len - k0);
                transpose(isa, &stage[k0..], STAGED, &mut dst[(s0 + k0) * width + l0..], width, lines);
            }
        }
    }
}
