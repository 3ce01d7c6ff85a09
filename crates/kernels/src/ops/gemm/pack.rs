//! Panels for the microkernels: parts of an operand, widened to f32 and laid out as the kernel reads them.
//!
//! The kernel multiplies vectors of *lanes* (one operand's outer index, contiguous at each k) by broadcast elements of
//! the other operand, its *rows*. Zeros fill a lane panel up to its width and both panels up to `depth`, so that no
//! call has a shape for which the microkernels would sum in another order.

use super::super::by_dtype;
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

/// A square of this many lanes and steps is transposed at once, in registers.
const SQUARE: usize = 16;

/// Writes the lane panel `dst[k * width + lane]`.
pub fn lanes(op: Operand<'_>, p: Part, width: usize, dst: &mut [f32]) {
    by_dtype!(op.data.dtype(), T => {
        let src = T::of(op.data);
        if op.k_contiguous {
            transposed(src, op.ld, p, width, dst);
        } else {
            for (k, out) in dst.chunks_exact_mut(width).take(p.kc).enumerate() {
                widen(&src[(p.k0 + k) * op.ld + p.first..][..p.count], &mut out[..p.count]);
                out[p.count..].fill(0.0);
            }
        }
    });
    dst[p.kc * width..p.depth * width].fill(0.0);
}

/// Writes the rows and returns their strides (from row to row, from k to k).
pub fn rows(op: Operand<'_>, p: Part, dst: &mut [f32]) -> (usize, usize) {
    by_dtype!(op.data.dtype(), T => {
        let src = T::of(op.data);
        if op.k_contiguous {
            for (r, out) in dst.chunks_exact_mut(p.depth).take(p.count).enumerate() {
                widen(&src[(p.first + r) * op.ld + p.k0..][..p.kc], &mut out[..p.kc]);
                out[p.kc..].fill(0.0);
            }
            (p.depth, 1)
        } else {
            for (k, out) in dst.chunks_exact_mut(p.count).take(p.kc).enumerate() {
                widen(&src[(p.k0 + k) * op.ld + p.first..][..p.count], out);
            }
            dst[p.kc * p.count..p.depth * p.count].fill(0.0);
            (1, p.count)
        }
    })
}

fn widen<T: Elem>(src: &[T], dst: &mut [f32]) {
    for (o, x) in dst.iter_mut().zip(src) {
        *o = x.f32();
    }
}

/// The lane panel of an operand whose lanes lie `ld` apart.
fn transposed<T: Elem>(src: &[T], ld: usize, p: Part, width: usize, dst: &mut [f32]) {
    for l0 in (0..width).step_by(SQUARE) {
        let filled = p.count.saturating_sub(l0).min(SQUARE);
        let whole = if filled == SQUARE { p.kc / SQUARE * SQUARE } else { 0 };
        for k0 in (0..whole).step_by(SQUARE) {
            square(&src[(p.first + l0) * ld + p.k0 + k0..], ld, width, &mut dst[k0 * width + l0..]);
        }
        for k in whole..p.kc {
            let out = &mut dst[k * width + l0..][..SQUARE.min(width - l0)];
            out.fill(0.0);
            for (i, o) in out.iter_mut().take(filled).enumerate() {
                *o = src[(p.first + l0 + i) * ld + p.k0 + k].f32();
            }
        }
    }
}

#[inline]
fn square<T: Elem>(src: &[T], ld: usize, width: usize, dst: &mut [f32]) {
    let mut t = [[0.0f32; SQUARE]; SQUARE];
    for i in 0..SQUARE {
        let row = &src[i * ld..][..SQUARE];
        for k in 0..SQUARE {
            t[k][i] = row[k].f32();
        }
    }
    for k in 0..SQUARE {
        dst[k * width..][..SQUARE].copy_from_slice(&t[k]);
    }
}
