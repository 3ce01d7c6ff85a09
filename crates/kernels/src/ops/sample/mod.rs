//! Picks the next token from logits. Temperature 0 is greedy (ties to the lowest id). Otherwise: divide by the
//! temperature; keep the `top_k` most likely (0: all); of these keep the smallest set of the most likely whose
//! probability among these reaches `top_p` (1: all, and never fewer than one); and draw from what is left with a random
//! number that is a function of (seed, request, position) alone, taking the first id, in ascending order, at which the
//! cumulative probability exceeds it. Ties in rank go to the lowest id.
//!
//! A logit of minus infinity is a forbidden id. A NaN, plus infinity or a row that forbids everything is a contract
//! breach: the model upstream has diverged, and a token drawn from it would hide that. A CPU panics and names the row,
//! a GPU stops with an assertion of the device, which ends the process. [`finite`] tells such rows before.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut};

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

/// tokens i32 `[S]` and the log-probability f32 `[S]` (of the untruncated distribution at that temperature; at
/// temperature 0, at temperature 1) of each, from logits f32 `[S, V]`, one `Params` a row.
pub fn sample(ctx: &Ctx, logits: View<'_>, params: &[Params], tokens: ViewMut<'_>, logp: ViewMut<'_>) {
    let _timer = ctx.timer("sample", sizes![logits, params, tokens, logp]);
    let (s, l) = (params.len(), logits.len());
    let sizes = (tokens.len(), logp.len());
    assert_eq!(sizes, (s, s), "sample: tokens and logp of {sizes:?} elements for S = {s} rows");
    if s == 0 {
        assert_eq!(l, 0, "sample: logits of {l} elements for S = 0 rows");
        return;
    }
    assert!(l > 0 && l.is_multiple_of(s), "sample: logits of {l} elements for S = {s} rows");
    for (r, p) in params.iter().enumerate() {
        let (t, top_p) = (p.temperature, p.top_p);
        assert!(
            t >= 0.0 && t.is_finite(),
            "sample: row {r} has temperature {t}, expected 0 or a finite positive number"
        );
        assert!((0.0..=1.0).contains(&top_p), "sample: row {r} has top_p {top_p}, expected 0..=1");
    }
    match &ctx.device {
        Device::Cuda(cuda) => cuda::sample(cuda, logits, params, tokens, logp),
        Device::Cpu(cpu) => cpu::sample(cpu, logits.f32(), params, tokens.i32(), logp.f32()),
    }
}

/// `out[r]` (i32 `[S]`) = 1 if every element of row r of x, f32 `[S, V]`, is finite, else 0.
pub fn finite(ctx: &Ctx, x: View<'_>, out: ViewMut<'_>) {
    let _timer = ctx.timer("sample finite", sizes![x, out]);
    let (s, l) = (out.len(), x.len());
    if s == 0 {
        assert_eq!(l, 0, "sample: {l} elements for S = 0 rows");
        return;
    }
    assert!(l > 0 && l.is_multiple_of(s), "sample: {l} elements for S = {s} rows");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::finite(cuda, x, out),
        Device::Cpu(cpu) => cpu::finite(cpu, x.f32(), out.i32()),
    }
}
