//! What training takes of a GPU's memory, known before the first step: the step itself is run on a device that only
//! counts ([`Cuda::dry`]), so that the figure is that of the code and not of a formula beside it.

use crate::{AdamW, Objective, Trainer};
use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Cpu, Ctx, Device};
use hadal_model::{Model, ModelConfig, Params, Precision, Recompute, Sequence};
use std::sync::Arc;

/// A training step by its sizes.
#[derive(Clone, Debug)]
pub struct StepSize {
    /// The model.
    pub config: ModelConfig,
    /// What it computes in.
    pub precision: Precision,
    /// What backward computes again.
    pub recompute: Recompute,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Sequences of a micro-batch.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub tokens: usize,
    /// What beside cross-entropy is computed.
    pub objective: Objective,
    /// A running average of the weights is kept.
    pub average: bool,
}

/// Bytes of a GPU's memory, the CUDA context and the compiled kernels (some hundred MiB) not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    /// FP32 masters and the copy that is computed with.
    pub weights: usize,
    /// FP32 gradients, those of shared tables once for each use.
    pub gradients: usize,
    /// AdamW's moments, and the average if one is kept.
    pub moments: usize,
    /// Everything else at the fullest moment of a step.
    pub step: usize,
    /// The arena that has room for all of it, holes between buffers included.
    pub total: usize,
}

/// A constant rate of learning changes nothing here, and neither does any other constant.
const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: 1.0 };

/// What `size` takes on a GPU like `like` (None: an H200).
pub fn gpu_memory(like: Option<&Cuda>, host: &Arc<Cpu>, size: &StepSize) -> GpuMemory {
    let ctx = Device::Cuda(Cuda::dry(like, host.clone())).ctx();
    let used = || ctx.device.as_cuda().map_or(0, |cuda| cuda.memory().used);
    let mut model = Model::whole(&ctx, size.config.clone());
    model.recompute = size.recompute;
    let before = used();
    let params = Params::zeros(&ctx, model.layout.clone(), size.precision);
    let weights = used() - before;
    let mut trainer = Trainer::new(&ctx, model, params, ADAMW, size.objective);
    let gradients = trainer.grads().bytes();
    if size.average {
        trainer.keep_average(0.999, None);
    }
    let state = used();
    let moments = state - before - weights - gradients;
    let micro = vec![vec![sequence(size.tokens); size.sequences]; size.micro_batches];
    // The second step finds what the first one left.
    (0..2).for_each(|_| drop(trainer.begin(&ctx, &micro, 1e-3)));
    let memory = ctx.device.as_cuda().map(|cuda| cuda.memory());
    let (peak, total) = memory.map_or((0, 0), |m| (m.peak, m.reached));
    GpuMemory { weights, gradients, moments, step: peak - state, total }
}

/// Bytes of a GPU's memory that are left to kernels and libraries.
pub const BESIDE: usize = 512 << 20;

/// The most that fits of `limit`, if fewer fit where more do.
pub fn most(limit: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut fitting, mut beyond) = (0, limit + 1);
    while beyond - fitting > 1 {
        let middle = fitting + (beyond - fitting) / 2;
        if fits(middle) { fitting = middle } else { beyond = middle }
    }
    fitting
}

/// Tokens that nobody reads.
fn sequence(tokens: usize) -> Sequence {
    Sequence { tokens: vec![0; tokens], targets: vec![0; tokens] }
}

/// Takes the memory of a run in one piece from the GPU that `ctx` is on, if it is on one; an error says what would fit.
pub fn reserve(ctx: &Ctx, size: &StepSize) -> Result<(), String> {
    let Some(cuda) = ctx.device.as_cuda() else { return Ok(()) };
    let needed = |size: &StepSize| gpu_memory(Some(cuda), ctx.host(), size).total;
    // Compiled kernels and the libraries' own come beside the arena.
    let (total, free) = (needed(size), cuda.free_memory().saturating_sub(BESIDE));
    if total <= free {
        cuda.reserve(total);
        return Ok(());
    }
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let all = StepSize { recompute: Recompute::All, ..size.clone() };
    let advice = match most(size.sequences, |sequences| needed(&StepSize { sequences, ..all.clone() }) <= free) {
        0 => "nothing of this model fits: a smaller one, or a shorter sequence".to_string(),
        n => format!("what fits: recompute = \"all\" with {n} sequences of {} at a time", size.tokens),
    };
    Err(format!(
        "{} ({:.1} GiB free): training takes {:.1} GiB with {} sequences of {} at a time and recompute = \"{}\"; {advice}",
        cuda.name(),
        gib(free),
        gib(total),
        size.sequences,
        size.tokens,
        size.recompute.name()
    ))
}

#[cfg(test)]
mod tests {
    use super::most;

    #[test]
    fn the_most_that_fits_is_found() {
        for limit in 1..20 {
            for fitting in 0..=limit {
                assert_eq!(most(limit, |n| n <= fitting), fitting);
            }
        }
    }
}
