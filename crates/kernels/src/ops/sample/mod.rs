//! Picks the next token from logits. Temperature 0 is greedy (ties to the lowest id). Otherwise: divide by the
//! temperature, keep the `top_k` most likely (0: all), keep the smallest set of the most likely whose probability
//! reaches `top_p` (1: all), and draw with a random number that is a function of (seed, request, position) alone.

use crate::{Ctx, View, ViewMut};

/// How one row is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Request the row belongs to.
    pub request: u64,
    /// Position of the token drawn.
    pub position: u64,
}

/// tokens i32 [S] and the log-probability f32 [S] (of the untruncated distribution at that temperature; at
/// temperature 0, at temperature 1) of each, from logits f32 [S, V], one `Params` a row.
pub fn sample(ctx: &Ctx, logits: View<'_>, params: &[Params], tokens: ViewMut<'_>, logp: ViewMut<'_>) {
    todo!()
}
