//! One thread an expert.

use crate::DType::I32;
use crate::cuda::{Cuda, Grid, Source, args, source};
use crate::{View, ViewMut};

static SOURCE: Source = source!("expert_load.cu");
const THREADS: u32 = 256;

/// `counts[e]` += `offsets[e + 1]` - `offsets[e]`.
pub(super) fn add(cuda: &Cuda, offsets: View<'_>, mut counts: ViewMut<'_>) {
    let experts = counts.len() as u32;
    let args = args![offsets.typed_ptr(I32), counts.typed_ptr(I32), experts as i32];
    let kernel = cuda.kernel(&SOURCE, "expert_load", &[]);
    cuda.launch(&kernel, Grid::new([experts.div_ceil(THREADS), 1, 1], THREADS), &args);
}
