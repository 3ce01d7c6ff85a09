//! The gate on a GPU: one warp a token.

use super::{Backward, Config, Forward, GroupScore, Scoring};
use crate::DType::{F32, I32};
use crate::cuda::{Cuda, Grid, Kernel, Source, Value::Int, args, source};
use crate::ops::launch::int;

static SOURCE: Source = source!("router.cu");
/// Tokens of a block.
const WARPS: usize = 8;

/// Scores, choice and weights. A given choice that is no expert's is not refused, as on the host, but its weight is NaN.
pub(super) fn forward(cuda: &Cuda, c: &Config, mut a: Forward<'_>) {
    let n = a.logits.len() / c.experts;
    let args = args![
        a.logits.typed_ptr(F32),
        a.bias.map_or(0, |b| b.typed_ptr(F32)),
        a.given.map_or(0, |g| g.typed_ptr(I32)),
        a.scores.typed_ptr(F32),
        a.indices.typed_ptr(I32),
        a.weights.typed_ptr(F32),
        int(n),
        c.scale,
    ];
    cuda.launch(&kernel(cuda, c, "router_forward"), grid(n), &args);
}

/// Gradient of the logits.
pub(super) fn backward(cuda: &Cuda, c: &Config, mut a: Backward<'_>) {
    let n = a.scores.len() / c.experts;
    let args = args![
        a.scores.typed_ptr(F32),
        a.indices.typed_ptr(I32),
        a.d_weights.typed_ptr(F32),
        a.d_scores.map_or(0, |d| d.typed_ptr(F32)),
        a.d_logits.typed_ptr(F32),
        int(n),
        c.scale,
    ];
    cuda.launch(&kernel(cuda, c, "router_backward"), grid(n), &args);
}

fn grid(n: usize) -> Grid {
    Grid::new([n.div_ceil(WARPS) as u32, 1, 1], WARPS as u32 * 32)
}

fn kernel(cuda: &Cuda, c: &Config, name: &'static str) -> Kernel {
    // A lane holds an expert of every 32, one choice, and the judgement of one group.
    let limited = c.topk_group < c.n_group;
    assert!(
        c.experts <= 1024 && c.top_k <= 32 && (!limited || c.n_group <= 32),
        "router: {c:?}: on a GPU at most 1024 experts, 32 choices and 32 groups"
    );
    // Where no group is left out there might as well be one.
    let (groups, kept) = if limited { (c.n_group, c.topk_group) } else { (1, 1) };
    let flag = |on: bool| Int(i64::from(on));
    let defines = [
        ("EXPERTS", Int(c.experts as i64)),
        ("TOP_K", Int(c.top_k as i64)),
        ("SIGMOID", flag(c.scoring == Scoring::Sigmoid)),
        ("GROUPS", Int(groups as i64)),
        ("TOPK_GROUP", Int(kept as i64)),
        ("TOP_TWO", flag(c.group_score == GroupScore::TopTwo)),
        ("NORM", flag(c.norm_topk_prob)),
    ];
    cuda.kernel(&SOURCE, name, &defines)
}
