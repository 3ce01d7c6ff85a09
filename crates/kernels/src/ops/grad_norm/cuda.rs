//! The norm on a GPU: blocks of tensors, then one block that adds them up.

use crate::DType::F32;
use crate::cuda::{Cuda, Grid, Source, args, source};
use crate::{View, ViewMut};
use std::ops::Range;

static SOURCE: Source = source!("grad_norm.cu");
/// Elements of a block, counted from its tensor's start.
const BLOCK: usize = 32_768;

/// out = sqrt(sum over tensors, in order, of their sums of squares).
pub(super) fn norm(cuda: &Cuda, grad: View<'_>, tensors: &[Range<usize>], mut out: ViewMut<'_>) {
    let (mut table, mut blocks) = (Vec::with_capacity(6 * tensors.len()), 0);
    for t in tensors {
        let own = t.len().div_ceil(BLOCK);
        let words = [t.start as u32, (t.start as u64 >> 32) as u32, t.end as u32, (t.end as u64 >> 32) as u32];
        table.extend([blocks as u32, own as u32].iter().chain(&words));
        blocks += own;
    }
    assert!(i32::try_from(blocks).is_ok(), "grad_norm: {} gradients are too many for one launch", grad.len());
    let (table, count) = (cuda.constant(&table), tensors.len() as i32);
    // Pairs of words that hold one f64.
    let [partial, sums] = [blocks, tensors.len()].map(|n| cuda.empty(F32, 2 * n));
    let (partial, sums) = (partial.view().ptr(), sums.view().ptr());
    let squares = cuda.kernel(&SOURCE, "grad_squares", &[]);
    let args = args![grad.typed_ptr(F32), table, count, partial];
    cuda.launch(&squares, Grid::new([blocks as u32, 1, 1], 256), &args);
    let total = cuda.kernel(&SOURCE, "grad_norm", &[]);
    let args = args![table, count, partial, sums, out.typed_ptr(F32)];
    cuda.launch(&total, Grid::new([1, 1, 1], 1024), &args);
}
