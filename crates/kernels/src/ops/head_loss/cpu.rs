//! All cores. The vocabulary is walked in slices of a fixed width: in forward for all tokens at once, in backward for blocks of
//! them, of which the logits over all slices exist where both directions are computed at once. A row's sums are
//! 16 interleaved f32 lanes within a slice and f64 across slices, in slice order: they depend on the row, the weight and
//! nothing else of the batch. Non-finite logits give non-finite outputs.

mod logits;
mod picks;
mod row;

use super::gradient::row_gradients;
use super::{Backward, Gradients, Inputs, Outputs};
use crate::ops::by_dtype;
use crate::{Cpu, Ctx, DType, Elem, View, ViewMut, bf16};
#[cfg(test)]
pub(super) use logits::SLICE;
use logits::{Logits, position, slices, times_weight, transposed_times_hidden};
use picks::{merge_top, pick};
use row::Row;
use std::ops::Range;

/// Rows of one task.
const ROWS: usize = 16;
/// Logits of a block of tokens, unless `TOKENS` have more: 64 MiB. Tests are to have several blocks.
const LOGITS: usize = if cfg!(test) { 1 << 12 } else { 1 << 24 };
/// For each block the weight's gradient is read and written again, which takes long beside the products of fewer tokens.
const TOKENS: usize = 256;

/// See the module's contract; sizes have been checked.
pub(super) fn forward(ctx: &Ctx, cpu: &Cpu, x: Inputs<'_>, out: Outputs<'_>) {
    let mut logits = Logits::new(cpu, x.targets.len(), x.weight.rows, false);
    statistics(ctx, cpu, &x, out, &mut logits);
}

fn statistics(ctx: &Ctx, cpu: &Cpu, x: &Inputs<'_>, mut out: Outputs<'_>, logits: &mut Logits) {
    let targets = x.targets.i32();
    let scale = 1.0 / x.temperature;
    let mut rows = vec![Row::default(); targets.len()];
    for ids in slices(x.weight.rows) {
        let mut logits = logits.slice(targets.len(), &ids);
        logits.compute(ctx, x);
        cpu.chunks_mut(&mut rows, ROWS, |block, rows| {
            for (i, row) in rows.iter_mut().enumerate() {
                let r = block * ROWS + i;
                row.add(cpu.isa(), logits.row(r), scale);
                if let Some(j) = position(targets[r], &ids) {
                    row.target = logits.row(r)[j] * scale;
                }
            }
        });
        if let (Some(given), Some(picked)) = (x.given, &mut out.given_logp) {
            pick(cpu, &logits, scale, given.i32(), picked.reborrow().f32());
        }
        if let Some((top_ids, top_z)) = &mut out.top {
            merge_top(cpu, &logits, scale, top_ids.reborrow().i32(), top_z.reborrow().f32());
        }
    }
    finish(&rows, targets, out);
}

/// Turns the sums of each row into its outputs, and the logits picked on the way into log-probabilities.
fn finish(rows: &[Row], targets: &[i32], out: Outputs<'_>) {
    let (lse, logp, entropy) = (out.lse.f32(), out.logp.f32(), out.entropy.f32());
    for (r, row) in rows.iter().enumerate() {
        lse[r] = row.lse() as f32;
        logp[r] = if targets[r] < 0 { 0.0 } else { (f64::from(row.target) - row.lse()) as f32 };
        entropy[r] = row.entropy() as f32;
    }
    for picked in [out.given_logp, out.top.map(|(_, z)| z)].into_iter().flatten() {
        let picked = picked.f32();
        let each = picked.len() / rows.len();
        for (z, row) in picked.chunks_mut(each.max(1)).zip(rows) {
            z.iter_mut().for_each(|z| *z = (f64::from(*z) - row.lse()) as f32);
        }
    }
}

/// See the module's contract; sizes have been checked. The same blocks of tokens as in [`forward_backward`]: the same bits.
pub(super) fn backward(ctx: &Ctx, cpu: &Cpu, x: Inputs<'_>, mut b: Backward<'_>) {
    let (n, v) = (x.targets.len(), x.weight.rows);
    let mut logits = Logits::new(cpu, tokens_at_once(n, v), v, false);
    for tokens in blocks(n, v) {
        let (lse, entropy) = (&b.lse.f32()[tokens.clone()], b.entropy.f32().get(tokens.clone()).unwrap_or_default());
        differentiate(ctx, cpu, &x.of(&tokens), (lse, entropy), b.gradients.of(&tokens, n), &mut logits);
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn forward_backward(ctx: &Ctx, cpu: &Cpu, x: Inputs<'_>, mut out: Outputs<'_>, mut d: Gradients<'_>) {
    let (n, v) = (x.targets.len(), x.weight.rows);
    let mut logits = Logits::new(cpu, tokens_at_once(n, v), v, true);
    for tokens in blocks(n, v) {
        let x = x.of(&tokens);
        let mut out = out.of(&tokens, n);
        statistics(ctx, cpu, &x, out.of(&(0..tokens.len()), tokens.len()), &mut logits);
        let rows = (out.lse.as_view().f32(), out.entropy.as_view().f32());
        differentiate(ctx, cpu, &x, rows, d.of(&tokens, n), &mut logits);
    }
}

/// Gradients from the logits, which are computed first unless they are there.
fn differentiate(
    ctx: &Ctx,
    cpu: &Cpu,
    x: &Inputs<'_>,
    (lse, entropy): (&[f32], &[f32]),
    d: Gradients<'_>,
    logits: &mut Logits,
) {
    let (v, width) = (x.weight.rows, x.weight.cols);
    let rows = row_gradients(x, lse, entropy, &d);
    let given = x.given.zip(d.d_given).map(|(ids, d_given)| (ids.i32(), d_given.f32()));
    let (mut d_hidden, mut d_weight) = (d.d_hidden, d.d_weight);
    // A d_hidden of f32 takes the sums itself; a narrower one is rounded from them once, at the end.
    let narrow = d_hidden.as_ref().is_some_and(|h| h.dtype() != DType::F32);
    let mut sums = cpu.empty::<f32>(if narrow { rows.len() * width } else { 0 });
    let rounded = x.hidden.dtype() == DType::Bf16 && x.weight.data.dtype() == DType::Bf16;
    let mut dz_rounded = rounded.then(|| cpu.empty::<bf16>(rows.len() * logits.ld));
    for ids in slices(v) {
        let there = logits.all;
        let mut dz = logits.slice(rows.len(), &ids);
        if !there {
            dz.compute(ctx, x);
        }
        let dz = dz.gradients(cpu, &rows, given, 1.0 / x.temperature, dz_rounded.as_deref_mut());
        if let Some(h) = &mut d_hidden {
            times_weight(ctx, x, &ids, dz, if narrow { ViewMut::F32(&mut sums) } else { h.reborrow() });
        }
        if let Some((w, accumulate)) = &mut d_weight {
            let w = w.reborrow().slice(ids.start * width..ids.end * width);
            transposed_times_hidden(ctx, x, &ids, dz, w, *accumulate);
        }
    }
    if let Some(h) = d_hidden.filter(|_| narrow) {
        by_dtype!(h.dtype(), T => cpu.chunks_mut(T::of_mut(h), ROWS * width, |block, h| {
            let sums = &sums[block * ROWS * width..][..h.len()];
            h.iter_mut().zip(sums).for_each(|(h, s)| *h = T::round(*s));
        }));
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn target_weights(targets: View<'_>, weight: f32, out: ViewMut<'_>) {
    out.f32().iter_mut().zip(targets.i32()).for_each(|(o, &t)| *o = if t < 0 { 0.0 } else { weight });
}

/// Tokens whose shares of the weight's gradient are added to those before: as equal blocks as can be of whole tiles of products.
pub(super) fn tokens_at_once(n: usize, v: usize) -> usize {
    const TILE: usize = 64;
    let most = (LOGITS / v / TILE * TILE).max(TOKENS);
    n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(TILE).min(n)
}

fn blocks(n: usize, v: usize) -> impl Iterator<Item = Range<usize>> {
    let tokens = tokens_at_once(n, v).max(1);
    (0..n).step_by(tokens).map(move |first| first..n.min(first + tokens))
}
