//! Global L2 norm of the gradient: per tensor, sums of squares over fixed blocks in f64, combined in block order; then
//! the tensors in their global order, so that a split over ranks gives the same bits.

use crate::{Ctx, View, ViewMut};
use std::ops::Range;

/// out[0] (f32 [1]) = sqrt(sum of squares over `tensors`, ranges of grad f32 [P]).
pub fn norm(ctx: &Ctx, grad: View<'_>, tensors: &[Range<usize>], out: ViewMut<'_>) {
    todo!()
}
