//! Sampling on a GPU. Random numbers are the host's, a number a row; a row that is a contract breach ends the program
//! with the device's assertion.

use super::Params;
use crate::DType::{F32, I32};
use crate::cuda::{Cuda, Grid, Source, args, source};
use crate::ops::launch::int;
use crate::{View, ViewMut};
use hadal_numerics::{Purpose, Rng};

static SOURCE: Source = source!("sample.cu");

/// Largest vocabulary: the weights of so many ids add up in 64 bits.
const VOCABULARY: usize = 1 << 19;

/// See [`super::sample`]; sizes and parameters have been checked.
pub(super) fn sample(cuda: &Cuda, logits: View<'_>, params: &[Params], mut tokens: ViewMut<'_>, mut logp: ViewMut<'_>) {
    let v = logits.len() / params.len();
    assert!(v <= VOCABULARY, "sample: a vocabulary of {v}, on a GPU at most {VOCABULARY}");
    let words: Vec<u32> = params.iter().flat_map(|p| words(p, v)).collect();
    let params = cuda.upload(&words);
    let args = args![logits.ptr(), params.view().ptr(), tokens.ptr(), logp.ptr(), v as i32];
    let rows = words.len() / WORDS;
    cuda.launch(&cuda.kernel(&SOURCE, "sample", &[]), Grid::new([rows as u32, 1, 1], 1024), &args);
}

/// See [`super::finite`]; sizes have been checked.
pub(super) fn finite(cuda: &Cuda, x: View<'_>, mut out: ViewMut<'_>) {
    let (rows, v) = (out.len() as u32, int(x.len() / out.len()));
    let args = args![x.typed_ptr(F32), out.typed_ptr(I32), v];
    cuda.launch(&cuda.kernel(&SOURCE, "sample_finite", &[]), Grid::new([rows, 1, 1], 1024), &args);
}

/// Words of a row.
const WORDS: usize = 6;

/// What the kernel knows of a row.
fn words(p: &Params, v: usize) -> [u32; WORDS] {
    let greedy = p.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { p.temperature };
    let top_k = if p.top_k < v { p.top_k } else { 0 };
    let random = Rng::new(p.seed, Purpose::Sample, p.request).uniform(p.position).to_bits();
    [temperature.to_bits(), p.top_p.to_bits(), top_k as u32, u32::from(greedy), random as u32, (random >> 32) as u32]
}
