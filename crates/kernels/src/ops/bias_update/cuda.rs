//! One block of threads for a gate.

use crate::DType::{F32, I32};
use crate::cuda::{Cuda, Grid, Source, args, source};
use crate::{View, ViewMut};

static SOURCE: Source = source!("bias_update.cu");

/// `bias[e]` -= gamma * sign(`load[e]` * E - sum of load).
pub(super) fn step(cuda: &Cuda, load: View<'_>, gamma: f32, mut bias: ViewMut<'_>) {
    let args = args![load.typed_ptr(I32), bias.typed_ptr(F32), bias.len() as i32, gamma];
    cuda.launch(&cuda.kernel(&SOURCE, "bias_update", &[]), Grid::new([1, 1, 1], 256), &args);
}
