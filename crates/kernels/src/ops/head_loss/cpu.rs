//! All cores. The vocabulary is walked in slices of a fixed width; the logits of all tokens over one slice are all that
//! ever exists of them. A row's sums are 16 interleaved f32 lanes within a slice and f64 across slices, in slice order:
//! they depend on the row, the weight and nothing else of the batch. Non-finite logits give non-finite outputs.

use super::{Backward, Inputs, Outputs};
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

/// See the module's contract; sizes have been checked.
pub(super) fn forward(ctx: &Ctx, cpu: &Cpu, x: Inputs<'_>, mut out: Outputs<'_>) {
    let targets = x.targets.i32();
    let n = targets.len();
    let scale = 1.0 / x.temperature;
    let mut rows = vec![Row::default(); n];
    let mut logits = Slice::new(cpu, n, x.weight.rows);
    for ids in slices(x.weight.rows) {
        logits.compute(ctx, &x, ids.clone());
        let logits = &logits;
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
            pick(cpu, logits, scale, given.i32(), picked.reborrow().f32());
        }
        if let Some((top_ids, top_z)) = &mut out.top {
            merge_top(cpu, logits, scale, top_ids.reborrow().i32(), top_z.reborrow().f32());
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

/// See the module's contract; sizes have been checked.
pub(super) fn backward(ctx: &Ctx, cpu: &Cpu, x: Inputs<'_>, b: Backward<'_>) {
    let (v, d) = (x.weight.rows, x.weight.cols);
    let rows = row_gradients(&x, &b);
    let given = x.given.zip(b.d_given).map(|(ids, d_given)| (ids.i32(), d_given.f32()));
    let (mut d_hidden, mut d_weight) = (b.d_hidden, b.d_weight);
    // A d_hidden of f32 takes the sums itself; a narrower one is rounded from them once, at the end.
    let narrow = d_hidden.as_ref().is_some_and(|h| h.dtype() != DType::F32);
    let mut sums = cpu.empty::<f32>(if narrow { rows.len() * d } else { 0 });
    let mut dz = Slice::new(cpu, rows.len(), v);
    if x.hidden.dtype() == DType::Bf16 && x.weight.data.dtype() == DType::Bf16 {
        dz.narrow = Some(cpu.empty(dz.z.len()));
    }
    for ids in slices(v) {
        dz.compute(ctx, &x, ids.clone());
        dz.differentiate(cpu, &rows, given, 1.0 / x.temperature);
        if let Some(h) = &mut d_hidden {
            dz.times_weight(ctx, &x, if narrow { ViewMut::F32(&mut sums) } else { h.reborrow() });
        }
        if let Some((w, accumulate)) = &mut d_weight {
            dz.transposed_times_hidden(ctx, &x, w.reborrow().slice(ids.start * d..ids.end * d), *accumulate);
        }
    }
    if let Some(h) = d_hidden.filter(|_| narrow) {
        by_dtype!(h.dtype(), T => cpu.chunks_mut(T::of_mut(h), ROWS * d, |block, h| {
            let sums = &sums[block * ROWS * d..][..h.len()];
            h.iter_mut().zip(sums).for_each(|(h, s)| *h = T::round(*s));
        }));
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn target_weights(targets: View<'_>, weight: f32, out: ViewMut<'_>) {
    out.f32().iter_mut().zip(targets.i32()).for_each(|(o, &t)| *o = if t < 0 { 0.0 } else { weight });
}

/// The fixed slices of a vocabulary of `v` ids.
fn slices(v: usize) -> impl Iterator<Item = Range<usize>> {
    (0..v).step_by(SLICE).map(move |start| start..v.min(start + SLICE))
}

/// Where `id` is within a slice, if it is.
fn position(id: i32, ids: &Range<usize>) -> Option<usize> {
    usize::try_from(id).ok().filter(|id| ids.contains(id)).map(|id| id - ids.start)
}

/// The logits (or their gradients) of all tokens over one slice of the vocabulary.
struct Slice {
    z: AlignedVec<f32>,
    /// The gradients rounded, where the other operand of their products is bf16 too: those are faster then.
    narrow: Option<AlignedVec<bf16>>,
    ids: Range<usize>,
    ld: usize,
    n: usize,
}

impl Slice {
    /// Room for `n` rows over any slice of `v` ids.
    fn new(cpu: &Cpu, n: usize, v: usize) -> Self {
        let ld = SLICE.min(v);
        Self { z: cpu.empty(n * ld), narrow: None, ids: 0..0, ld, n }
    }

    /// Row `r`, as wide as the slice.
    fn row(&self, r: usize) -> &[f32] {
        &self.z[r * self.ld..][..self.ids.len()]
    }

    /// `z[N, ids]` = hidden `W[ids]`^T, not yet divided by the temperature.
    fn compute(&mut self, ctx: &Ctx, x: &Inputs<'_>, ids: Range<usize>) {
        let d = x.weight.cols;
        self.ids = ids;
        gemm(
            ctx,
            Gemm {
                m: self.n,
                n: self.ids.len(),
                k: d,
                a: Mat { data: x.hidden, ld: d },
                ta: false,
                b: Mat { data: rows_of(&x.weight, &self.ids), ld: d },
                tb: true,
                c: MatMut { data: ViewMut::F32(&mut self.z), ld: self.ld },
                accumulate: false,
            },
        );
    }

    /// Logits in, their gradients out. `given` are ids and their gradients, G a row.
    fn differentiate(&mut self, cpu: &Cpu, rows: &[RowGradient], given: Option<(&[i32], &[f32])>, scale: f32) {
        let (ids, ld) = (self.ids.clone(), self.ld);
        cpu.chunks_mut(&mut self.z, ROWS * ld, |block, z| {
            for (i, z) in z.chunks_mut(ld).enumerate() {
                let r = block * ROWS + i;
                rows[r].apply(cpu.isa(), &mut z[..ids.len()], scale);
                if let Some(j) = position(rows[r].target, &ids) {
                    z[j] += rows[r].d_target;
                }
                let Some((given, d_given)) = given else { continue };
                let g = given.len() / rows.len();
                for (&id, &d) in given[r * g..][..g].iter().zip(&d_given[r * g..]) {
                    if let Some(j) = position(id, &ids) {
                        z[j] += d * scale;
                    }
                }
            }
        });
        if let Some(narrow) = &mut self.narrow {
            let z = &self.z;
            cpu.chunks_mut(narrow, ROWS * ld, |block, to| round(cpu.isa(), &z[block * ROWS * ld..], to));
        }
    }

    /// The gradients, as their products take them.
    fn gradients(&self) -> Mat<'_> {
        let data = self.narrow.as_ref().map_or(View::F32(&self.z), |narrow| View::Bf16(narrow));
        Mat { data, ld: self.ld }
    }

    /// `c[N, D]` = dz `W[ids]`, added to what the slices before left there.
    fn times_weight(&self, ctx: &Ctx, x: &Inputs<'_>, c: ViewMut<'_>) {
        let d = x.weight.cols;
        gemm(
            ctx,
            Gemm {
                m: self.n,
                n: d,
                k: self.ids.len(),
                a: self.gradients(),
                ta: false,
                b: Mat { data: rows_of(&x.weight, &self.ids), ld: d },
                tb: false,
                c: MatMut { data: c, ld: d },
                accumulate: self.ids.start > 0,
            },
        );
    }

    /// `c[ids, D]` = dz^T hidden, or the same added to what is there.
    fn transposed_times_hidden(&self, ctx: &Ctx, x: &Inputs<'_>, c: ViewMut<'_>, accumulate: bool) {
        let d = x.weight.cols;
        gemm(
            ctx,
            Gemm {
                m: self.ids.len(),
                n: d,
                k: self.n,
                a: self.gradients(),
                ta: true,
                b: Mat { data: x.hidden, ld: d },
                tb: false,
                c: MatMut { data: c, ld: d },
                accumulate,
            },
        );
    }
}

fn rows_of<'a>(w: &Weight<'a>, ids: &Range<usize>) -> View<'a> {
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
fn pick(cpu: &Cpu, logits: &Slice, scale: f32, given: &[i32], picked: &mut [f32]) {
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
fn merge_top(cpu: &Cpu, logits: &Slice, scale: f32, top_ids: &mut [i32], top_z: &mut [f32]) {
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

/// What turns a row's logits into their gradients: dz = e^(z - lse) (all + spread (z - lse + entropy)), plus the
/// gradients at single ids. The division by the temperature is in the factors.
struct RowGradient {
    lse: f32,
    entropy: f32,
    all: f32,
    spread: f32,
    target: i32,
    d_target: f32,
}

fn row_gradients(x: &Inputs<'_>, b: &Backward<'_>) -> Vec<RowGradient> {
    let (targets, lse, d_logp) = (x.targets.i32(), b.lse.f32(), b.d_logp.f32());
    let scale = 1.0 / x.temperature;
    let row = |r: usize| {
        let d_target = if targets[r] < 0 { 0.0 } else { d_logp[r] };
        let mut all = f64::from(d_target);
        if let Some(d_given) = b.d_given {
            let g = d_given.len() / targets.len();
            all += d_given.f32()[r * g..][..g].iter().map(|&d| f64::from(d)).sum::<f64>();
        }
        let (entropy, spread) = b.d_entropy.map_or((0.0, 0.0), |d| (b.entropy.f32()[r], -d.f32()[r] * scale));
        let all = (-all * f64::from(scale)) as f32;
        RowGradient { lse: lse[r], entropy, all, spread, target: targets[r], d_target: d_target * scale }
    };
    (0..targets.len()).map(row).collect()
}

impl RowGradient {
    /// Logits in, gradients out, but for those at single ids.
    fn apply(&self, isa: Isa, z: &mut [f32], scale: f32) {
        if self.all == 0.0 && self.spread == 0.0 {
            // A row without a gradient costs nothing, and what its logits are does not matter.
            z.fill(0.0);
            return;
        }
        softmax_gradient(isa, z, scale, self.lse, self.entropy, self.all, self.spread);
    }
}

vectorised! {
    fn softmax_gradient(isa: Isa, z: &mut [f32], scale: f32, lse: f32, entropy: f32, all: f32, spread: f32) {
        for z in z {
            let t = *z * scale - lse;
            *z = exp(t) * (all + spread * (t + entropy));
        }
    }
}
