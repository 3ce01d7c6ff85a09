//! The complementary sequence-wise balance loss (V3 report, eq. 17-20), in f32 (sums in f64):
//! L_s = sum_i f_i P_i with f_i = E / (K T) * (tokens of the sequence whose top-K of the plain scores, without bias and
//! without groups, holds i) and P_i = mean over its tokens of score_i / sum_j score_j. f has no gradient.
//! Sequence s is tokens `cu[s]`..`cu[s+1]`; an empty one has loss 0. cu starts at 0 and ends at N.
//! A token whose scores are all zero has no share of any expert: it adds nothing to P and gets no gradient.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

/// Arguments of [`forward_backward`].
#[derive(Debug)]
pub struct SeqBalance<'a> {
    /// f32 `[N, E]`.
    pub scores: View<'a>,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// i32 `[S + 1]`.
    pub cu: View<'a>,
    /// f32 `[S]`: d(total loss) / dL_s, alpha and the global normalisation included.
    pub seq_weights: View<'a>,
    /// f32 `[S]`: L_s, without alpha.
    pub loss: ViewMut<'a>,
    /// f32 `[N, E]`: `seq_weights[s]` * dL_s / dscores, overwritten.
    pub d_scores: ViewMut<'a>,
}

/// The loss of each sequence and the weighted gradient of its scores, in one pass.
pub fn forward_backward(ctx: &Ctx, a: SeqBalance<'_>) {
    let _timer =
        ctx.timer("seq_balance", sizes![a.scores, a.experts, a.top_k, a.cu, a.seq_weights, a.loss, a.d_scores]);
    let (experts, sequences) = (a.experts, a.seq_weights.len());
    assert!(0 < a.top_k && a.top_k <= experts, "seq_balance: top {} of {experts} experts", a.top_k);
    assert!(
        a.scores.len().is_multiple_of(experts) && a.d_scores.len() == a.scores.len(),
        "seq_balance: scores {}, d_scores {}, expected [N, {experts}]",
        a.scores.len(),
        a.d_scores.len()
    );
    assert!(
        a.cu.len() == sequences + 1 && a.loss.len() == sequences,
        "seq_balance: {} offsets and {} losses for {sequences} sequences",
        a.cu.len(),
        a.loss.len()
    );
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward_backward(cuda, a),
        Device::Cpu(cpu) => cpu::forward_backward(cpu, a),
    }
}
