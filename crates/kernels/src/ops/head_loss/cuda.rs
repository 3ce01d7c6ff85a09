//! GPUs. The vocabulary is walked in slices of a fixed width, tokens in pieces: the logits of a piece over a slice are all
//! that ever exists of them, and their gradients take their place. A row's sums are f32 within a slice and f64 across
//! slices, in an order that does not depend on the batch.

use super::{Backward, Inputs, Outputs};
use crate::cuda::Value::{Int, Type};
use crate::cuda::{Arg, Cuda, Grid, Kernel, Source, args, source};
use crate::ops::add;
use crate::ops::gemm::{Gemm, Mat, MatMut, gemm};
use crate::{Buf, Ctx, DType, View, ViewMut};
use std::ops::Range;

static SOURCE: Source = source!("head_loss.cu");

/// Ids of a slice: wide enough for products at the GPU's rate and for few sums of the states' gradient.
pub(super) const SLICE: usize = 4096;
/// Bytes of logits and of the states' gradient in f32 that exist at once, unless `TOKENS` tokens need more.
const SCRATCH: usize = 256 << 20;
/// Pieces are multiples of so many tokens, which tiles of products divide.
const TOKENS: usize = 256;
/// Threads of a block.
const BLOCK: usize = 256;
/// Ids that are sorted at once where the most likely ones are wanted.
const PART: usize = 2048;
/// f32 words of what a row gathers: two f64 and two f32.
const ROW: usize = 6;

/// See the module's contract; sizes have been checked.
pub(super) fn forward(ctx: &Ctx, cuda: &Cuda, x: Inputs<'_>, mut out: Outputs<'_>) {
    let (n, v) = (x.targets.len(), x.weight.rows);
    let kernel = |name| kernel(cuda, name, DType::F32, [false, false]);
    let (statistics, top, finish) = (kernel("head_statistics"), kernel("head_top"), kernel("head_finish"));
    let tokens = tokens_at_once(&x);
    let mut rows = cuda.empty(DType::F32, tokens * ROW);
    let mut logits = Logits::new(cuda, tokens, v);
    for piece in (0..n).step_by(tokens).map(|first| first..n.min(first + tokens)) {
        let at = |view: &mut ViewMut<'_>| {
            let each = view.len() / n;
            view.reborrow().slice(rows_of(&piece, each)).ptr()
        };
        let (lse, logp, entropy) = (at(&mut out.lse), at(&mut out.logp), at(&mut out.entropy));
        let (g, picked) = out.given_logp.as_mut().map_or((0, 0), |p| (p.len() / n, at(p)));
        let (k, ids, best) = out.top.as_mut().map_or((0, 0, 0), |(i, z)| (i.len() / n, at(i), at(z)));
        let given = x.given.map_or(0, |ids| ids.slice(rows_of(&piece, g)).ptr());
        let (targets, rows) = (x.targets.slice(piece.clone()).ptr(), rows.view_mut().ptr());
        for ids_of_slice in slices(v) {
            logits.compute(ctx, &x, piece.clone(), ids_of_slice);
            logits.launch(cuda, &statistics, x.temperature, &args![targets, rows, given, g as i32, picked]);
            if k > 0 {
                logits.launch(cuda, &top, x.temperature, &args![k as i32, ids, best]);
            }
        }
        let m = piece.len();
        let all = args![m as i32, rows, targets, lse, logp, entropy, g as i32, picked, k as i32, best];
        cuda.launch(&finish, threads(m), &all);
    }
}

/// See the module's contract; sizes have been checked.
pub(super) fn backward(ctx: &Ctx, cuda: &Cuda, x: Inputs<'_>, mut b: Backward<'_>) {
    let (n, v, d) = (x.targets.len(), x.weight.rows, x.weight.cols);
    let given = x.given.zip(b.d_given);
    let narrow = x.hidden.dtype() == DType::Bf16 && x.weight.data.dtype() == DType::Bf16;
    let dz = if narrow { DType::Bf16 } else { DType::F32 };
    let gradient = kernel(cuda, "head_gradient", dz, [b.d_entropy.is_some(), given.is_some()]);
    let tokens = tokens_at_once(&x);
    let mut logits = Logits::new(cuda, tokens, v);
    // A d_hidden of f32 takes the sums itself; a narrower one is rounded from them once, at the end.
    let mut sums = b.d_hidden.as_ref().filter(|h| h.dtype() != DType::F32).map(|_| cuda.empty(DType::F32, tokens * d));
    for piece in (0..n).step_by(tokens).map(|first| first..n.min(first + tokens)) {
        let at = |view: View<'_>| view.slice(rows_of(&piece, view.len() / n)).ptr();
        let (g, ids, d_given) = given.map_or((0, 0, 0), |(ids, d)| (ids.len() / n, at(ids), at(d)));
        let d_entropy = b.d_entropy.map_or(0, at);
        let [targets, lse, entropy, d_logp] = [x.targets, b.lse, b.entropy, b.d_logp].map(at);
        let rows = args![targets, lse, entropy, d_logp, d_entropy, ids, d_given, g as i32];
        for ids_of_slice in slices(v) {
            logits.compute(ctx, &x, piece.clone(), ids_of_slice);
            logits.launch(cuda, &gradient, x.temperature, &rows);
            if let Some(h) = &mut b.d_hidden {
                let c = match &mut sums {
                    Some(sums) => sums.view_mut().slice(0..piece.len() * d),
                    None => h.reborrow().slice(rows_of(&piece, d)),
                };
                logits.times_weight(ctx, &x, dz, c);
            }
            if let Some(w) = &mut b.d_weight {
                logits.transposed_times_hidden(ctx, &x, dz, w.reborrow());
            }
        }
        if let (Some(h), Some(sums)) = (&mut b.d_hidden, &sums) {
            add::convert(ctx, sums.view().slice(0..piece.len() * d), h.reborrow().slice(rows_of(&piece, d)));
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

/// Elements of a piece's rows, `each` a row.
fn rows_of(piece: &Range<usize>, each: usize) -> Range<usize> {
    piece.start * each..piece.end * each
}

/// The fixed slices of a vocabulary of `v` ids.
fn slices(v: usize) -> impl Iterator<Item = Range<usize>> {
    (0..v).step_by(SLICE).map(move |start| start..v.min(start + SLICE))
}

/// Tokens of a piece: from sizes alone, and the same whichever gradients are wanted.
fn tokens_at_once(x: &Inputs<'_>) -> usize {
    let n = x.targets.len();
    let row = 4 * (SLICE.min(x.weight.rows) + x.weight.cols);
    let most = (SCRATCH / row / TOKENS).max(1) * TOKENS;
    n.div_ceil(n.div_ceil(most)).next_multiple_of(TOKENS).min(n)
}

/// The logits (or their gradients) of a piece over one slice.
struct Logits {
    z: Buf,
    ld: usize,
    piece: Range<usize>,
    ids: Range<usize>,
}

impl Logits {
    fn new(cuda: &Cuda, tokens: usize, v: usize) -> Self {
        // Rows begin where wide loads may, in bf16 too.
        let ld = SLICE.min(v).next_multiple_of(8);
        Self { z: cuda.empty(DType::F32, tokens * ld), ld, piece: 0..0, ids: 0..0 }
    }

    /// `z[piece, ids]` = hidden `W[ids]`^T, not yet divided by the temperature.
    fn compute(&mut self, ctx: &Ctx, x: &Inputs<'_>, piece: Range<usize>, ids: Range<usize>) {
        let d = x.weight.cols;
        (self.piece, self.ids) = (piece, ids);
        let product = Gemm {
            m: self.piece.len(),
            n: self.ids.len(),
            k: d,
            a: Mat { data: x.hidden.slice(rows_of(&self.piece, d)), ld: d },
            ta: false,
            b: Mat { data: x.weight.data.slice(rows_of(&self.ids, d)), ld: d },
            tb: true,
            c: MatMut { data: self.z.view_mut(), ld: self.ld },
            accumulate: false,
        };
        gemm(ctx, product);
    }

    /// A kernel with a block for each row; `rest` are its arguments after those that all have.
    fn launch(&mut self, cuda: &Cuda, kernel: &Kernel, temperature: f32, rest: &[Arg]) {
        let z = self.z.view_mut().ptr();
        let common = args![z, self.ld as i64, self.ids.len() as i32, self.ids.start as i32, 1.0 / temperature];
        let grid = Grid::new([self.piece.len() as u32, 1, 1], BLOCK as u32);
        cuda.launch(kernel, grid, &[&common, rest].concat());
    }

    /// The gradients, which lie where the logits did; each row begins where it did.
    fn gradients(&self, dz: DType) -> Mat<'_> {
        let ld = self.ld * DType::F32.size() / dz.size();
        let View::Cuda(z) = self.z.view() else { panic!("logits in host memory") };
        Mat { data: View::Cuda(z.cast(dz)), ld }
    }

    /// `c[piece, D]` = dz `W[ids]`, added to what the slices before left there.
    fn times_weight(&self, ctx: &Ctx, x: &Inputs<'_>, dz: DType, c: ViewMut<'_>) {
        let d = x.weight.cols;
        let product = Gemm {
            m: self.piece.len(),
            n: d,
            k: self.ids.len(),
            a: self.gradients(dz),
            ta: false,
            b: Mat { data: x.weight.data.slice(rows_of(&self.ids, d)), ld: d },
            tb: false,
            c: MatMut { data: c, ld: d },
            accumulate: self.ids.start > 0,
        };
        gemm(ctx, product);
    }

    /// `d_weight[ids, D]` += dz^T hidden.
    fn transposed_times_hidden(&self, ctx: &Ctx, x: &Inputs<'_>, dz: DType, d_weight: ViewMut<'_>) {
        let d = x.weight.cols;
        let product = Gemm {
            m: self.ids.len(),
            n: d,
            k: self.piece.len(),
            a: self.gradients(dz),
            ta: true,
            b: Mat { data: x.hidden.slice(rows_of(&self.piece, d)), ld: d },
            tb: false,
            c: MatMut { data: d_weight.slice(rows_of(&self.ids, d)), ld: d },
            accumulate: true,
        };
        gemm(ctx, product);
    }
}
