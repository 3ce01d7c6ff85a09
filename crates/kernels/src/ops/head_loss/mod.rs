//! The output head fused with what losses need of it. Logits exist one slice of the vocabulary at a time, or on the host's cores,
//! where both directions are computed at once, for [`tokens_at_once`] tokens at a time:
//! z = hidden W^T / temperature; logp = `z[target]` - lse; entropy = lse - sum_j p_j z_j; plus, on request, the
//! log-probabilities at G given ids per token and the K most likely ids. Softmax and sums are f32 (f64 where sums are
//! long), in a fixed order that does not depend on the batch. A target of -1 means none: logp is 0 and gets no
//! gradient. Where hidden and W are bf16, the gradients of z are rounded to bf16 for their products with them.
//!
//! The backward pass takes the gradient of each output, so that a loss is a weighted sum chosen by the caller: dz_j =
//! d_logp (1`[j = target]` - p_j) - d_entropy p_j (z_j - lse + entropy) + sum_g d_given_g (1`[j = given_g]` - p_j).

mod cpu;
mod cuda;
mod gradient;
#[cfg(test)]
mod reference;
mod sm90;
#[cfg(test)]
mod tests;

use crate::sizes::sizes;
use crate::{Ctx, Device, View, ViewMut, Weight};
use std::ops::Range;

/// What both directions read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[N, D]`.
    pub hidden: View<'a>,
    /// `[V, D]`.
    pub weight: Weight<'a>,
    /// i32 `[N]`, -1 for none.
    pub targets: View<'a>,
    /// Logits are divided by this (> 0).
    pub temperature: f32,
    /// i32 `[N, G]` ids in 0..V.
    pub given: Option<View<'a>>,
}

/// What forward writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// f32 `[N]`: log-sum-exp of z; backward reads it.
    pub lse: ViewMut<'a>,
    /// f32 `[N]`.
    pub logp: ViewMut<'a>,
    /// f32 `[N]`, nats.
    pub entropy: ViewMut<'a>,
    /// f32 `[N, G]`; required when ids are given.
    pub given_logp: Option<ViewMut<'a>>,
    /// (i32 `[N, K]`, f32 `[N, K]`): ids and log-probabilities of the K most likely, descending, ties to the lowest id.
    pub top: Option<(ViewMut<'a>, ViewMut<'a>)>,
}

/// Log-probabilities, entropy and top-k without ever forming all logits.
pub fn forward(ctx: &Ctx, x: Inputs<'_>, out: Outputs<'_>) {
    let _timer = ctx.timer("head_loss forward", sizes![x.hidden, x.weight, x.targets, x.given, out.top]);
    let n = x.check();
    out.check(&x, n);
    if n == 0 {
        return;
    }
    match &ctx.device {
        Device::Cpu(cpu) => cpu::forward(ctx, cpu, x, out),
        Device::Cuda(cuda) => cuda::forward(ctx, cuda, x, out),
    }
}

/// Gradients: those of forward's outputs, and where those of hidden and weight go. The weight's may be computed later and
/// apart from the input's (deferral): either may be absent, and the bits of each do not depend on the other's presence.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// f32 `[N]`.
    pub d_logp: View<'a>,
    /// f32 `[N]`.
    pub d_entropy: Option<View<'a>>,
    /// f32 `[N, G]`.
    pub d_given: Option<View<'a>>,
    /// `[N, D]`, overwritten.
    pub d_hidden: Option<ViewMut<'a>>,
    /// f32 `[V, D]`, and whether it is accumulated into or overwritten. The sums over blocks of tokens (on the host's cores of
    /// [`tokens_at_once`]) are added one after the other.
    pub d_weight: Option<(ViewMut<'a>, bool)>,
}

/// What backward reads and writes.
#[derive(Debug)]
pub struct Backward<'a> {
    /// f32 `[N]`, the forward's.
    pub lse: View<'a>,
    /// f32 `[N]`, the forward's (read only if `d_entropy` is given).
    pub entropy: View<'a>,
    /// What is wanted.
    pub gradients: Gradients<'a>,
}

/// Gradients of hidden and weight; logits are recomputed slice by slice.
pub fn backward(ctx: &Ctx, x: Inputs<'_>, mut b: Backward<'_>) {
    let d = &mut b.gradients;
    let _timer =
        ctx.timer("head_loss backward", sizes![x.hidden, x.weight, x.targets, x.given, d.d_hidden, d.d_weight]);
    let n = x.check();
    d.check(&x, n);
    assert_eq!(b.lse.len(), n, "head_loss backward: lse of {} elements, expected N = {n}", b.lse.len());
    if d.d_entropy.is_some() {
        let len = b.entropy.len();
        assert_eq!(len, n, "head_loss backward: entropy of {len} elements, expected N = {n}");
    }
    // A GPU takes the tokens in turns, and adds each turn's share.
    if let Some((w, accumulate @ false)) = &mut d.d_weight
        && (n == 0 || ctx.device.as_cuda().is_some())
    {
        w.reborrow().clear();
        *accumulate = true;
    }
    if n == 0 || (d.d_hidden.is_none() && d.d_weight.is_none()) {
        return;
    }
    match &ctx.device {
        Device::Cpu(cpu) => cpu::backward(ctx, cpu, x, b),
        Device::Cuda(cuda) => cuda::backward(ctx, cuda, x, b),
    }
}

/// [`forward`] and [`backward`], where the gradients of the outputs are known before: the same bits. On the host's cores
/// logits are computed once, those of [`tokens_at_once`] tokens at a time.
pub fn forward_backward(ctx: &Ctx, x: Inputs<'_>, mut out: Outputs<'_>, d: Gradients<'_>) {
    let n = x.check();
    out.check(&x, n);
    d.check(&x, n);
    match &ctx.device {
        Device::Cpu(cpu) if n > 0 => {
            let of = sizes![x.hidden, x.weight, x.targets, x.given, d.d_hidden, d.d_weight];
            let _timer = ctx.timer("head_loss forward and backward", of);
            cpu::forward_backward(ctx, cpu, x, out, d);
        }
        _ => {
            forward(ctx, x, out.of(&(0..n), n));
            backward(ctx, x, Backward { lse: out.lse.as_view(), entropy: out.entropy.as_view(), gradients: d });
        }
    }
}

/// Of N tokens over V ids, those whose logits [`forward_backward`] holds at once on the host's cores: 64 MiB of logits, or 256
/// tokens if these have more.
pub fn tokens_at_once(n: usize, v: usize) -> usize {
    cpu::tokens_at_once(n, v)
}

/// out (f32 `[N]`) = `weight` where there is a target, else 0: the gradient of `weight` times the sum of all logp.
pub fn target_weights(ctx: &Ctx, targets: View<'_>, weight: f32, out: ViewMut<'_>) {
    let _timer = ctx.timer("head_loss target weights", sizes![targets, out]);
    assert_eq!(out.len(), targets.len(), "head_loss target weights: out and targets differ in size");
    if out.is_empty() {
        return;
    }
    match &ctx.device {
        Device::Cpu(_) => cpu::target_weights(targets, weight, out),
        Device::Cuda(cuda) => cuda::target_weights(cuda, targets, weight, out),
    }
}

/// The rows of some of `n` tokens.
fn rows_of<'a>(view: View<'a>, tokens: &Range<usize>, n: usize) -> View<'a> {
    let each = view.len().checked_div(n).unwrap_or(0);
    view.slice(tokens.start * each..tokens.end * each)
}

fn rows_of_mut<'a>(view: &'a mut ViewMut<'_>, tokens: &Range<usize>, n: usize) -> ViewMut<'a> {
    let each = view.len().checked_div(n).unwrap_or(0);
    view.reborrow().slice(tokens.start * each..tokens.end * each)
}

impl Outputs<'_> {
    #[track_caller]
    fn check(&self, x: &Inputs<'_>, n: usize) {
        let v = x.weight.rows;
        for (name, len) in [("lse", self.lse.len()), ("logp", self.logp.len()), ("entropy", self.entropy.len())] {
            assert_eq!(len, n, "head_loss forward: {name} of {len} elements, expected N = {n}");
        }
        let (given, picked) = (x.given.map(|g| g.len()), self.given_logp.as_ref().map(|g| g.len()));
        assert_eq!(given, picked, "head_loss forward: given ids and given_logp differ in size (N = {n})");
        if let Some((ids, logp)) = &self.top {
            let k = per_row("top", ids.len(), n);
            assert_eq!(ids.len(), logp.len(), "head_loss forward: top ids and top logp differ in size (N = {n})");
            assert!(k <= v, "head_loss forward: the {k} most likely of {v} ids");
        }
    }

    /// Those of some of `n` tokens.
    fn of(&mut self, tokens: &Range<usize>, n: usize) -> Outputs<'_> {
        let [lse, logp, entropy] =
            [&mut self.lse, &mut self.logp, &mut self.entropy].map(|view| rows_of_mut(view, tokens, n));
        let given_logp = self.given_logp.as_mut().map(|view| rows_of_mut(view, tokens, n));
        let top = self.top.as_mut().map(|(ids, z)| (rows_of_mut(ids, tokens, n), rows_of_mut(z, tokens, n)));
        Outputs { lse, logp, entropy, given_logp, top }
    }
}

impl Gradients<'_> {
    #[track_caller]
    fn check(&self, x: &Inputs<'_>, n: usize) {
        let (v, d) = (x.weight.rows, x.weight.cols);
        for (name, len) in [("d_logp", Some(self.d_logp.len())), ("d_entropy", self.d_entropy.map(|d| d.len()))] {
            assert_eq!(len.unwrap_or(n), n, "head_loss backward: {name} of {len:?} elements, expected N = {n}");
        }
        if let Some(dg) = self.d_given {
            let g = x.given.map(|g| g.len());
            assert_eq!(Some(dg.len()), g, "head_loss backward: d_given and given ids differ in size (N = {n})");
        }
        if let Some(h) = &self.d_hidden {
            assert_eq!(h.len(), n * d, "head_loss backward: d_hidden of {} elements, expected [{n}, {d}]", h.len());
        }
        if let Some((w, _)) = &self.d_weight {
            assert_eq!(w.len(), v * d, "head_loss backward: d_weight of {} elements, expected [{v}, {d}]", w.len());
        }
    }

    /// Those of some of `n` tokens; the weight's are added to those of the tokens before.
    fn of(&mut self, tokens: &Range<usize>, n: usize) -> Gradients<'_> {
        Gradients {
            d_logp: rows_of(self.d_logp, tokens, n),
            d_entropy: self.d_entropy.map(|view| rows_of(view, tokens, n)),
            d_given: self.d_given.map(|view| rows_of(view, tokens, n)),
            d_hidden: self.d_hidden.as_mut().map(|view| rows_of_mut(view, tokens, n)),
            d_weight: self.d_weight.as_mut().map(|(w, accumulate)| (w.reborrow(), *accumulate || tokens.start > 0)),
        }
    }
}

impl<'a> Inputs<'a> {
    /// Those of some tokens.
    fn of(&self, tokens: &Range<usize>) -> Self {
        let rows = |view: View<'a>| rows_of(view, tokens, self.targets.len());
        Self { hidden: rows(self.hidden), targets: rows(self.targets), given: self.given.map(rows), ..*self }
    }

    /// Panics unless sizes fit and, where the host can look, ids are in range; returns N.
    #[track_caller]
    fn check(&self) -> usize {
        let (n, v, d) = (self.targets.len(), self.weight.rows, self.weight.cols);
        assert_eq!(self.weight.experts, 1, "head_loss: a stack of {} weights", self.weight.experts);
        assert!(v > 0 && d > 0, "head_loss: weight [{v}, {d}]");
        assert_eq!(
            self.hidden.len(),
            n * d,
            "head_loss: hidden of {} elements, expected [{n}, {d}]",
            self.hidden.len()
        );
        let t = self.temperature;
        assert!(t > 0.0 && t.is_finite(), "head_loss: temperature {t}, expected a finite positive number");
        check_ids("target", self.targets, -1, v);
        if let Some(given) = self.given {
            per_row("given ids", given.len(), n);
            check_ids("given id", given, 0, v);
        }
        n
    }
}

/// Columns of a buffer of `len` elements in `n` rows.
#[track_caller]
fn per_row(name: &str, len: usize, n: usize) -> usize {
    let k = len.checked_div(n).unwrap_or(0);
    assert_eq!(k * n, len, "head_loss: {name} of {len} elements is not a matrix of N = {n} rows");
    k
}

#[track_caller]
fn check_ids(name: &str, ids: View<'_>, lowest: i32, v: usize) {
    if !ids.is_host() {
        return;
    }
    let ids = ids.i32();
    if let Some(i) = ids.iter().position(|&id| id < lowest || id as i64 >= v as i64) {
        panic!("head_loss: {name} [{i}] is {}, expected {lowest}..{v}", ids[i]);
    }
}
