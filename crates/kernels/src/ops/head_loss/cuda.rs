//! GPUs. The vocabulary is walked in slices of a fixed width, tokens in pieces: of a piece over a slice the logits are
//! all that ever exists, and their gradients take their place. A row's sums are f32 within a slice and f64 across
//! slices, in an order that does not depend on the batch. Hopper has a way without logits in memory (`sm90.rs`) for
//! what training asks.

use super::{Backward, Inputs, Outputs, rows_of, rows_of_mut, sm90};
use crate::cuda::Value::{Int, Type};
use crate::cuda::{Arg, Cuda, Grid, Kernel, Source, args, source};
use crate::ops::add;
use crate::ops::gemm::{Gemm, Mat, MatMut, gemm};
use crate::{Buf, Ctx, DType, View, ViewMut};
use std::ops::Range;

static SOURCE: Source = source!("head_loss.cu");

/// Ids of a slice: wide enough for products at the GPU's rate and for few sums of the states' gradient.
pub(super) const SLICE: usize = 4096;
/// Bytes of logits and of the states' gradient in f32 that exist at once, unless `TOKENS` tokens need more. Tests are
/// to have several pieces.
pub(super) const SCRATCH: usize = if cfg!(test) { 16 << 10 } else { 256 << 20 };
/// Pieces are multiples of so many tokens, which tiles of products divide.
const TOKENS: usize = 256;
/// Threads of a block.
const BLOCK: usize = 256;
/// Ids that are sorted at once where the most likely ones are wanted.
const PART: usize = 2048;
/// f32 words of what a row gathers: two f64 and two f32.
const ROW: usize = 6;

/// Some tokens over one slice of the vocabulary.
pub(super) struct Piece {
    pub tokens: Range<usize>,
    pub ids: Range<usize>,
}

/// See the module's contract; sizes have been checked.
pub(super) fn forward(ctx: &Ctx, cuda: &Cuda, x: Inputs<'_>, mut out: Outputs<'_>) {
    if x.given.is_none() && out.top.is_none() && sm90::supports(cuda, &x) {
        return sm90::forward(cuda, x, out);
    }
    let (n, v) = (x.targets.len(), x.weight.rows);
    let kernel = |name| kernel(cuda, name, DType::F32, [false, false]);
    let (statistics, top, finish) = (kernel("head_statistics"), kernel("head_top"), kernel("head_finish"));
    let tokens = tokens_at_once(&x, SLICE, DType::F32);
    let mut rows = cuda.empty(DType::F32, tokens * ROW);
    let mut logits = Logits::new(cuda, tokens, v);
    for first in (0..n).step_by(tokens) {
        let tokens = first..n.min(first + tokens);
        let at = |view: &mut ViewMut<'_>| rows_of_mut(view, &tokens, n).ptr();
        let (lse, logp, entropy) = (at(&mut out.lse), at(&mut out.logp), at(&mut out.entropy));
        let (g, picked) = out.given_logp.as_mut().map_or((0, 0), |p| (p.len() / n, at(p)));
        let (k, best_ids, best) = out.top.as_mut().map_or((0, 0, 0), |(i, z)| (i.len() / n, at(i), at(z)));
        let given = x.given.map_or(0, |ids| rows_of(ids, &tokens, n).ptr());
        let (targets, rows) = (rows_of(x.targets, &tokens, n).ptr(), rows.view_mut().ptr());
        for ids in slices(v, SLICE) {
            let piece = Piece { tokens: tokens.clone(), ids };
            logits.compute(ctx, &x, &piece);
            logits.launch(cuda, &statistics, &piece, x.temperature, &args![targets, rows, given, g as i32, picked]);
            if k > 0 {
                logits.launch(cuda, &top, &piece, x.temperature, &args![k as i32, best_ids, best]);
            }
        }
        let m = tokens.len();
        let all = args![m as i32, rows, targets, lse, logp, entropy, g as i32, picked, k as i32, best];
        cuda.launch(&finish, threads(m), &all);
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn backward(ctx: &Ctx, cuda: &Cuda, x: Inputs<'_>, mut b: Backward<'_>) {
    let (n, v, d) = (x.targets.len(), x.weight.rows, x.weight.cols);
    let fused = b.gradients.d_given.is_none() && sm90::supports(cuda, &x);
    let (width, scratch) = if fused { (sm90::SLICE, DType::Bf16) } else { (SLICE, DType::F32) };
    let at_once = tokens_at_once(&x, width, scratch);
    let mut logits = Logits { z: cuda.empty(scratch, at_once * row(v, width)), ld: row(v, width) };
    // A d_hidden of f32 takes the sums itself; a narrower one is rounded from them once, at the end.
    let mut sums =
        b.gradients.d_hidden.as_ref().filter(|h| h.dtype() != DType::F32).map(|_| cuda.empty(DType::F32, at_once * d));
    for first in (0..n).step_by(at_once) {
        let tokens = first..n.min(first + at_once);
        for ids in slices(v, width) {
            let piece = Piece { tokens: tokens.clone(), ids };
            let dz = if fused {
                sm90::gradients(cuda, &x, &b, &piece, logits.z.view_mut(), logits.ld);
                Mat { data: logits.z.view(), ld: logits.ld }
            } else {
                logits.compute(ctx, &x, &piece);
                logits.differentiate(cuda, &x, &b, &piece)
            };
            if let Some(h) = &mut b.gradients.d_hidden {
                let c = match &mut sums {
                    Some(sums) => sums.view_mut().slice(0..tokens.len() * d),
                    None => rows_of_mut(h, &tokens, n),
                };
                times_weight(ctx, &x, &piece, dz, c);
            }
            if let Some((w, _)) = &mut b.gradients.d_weight {
                transposed_times_hidden(ctx, &x, &piece, dz, w.reborrow());
            }
        }
        if let (Some(h), Some(sums)) = (&mut b.gradients.d_hidden, &sums) {
            add::convert(ctx, sums.view().slice(0..tokens.len() * d), rows_of_mut(h, &tokens, n));
        }
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn target_weights(cuda: &Cuda, targets: View<'_>, weight: f32, mut out: ViewMut<'_>) {
    let n = targets.len();
    let kernel = kernel(cuda, "head_target_weights", DType::F32, [false, false]);
    cuda.launch(&kernel, threads(n), &args![n as i32, targets.ptr(), weight, out.ptr()]);
}

/// A kernel that writes gradients of logits as `dz`, some of them from those of entropy and of given ids.
fn kernel(cuda: &Cuda, name: &'static str, dz: DType, [spread, given]: [bool; 2]) -> Kernel {
    let sizes = [("SLICE", Int(SLICE as i64)), ("BLOCK", Int(BLOCK as i64)), ("PART", Int(PART as i64))];
    let kind = [("DZ", Type(dz)), ("SPREAD", Int(spread.into())), ("GIVEN", Int(given.into()))];
    cuda.kernel(&SOURCE, name, &[sizes, kind].concat())
}

/// A thread for each of `n`.
fn threads(n: usize) -> Grid {
    Grid::new([n.div_ceil(BLOCK) as u32, 1, 1], BLOCK as u32)
}

/// The fixed slices of a vocabulary of `v` ids.
fn slices(v: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..v).step_by(width).map(move |start| start..v.min(start + width))
}

/// Elements from one row of a slice to the next: rows begin where wide loads may, in bf16 too.
fn row(v: usize, width: usize) -> usize {
    width.min(v).next_multiple_of(8)
}

/// Tokens of a piece: from sizes alone, and the same whichever gradients are wanted.
fn tokens_at_once(x: &Inputs<'_>, width: usize, logits: DType) -> usize {
    let n = x.targets.len();
    let bytes = row(x.weight.rows, width) * logits.size() + x.weight.cols * DType::F32.size();
    let most = (SCRATCH / bytes / TOKENS).max(1) * TOKENS;
    n.div_ceil(n.div_ceil(most)).next_multiple_of(TOKENS).min(n)
}

/// The logits of a piece, f32, or their gradients, each row of which begins where the logits' did.
struct Logits {
    z: Buf,
    ld: usize,
}

impl Logits {
    fn new(cuda: &Cuda, tokens: usize, v: usize) -> Self {
        Self { z: cuda.empty(DType::F32, tokens * row(v, SLICE)), ld: row(v, SLICE) }
    }

    /// `z[tokens, ids]` = hidden `W[ids]`^T, not yet divided by the temperature.
    fn compute(&mut self, ctx: &Ctx, x: &Inputs<'_>, p: &Piece) {
        let d = x.weight.cols;
        let product = Gemm {
            m: p.tokens.len(),
            n: p.ids.len(),
            k: d,
            a: Mat { data: rows_of(x.hidden, &p.tokens, x.targets.len()), ld: d },
            ta: false,
            b: Mat { data: x.weight.data.slice(p.ids.start * d..p.ids.end * d), ld: d },
            tb: true,
            c: MatMut { data: self.z.view_mut(), ld: self.ld },
            accumulate: false,
        };
        gemm(ctx, product);
    }

    /// A kernel with a block for each row; `rest` are its arguments after those that all have.
    fn launch(&mut self, cuda: &Cuda, kernel: &Kernel, p: &Piece, temperature: f32, rest: &[Arg]) {
        let z = self.z.view_mut().ptr();
        let common = args![z, self.ld as i64, p.ids.len() as i32, p.ids.start as i32, 1.0 / temperature];
        let grid = Grid::new([p.tokens.len() as u32, 1, 1], BLOCK as u32);
        cuda.launch(kernel, grid, &[&common, rest].concat());
    }

    /// Logits in, gradients out: bf16 where both operands of their products then are.
    fn differentiate(&mut self, cuda: &Cuda, x: &Inputs<'_>, b: &Backward<'_>, p: &Piece) -> Mat<'_> {
        let n = x.targets.len();
        let narrow = x.hidden.dtype() == DType::Bf16 && x.weight.data.dtype() == DType::Bf16;
        let dz = if narrow { DType::Bf16 } else { DType::F32 };
        let given = x.given.zip(b.gradients.d_given);
        let at = |view: View<'_>| rows_of(view, &p.tokens, n).ptr();
        let (g, ids, d_given) = given.map_or((0, 0, 0), |(ids, d)| (ids.len() / n, at(ids), at(d)));
        let d_entropy = b.gradients.d_entropy.map_or(0, at);
        let [targets, lse, entropy, d_logp] = [x.targets, b.lse, b.entropy, b.gradients.d_logp].map(at);
        let rest = args![targets, lse, entropy, d_logp, d_entropy, ids, d_given, g as i32];
        let kernel = kernel(cuda, "head_gradient", dz, [b.gradients.d_entropy.is_some(), given.is_some()]);
        self.launch(cuda, &kernel, p, x.temperature, &rest);
        let View::Cuda(z) = self.z.view() else { panic!("logits in host memory") };
        Mat { data: View::Cuda(z.cast(dz)), ld: self.ld * DType::F32.size() / dz.size() }
    }
}

/// `c[tokens, D]` = dz `W[ids]`, added to what the slices before left there.
fn times_weight(ctx: &Ctx, x: &Inputs<'_>, p: &Piece, dz: Mat<'_>, c: ViewMut<'_>) {
    let d = x.weight.cols;
    let product = Gemm {
        m: p.tokens.len(),
        n: d,
        k: p.ids.len(),
        a: dz,
        ta: false,
        b: Mat { data: x.weight.data.slice(p.ids.start * d..p.ids.end * d), ld: d },
        tb: false,
        c: MatMut { data: c, ld: d },
        accumulate: p.ids.start > 0,
    };
    gemm(ctx, product);
}

/// `d_weight[ids, D]` += dz^T hidden.
fn transposed_times_hidden(ctx: &Ctx, x: &Inputs<'_>, p: &Piece, dz: Mat<'_>, d_weight: ViewMut<'_>) {
    let d = x.weight.cols;
    let product = Gemm {
        m: p.ids.len(),
        n: d,
        k: p.tokens.len(),
        a: dz,
        ta: true,
        b: Mat { data: rows_of(x.hidden, &p.tokens, x.targets.len()), ld: d },
        tb: false,
        c: MatMut { data: d_weight.slice(p.ids.start * d..p.ids.end * d), ld: d },
        accumulate: true,
    };
    gemm(ctx, product);
}
