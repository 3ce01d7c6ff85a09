//! What training holds on one rank, by part.

use super::Activations;
use crate::{Layout, Precision};
use hadal_kernels::DType;

/// What a process holds beside a model and its activations: program and libraries, tokens and tokenizer, the workers'
/// panels but for what grows with the sequence. Measured, and of little weight (`runs/memory`).
const PROCESS: usize = 48 << 20;

/// Bytes that training holds on one rank at the fullest moment of a step, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingMemory {
    /// FP32 master weights.
    pub masters: usize,
    /// The compute copy; 0 where the masters are computed with.
    pub compute: usize,
    /// FP32 gradients, with a buffer for each further use of embedding and head.
    pub gradients: usize,
    /// Both of AdamW's moments.
    pub moments: usize,
    /// What forward saves for backward, and what is held beyond that.
    pub activations: Activations,
    /// The process itself, and what its workers hold each for itself.
    pub process: usize,
}

impl TrainingMemory {
    /// For the part of a model that `layout` covers; `activations` as predicted for the whole or measured.
    pub fn of(layout: &Layout, precision: Precision, moments: DType, activations: Activations) -> Self {
        let f32 = DType::F32.size();
        let shared: usize = [layout.embedding, layout.head].into_iter().flatten().map(|id| layout.info(id).len()).sum();
        Self {
            masters: layout.len * f32,
            compute: if precision == Precision::Bf16 { layout.len * DType::Bf16.size() } else { 0 },
            gradients: (layout.len + layout.scope.mtp * shared) * f32,
            moments: 2 * layout.len * moments.size(),
            activations,
            process: PROCESS + activations.workers,
        }
    }

    /// Parameters, gradients and optimiser state.
    pub fn state(&self) -> usize {
        self.masters + self.compute + self.gradients + self.moments
    }

    /// All parts.
    pub fn total(&self) -> usize {
        self.state() + self.activations.total() + self.process
    }
}
