//! Attention for any GPU and any head dims: products of bf16 by mma.sync where the head dims leave room for their sums
//! in registers, f32 arithmetic otherwise. Lengths stay on the device: grids have room for the most tiles that the
//! packed batch can have, and a block finds its sequence itself.

use super::{Backward, Inputs, Shape};
use crate::cuda::{Arg, Cuda, Grid, Kernel, Source, Value, args, source};
use crate::{DType, View, ViewMut};

static MMA: Source = source!(mma, "any_mma.cu");
static PLAIN: Source = source!("any_plain.cu");

/// Rows of a block, of queries or of keys.
const TILE: usize = 64;
/// Rows that a backward kernel by mma.sync reads at a time.
const STEP: usize = 32;
/// Threads of a block of the plain kernels, and of those beside them.
const THREADS: u32 = 256;
/// Most elements of what heads add to dk_pe, kept in f32 until they are summed.
const PARTS: usize = 32 << 20;

/// The kernels of one case.
struct Kernels<'a> {
    cuda: &'a Cuda,
    shape: Shape,
    dtype: DType,
    mma: bool,
    wide: bool,
    seqs: usize,
    nq: usize,
    nk: usize,
}

impl<'a> Kernels<'a> {
    /// `pointers`: all that is read and written by rows.
    fn new(cuda: &'a Cuda, shape: Shape, x: &Inputs<'_>, pointers: &[u64]) -> Self {
        let Shape { heads: h, nope: p, rope: r, v: w, k_pe_stride: stride, .. } = shape;
        let dtype = x.q.dtype();
        let sums = (p + r).next_multiple_of(16) + w.next_multiple_of(16);
        let tiles = (p + r).div_ceil(TILE) + w.div_ceil(TILE);
        assert!(tiles <= 9, "attention of heads of {p} + {r} and {w}: {tiles} tiles of {TILE}, there is room for 9");
        let units = p % 8 == 0 && r % 8 == 0 && w % 8 == 0 && (r == 0 || stride % 8 == 0);
        Self {
            cuda,
            shape,
            dtype,
            mma: dtype == DType::Bf16 && sums <= 320,
            wide: units && pointers.iter().all(|p| p % 16 == 0),
            seqs: x.cu_q.len() - 1,
            nq: x.q.len() / (h * (p + r)),
            nk: x.kv_up.len() / (h * (p + w)),
        }
    }

    fn plain(&self, name: &'static str) -> Kernel {
        let Shape { nope, rope, v, .. } = self.shape;
        let defines = [
            ("ELEM", Value::Type(self.dtype)),
            ("NOPE", Value::Int(nope as i64)),
            ("ROPE", Value::Int(rope as i64)),
            ("VDIM", Value::Int(v as i64)),
        ];
        self.cuda.kernel(&PLAIN, name, &defines)
    }

    /// One of the two of each name, with its grid of `blocks`; by mma.sync a block shares `bytes`.
    fn pick(&self, mma: &'static str, plain: &'static str, blocks: usize, bytes: usize) -> (Kernel, Grid) {
        let blocks = u32::try_from(blocks).unwrap_or_else(|_| panic!("{plain}: {blocks} blocks"));
        if !self.mma {
            return (self.plain(plain), Grid::new([blocks, 1, 1], THREADS));
        }
        let Shape { nope, rope, v, .. } = self.shape;
        let defines = [
            ("NOPE", Value::Int(nope as i64)),
            ("ROPE", Value::Int(rope as i64)),
            ("VDIM", Value::Int(v as i64)),
            ("WIDE", Value::Int(i64::from(self.wide))),
        ];
        (self.cuda.kernel(&MMA, mma, &defines), Grid::new([blocks, 1, 1], 128).shared(bytes as u32))
    }

    /// Bytes of a row of keys or queries, and of one of values, in shared memory.
    fn rows(&self) -> (usize, usize) {
        let Shape { nope, rope, v, .. } = self.shape;
        let padded = |n: usize| 2 * (n.next_multiple_of(16) + 8);
        (padded(nope + rope), padded(v))
    }

    /// The most tiles that queries of these sequences fill.
    fn query_tiles(&self) -> usize {
        self.nq / TILE + self.seqs
    }
}

/// What every kernel's arguments begin with.
fn inputs(x: &Inputs<'_>) -> [Arg; 5] {
    args![x.q.ptr(), x.kv_up.ptr(), x.k_pe.ptr(), x.cu_q.ptr(), x.cu_k.ptr()]
}

/// See [`super::forward`].
pub(super) fn forward(cuda: &Cuda, shape: Shape, x: &Inputs<'_>, mut out: ViewMut<'_>, mut lse: ViewMut<'_>) {
    let k = Kernels::new(cuda, shape, x, &[x.q.ptr(), x.kv_up.ptr(), x.k_pe.ptr(), out.ptr()]);
    let (key, value) = k.rows();
    let slots = k.query_tiles();
    let (kernel, grid) = k.pick("mla_any_forward", "mla_plain_forward", slots * shape.heads, TILE * (2 * key + value));
    let args = args![
        out.ptr(),
        lse.ptr(),
        k.seqs as i32,
        shape.heads as i32,
        slots as i32,
        shape.k_pe_stride as i64,
        shape.scale,
    ];
    cuda.launch(&kernel, grid, &[&inputs(x)[..], &args].concat());
}

/// See [`super::backward`].
pub(super) fn backward(cuda: &Cuda, shape: Shape, x: &Inputs<'_>, mut b: Backward<'_>) {
    let pointers = [x.q.ptr(), x.kv_up.ptr(), x.k_pe.ptr(), b.dout.ptr(), b.dq.ptr(), b.dkv_up.ptr()];
    let k = Kernels::new(cuda, shape, x, &pointers);
    let rows = k.nq * shape.heads;
    let delta = cuda.empty(DType::F32, rows);
    let grid = Grid::new([rows.div_ceil(THREADS as usize / 32) as u32, 1, 1], THREADS);
    let args = args![b.out.ptr(), b.dout.ptr(), delta.view().ptr(), rows as i64];
    cuda.launch(&k.plain("mla_delta"), grid, &args);
    queries(&k, x, &mut b, delta.view());
    keys(&k, x, &mut b, delta.view());
}

fn queries(k: &Kernels<'_>, x: &Inputs<'_>, b: &mut Backward<'_>, delta: View<'_>) {
    let (s, (key, value), slots) = (k.shape, k.rows(), k.query_tiles());
    let (kernel, grid) = k.pick(
        "mla_any_backward_queries",
        "mla_plain_backward_queries",
        slots * s.heads,
        (TILE + 2 * STEP) * (key + value),
    );
    let args = args![
        b.dout.ptr(),
        b.lse.ptr(),
        delta.ptr(),
        b.dq.ptr(),
        k.seqs as i32,
        s.heads as i32,
        slots as i32,
        s.k_pe_stride as i64,
        s.scale,
    ];
    k.cuda.launch(&kernel, grid, &[&inputs(x)[..], &args].concat());
}

/// Heads are taken some at a time, so that what they add to dk_pe has a bounded size; the sums' order is theirs.
fn keys(k: &Kernels<'_>, x: &Inputs<'_>, b: &mut Backward<'_>, delta: View<'_>) {
    let (s, (key, value)) = (k.shape, k.rows());
    let plane = k.nk * s.rope;
    let most = (PARTS / plane.max(1)).clamp(1, s.heads);
    let parts = k.cuda.empty(DType::F32, most * plane);
    let sums = k.cuda.empty(DType::F32, if most < s.heads { plane } else { 0 });
    let bytes = (TILE + 2 * STEP) * (key + value) + 2 * 2 * STEP * size_of::<f32>();
    for first in (0..s.heads).step_by(most) {
        let some = most.min(s.heads - first);
        let (kernel, grid) =
            k.pick("mla_any_backward_keys", "mla_plain_backward_keys", (k.nk / TILE + k.seqs) * some, bytes);
        let args = args![
            b.dout.ptr(),
            b.lse.ptr(),
            delta.ptr(),
            b.dkv_up.ptr(),
            parts.view().ptr(),
            k.seqs as i32,
            s.heads as i32,
            first as i32,
            some as i32,
            s.k_pe_stride as i64,
            s.scale,
        ];
        k.cuda.launch(&kernel, grid, &[&inputs(x)[..], &args].concat());
        let grid = Grid::new([plane.div_ceil(THREADS as usize) as u32, 1, 1], THREADS);
        let args = args![
            parts.view().ptr(),
            sums.view().ptr(),
            b.dk_pe.ptr(),
            k.nk as i64,
            some as i32,
            b.dk_pe_stride as i64,
            i32::from(first == 0),
            i32::from(first + some == s.heads),
        ];
        k.cuda.launch(&k.plain("mla_sum_heads"), grid, &args);
    }
}
