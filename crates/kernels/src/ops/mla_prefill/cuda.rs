//! Attention on a GPU: Hopper's own kernels where they take the case, else those for any GPU and head dims.

use super::{Backward, Inputs, Shape, any, sm90_backward, sm90_forward};
use crate::ViewMut;
use crate::cuda::Cuda;

/// See [`super::forward`].
pub(super) fn forward(cuda: &Cuda, shape: Shape, x: &Inputs<'_>, out: ViewMut<'_>, lse: ViewMut<'_>) {
    if sm90_forward::supports(cuda, &shape, x, &out) {
        sm90_forward::forward(cuda, shape, x, out, lse);
    } else {
        any::forward(cuda, shape, x, out, lse);
    }
}

/// See [`super::backward`].
pub(super) fn backward(cuda: &Cuda, shape: Shape, x: &Inputs<'_>, b: Backward<'_>) {
    if sm90_backward::supports(cuda, &shape, x, &b) {
        sm90_backward::backward(cuda, &shape, x, b);
    } else {
        any::backward(cuda, shape, x, b);
    }
}
