//! All cores. The vocabulary is walked in slices of a fixed width: in forward for all tokens at once, in backward for blocks of
//! them, of which the logits over all slices exist where both directions are computed at once. A row's sums are
//! 16 interleaved f32 lanes within a slice and f64 across slices, in slice order: they depend on the row, the weight and
//! nothing else of the batch. Non-finite logits give non-finite outputs.

use super::gradient::{RowGradient, row_gradients};
use super::{Backward, Gradients, Inputs, Outputs};
use crate::isa::{Isa, vectorised};
use crate::math::exp;
use crate::ops::by_dtype;
use crate::ops::gemm::{Gemm, Mat, MatMut, gemm};
use crate::{AlignedVec, Cpu, Ctx, DType, Elem, View, ViewMut, Weight, bf16};
use std::ops::Range;

/// Ids of one slice: wide enough for the matrix products, narrow enough that N x SLICE stays small beside N x D.
pub(super) const SLICE: usize = 512;
/// Rows of one task.
const ROWS: usize = 16;
/// Partial sums that a row keeps within a slice.
const LANES: usize = 16;
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

/// The fixed slices of a vocabulary of `v` ids.
fn slices(v: usize) -> impl Iterator<Item = Range<usize>> {
    (0..v).step_by(SLICE).map(move |start| start..v.min(start + SLICE))
}

/// Where `id` is within a slice, if it is.
fn position(id: i32, ids: &Range<usize>) -> Option<usize> {
    usize::try_from(id).ok().filter(|id| ids.contains(id)).map(|id| id - ids.start)
}

/// Room for logits.
struct Logits {
    z: AlignedVec<f32>,
    /// Of all slices, not of one.
    all: bool,
    rows: usize,
    ld: usize,
}

impl Logits {
    /// Of `n` tokens over `v` ids, or over one slice of them.
    fn new(cpu: &Cpu, n: usize, v: usize, all: bool) -> Self {
        let ld = SLICE.min(v);
        let slices = if all { v.div_ceil(SLICE) } else { 1 };
        Self { z: cpu.empty(n * ld * slices), all, rows: n, ld }
    }

    /// Those of the first `n` tokens over some ids.
    fn slice(&mut self, n: usize, ids: &Range<usize>) -> Slice<'_> {
        let at = if self.all { ids.start / SLICE * self.rows * self.ld } else { 0 };
        Slice { z: &mut self.z[at..][..n * self.ld], ids: ids.clone(), ld: self.ld, n }
    }
}

/// The logits (or their gradients) of some tokens over one slice of the vocabulary.
struct Slice<'a> {
    z: &'a mut [f32],
    ids: Range<usize>,
    ld: usize,
    n: usize,
}

impl<'a> Slice<'a> {
    /// Row `r`, as wide as the slice.
    fn row(&self, r: usize) -> &[f32] {
        &self.z[r * self.ld..][..self.ids.len()]
    }

    /// `z[N, ids]` = hidden `W[ids]`^T, not yet divided by the temperature.
    fn compute(&mut self, ctx: &Ctx, x: &Inputs<'_>) {
        let d = x.weight.cols;
        gemm(
            ctx,
            Gemm {
                m: self.n,
                n: self.ids.len(),
                k: d,
                a: Mat { data: x.hidden, ld: d },
                ta: false,
                b: Mat { data: weights_of(&x.weight, &self.ids), ld: d },
                tb: true,
                c: MatMut { data: ViewMut::F32(self.z), ld: self.ld },
                accumulate: false,
            },
        );
    }

    /// Logits in, their gradients out, as their products take them: rounded where the other operand is bf16 too, those are
    /// faster then. `given` are ids and their gradients, G a row.
    fn gradients(
        self,
        cpu: &Cpu,
        rows: &[RowGradient],
        given: Option<(&[i32], &[f32])>,
        scale: f32,
        rounded: Option<&'a mut [bf16]>,
    ) -> Mat<'a> {
        let (ids, ld) = (self.ids, self.ld);
        let row = |r: usize, z: &mut [f32]| {
            rows[r].apply(cpu.isa(), z, scale);
            if let Some(j) = position(rows[r].target, &ids) {
                z[j] += rows[r].d_target;
            }
            let Some((given, d_given)) = given else { return };
            let g = given.len() / rows.len();
            for (&id, &d) in given[r * g..][..g].iter().zip(&d_given[r * g..]) {
                if let Some(j) = position(id, &ids) {
                    z[j] += d * scale;
                }
            }
        };
        let (z, width) = (self.z, ids.len());
        let Some(to) = rounded else {
            cpu.chunks_mut(z, ROWS * ld, |block, z| {
                z.chunks_mut(ld).enumerate().for_each(|(i, z)| row(block * ROWS + i, &mut z[..width]));
            });
            return Mat { data: View::F32(z), ld };
        };
        let z = &*z;
        cpu.chunks_mut(to, ROWS * ld, |block, to| {
            // Not where the logits are, which would be written to memory once more.
            let mut dz = [0.0; SLICE];
            for (i, to) in to.chunks_mut(ld).enumerate() {
                let r = block * ROWS + i;
                dz[..width].copy_from_slice(&z[r * ld..][..width]);
                row(r, &mut dz[..width]);
                round(cpu.isa(), &dz[..width], to);
            }
        });
        Mat { data: View::Bf16(to), ld }
    }
}

/// `c[N, D]` = dz `W[ids]`, added to what the slices before left there.
fn times_weight(ctx: &Ctx, x: &Inputs<'_>, ids: &Range<usize>, dz: Mat<'_>, c: ViewMut<'_>) {
    let d = x.weight.cols;
    gemm(
        ctx,
        Gemm {
            m: x.targets.len(),
            n: d,
            k: ids.len(),
            a: dz,
            ta: false,
            b: Mat { data: weights_of(&x.weight, ids), ld: d },
            tb: false,
            c: MatMut { data: c, ld: d },
            accumulate: ids.start > 0,
        },
    );
}

/// `c[ids, D]` = dz^T hidden, or the same added to what is there.
fn transposed_times_hidden(
    ctx: &Ctx,
    x: &Inputs<'_>,
    ids: &Range<usize>,
    dz: Mat<'_>,
    c: ViewMut<'_>,
    accumulate: bool,
) {
    let d = x.weight.cols;
    gemm(
        ctx,
        Gemm {
            m: ids.len(),
            n: d,
            k: x.targets.len(),
            a: dz,
            ta: true,
            b: Mat { data: x.hidden, ld: d },
            tb: false,
            c: MatMut { data: c, ld: d },
            accumulate,
        },
    );
}

fn weights_of<'a>(w: &Weight<'a>, ids: &Range<usize>) -> View<'a> {
    w.data.slice(ids.start * w.cols..ids.end * w.cols)
}

/// What one row has gathered from the slices so far, relative to its largest logit.
#[derive(Clone, Copy, Default)]
struct Row {
    /// Largest z.
    max: f64,
    /// sum of e^(z - max); zero before the first slice.
    sum: f64,
    /// sum of e^(z - max) (z - max).
    dot: f64,
    /// z of the target.
    target: f32,
}

impl Row {
    /// Takes in the row's logits of the next slice.
    fn add(&mut self, isa: Isa, x: &[f32], scale: f32) {
        let max = largest(isa, x) * scale;
        let (sum, dot) = exp_sums(isa, x, scale, max);
        let new = Row { max: f64::from(max), sum, dot, ..*self };
        *self = if self.sum == 0.0 { new } else { self.merge(&new) };
    }

    /// Both sums relative to the larger of the two maxima.
    fn merge(&self, b: &Row) -> Row {
        let max = self.max.max(b.max);
        let (da, db) = (self.max - max, b.max - max);
        let (ea, eb) = (da.exp(), db.exp());
        Row {
            max,
            sum: self.sum * ea + b.sum * eb,
            dot: (self.dot + self.sum * da) * ea + (b.dot + b.sum * db) * eb,
            target: self.target,
        }
    }

    fn lse(&self) -> f64 {
        self.max + self.sum.ln()
    }

    /// lse - sum p z, with the maximum cancelled by hand.
    fn entropy(&self) -> f64 {
        self.sum.ln() - self.dot / self.sum
    }
}

vectorised! {
    fn round(isa: Isa, from: &[f32], to: &mut [bf16]) {
        to.iter_mut().zip(from).for_each(|(o, x)| *o = Elem::round(*x));
    }
}

vectorised! {
    /// The largest element. A NaN may be taken for it, or passed over.
    fn largest(isa: Isa, x: &[f32]) -> f32 {
        // Floats in ascending order have ascending keys, and a maximum of integers may be taken in any order. Flipping
        // the lower bits of a negative is its own inverse.
        let flip = |bits: i32| bits ^ ((bits >> 31) & i32::MAX);
        let key = x.iter().map(|x| flip(x.to_bits() as i32)).fold(i32::MIN, i32::max);
        f32::from_bits(flip(key) as u32)
    }
}

vectorised! {
    /// sum of e^t and of e^t t, with t = x scale - max.
    fn exp_sums(isa: Isa, x: &[f32], scale: f32, max: f32) -> (f64, f64) {
        let (mut sum, mut dot) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (blocks, rest) = x.as_chunks::<LANES>();
        let mut add = |l: usize, x: f32| {
            let t = x * scale - max;
            let e = exp(t);
            sum[l] += e;
            dot[l] += e * t;
        };
        for b in blocks {
            for l in 0..LANES {
                add(l, b[l]);
            }
        }
        rest.iter().enumerate().for_each(|(l, &x)| add(l, x));
        let total = |lanes: [f32; LANES]| lanes.iter().fold(0.0, |a, &b| a + f64::from(b));
        (total(sum), total(dot))
    }
}

/// Writes z of the given ids that lie in this slice.
fn pick(cpu: &Cpu, logits: &Slice<'_>, scale: f32, given: &[i32], picked: &mut [f32]) {
    let each = given.len() / logits.n;
    if each == 0 {
        return;
    }
    cpu.chunks_mut(picked, ROWS * each, |block, picked| {
        for (i, picked) in picked.chunks_mut(each).enumerate() {
            let r = block * ROWS + i;
            for (z, &id) in picked.iter_mut().zip(&given[r * each..]) {
                if let Some(j) = position(id, &logits.ids) {
                    *z = logits.row(r)[j] * scale;
                }
            }
        }
    });
}

/// Merges this slice into the K largest of each row.
fn merge_top(cpu: &Cpu, logits: &Slice<'_>, scale: f32, top_ids: &mut [i32], top_z: &mut [f32]) {
    let k = top_z.len() / logits.n;
    if k == 0 {
        return;
    }
    cpu.chunks2_mut((top_ids, ROWS * k), (top_z, ROWS * k), |block, top_ids, top_z| {
        for (i, (ids, z)) in top_ids.chunks_mut(k).zip(top_z.chunks_mut(k)).enumerate() {
            merge_row(logits.row(block * ROWS + i), scale, logits.ids.start, ids, z);
        }
    });
}

/// `ids` and `top` hold the largest of the `first` logits before, in descending order. Ids come in ascending order, so
/// that among equals the one already there stays ahead. A NaN ranks last.
fn merge_row(x: &[f32], scale: f32, first: usize, ids: &mut [i32], top: &mut [f32]) {
    let k = top.len();
    for (c, chunk) in x.chunks(LANES).enumerate() {
        let start = first + c * LANES;
        // Nearly all chunks hold nothing new: one vector comparison passes over them.
        if start >= k && !chunk.iter().fold(false, |any, &x| any | (x * scale > top[k - 1])) {
            continue;
        }
        for (l, &x) in chunk.iter().enumerate() {
            let (id, z) = (start + l, (x * scale).max(f32::NEG_INFINITY));
            if id >= k && z <= top[k - 1] {
                continue;
            }
            let mut at = id.min(k - 1);
            while at > 0 && top[at - 1] < z {
                (top[at], ids[at]) = (top[at - 1], ids[at - 1]);
                at -= 1;
            }
            (top[at], ids[at]) = (z, id as i32);
        }
    }
}
