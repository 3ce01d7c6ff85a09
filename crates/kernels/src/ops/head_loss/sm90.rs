//! Hopper: the product with the weight and what is wanted of it in one kernel, so that logits never reach memory. For
//! bf16 operands that the copy engine can read, without given ids and the most likely ones. An element of the product
//! is one chain over D: a row's bits depend on the row and the weight alone, whatever the number of tokens.

use super::cuda::{Piece, SCRATCH};
use super::{Backward, Inputs, Outputs, rows_of};
use crate::cuda::{Cuda, Grid, Source, Swizzle, TensorMap, Value::Int, args, source};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!(sm90, "head_loss_sm90.cu");

/// Ids of a slice, of which the gradients exist at once.
pub(super) const SLICE: usize = 8192;
/// Tokens and ids of a tile.
const TILE: [usize; 2] = [128, 256];
/// Columns that are brought at once: 128 bytes of each row.
const COLS: usize = 64;
/// Stages of the ring that operands pass through.
const STAGES: usize = 4;
/// A warpgroup that brings, two that multiply.
const THREADS: u32 = 384;
/// Bytes of the ring, and of tiles on their way out: each multiplying warpgroup's 64 tokens x 128 ids.
const RING: usize = STAGES * (TILE[0] + TILE[1]) * COLS * 2;
const OUT: usize = 2 * 64 * 128 * 2;

/// Whether these kernels can read the operands.
pub(super) fn supports(cuda: &Cuda, x: &Inputs<'_>) -> bool {
    let operand = |v: View<'_>| v.dtype() == DType::Bf16 && v.ptr().is_multiple_of(16);
    cuda.has_wgmma() && operand(x.hidden) && operand(x.weight.data) && x.weight.cols.is_multiple_of(8)
}

/// lse, logp and entropy.
pub(super) fn forward(cuda: &Cuda, x: Inputs<'_>, mut out: Outputs<'_>) {
    let (n, v, d) = (x.targets.len(), x.weight.rows, x.weight.cols);
    let tiles = v.div_ceil(TILE[1]);
    let tokens = (SCRATCH / (16 * tiles)).max(1).next_multiple_of(TILE[0]).min(n);
    let (summaries, merge) = (kernel(cuda, "head_summaries", false), kernel(cuda, "head_merge", false));
    let mut parts = cuda.empty(DType::F32, tokens * tiles * 4);
    let mut z = cuda.empty(DType::F32, tokens);
    let (parts, z) = (parts.view_mut().ptr(), z.view_mut().ptr());
    let w = rows(cuda, x.weight.data, d, TILE[1]);
    for first in (0..n).step_by(tokens) {
        let piece = first..n.min(first + tokens);
        let (m, targets) = (piece.len() as i32, rows_of(x.targets, &piece, n).ptr());
        let hidden = rows(cuda, rows_of(x.hidden, &piece, n), d, TILE[0]);
        let scale = 1.0 / x.temperature;
        let all = args![hidden, w, m, v as i32, d as i32, scale, targets, z, parts];
        cuda.launch(&summaries, grid(cuda, RING), &all);
        let at = |view: &mut ViewMut<'_>| view.reborrow().slice(piece.clone()).ptr();
        let (lse, logp, entropy) = (at(&mut out.lse), at(&mut out.logp), at(&mut out.entropy));
        let all = args![m, tiles as i32, parts, v as i32, targets, z, lse, logp, entropy];
        cuda.launch(&merge, Grid::new([m.unsigned_abs().div_ceil(8), 1, 1], 256), &all);
    }
}

/// Gradients of a piece's logits, bf16 `[tokens, ids]` with rows `ld` apart.
pub(super) fn gradients(cuda: &Cuda, x: &Inputs<'_>, b: &Backward<'_>, p: &Piece, dz: ViewMut<'_>, ld: usize) {
    let (n, d) = (x.targets.len(), x.weight.cols);
    let kernel = kernel(cuda, "head_gradients", b.gradients.d_entropy.is_some());
    let hidden = rows(cuda, rows_of(x.hidden, &p.tokens, n), d, TILE[0]);
    let w = rows(cuda, x.weight.data.slice(p.ids.start * d..p.ids.end * d), d, TILE[1]);
    let (m, ids) = (p.tokens.len(), p.ids.len());
    let dz = cuda.tensor_map(
        dz.as_view().ptr(),
        DType::Bf16,
        &[ids as u64, m as u64],
        &[ld as u64 * 2],
        &[64, 64],
        Swizzle::B128,
    );
    let at = |view: View<'_>| rows_of(view, &p.tokens, n).ptr();
    let [targets, lse, entropy, d_logp] = [x.targets, b.lse, b.entropy, b.gradients.d_logp].map(at);
    let d_entropy = b.gradients.d_entropy.map_or(0, at);
    let sizes = args![hidden, w, dz, m as i32, ids as i32, d as i32, p.ids.start as i32, 1.0 / x.temperature];
    let rows = args![targets, lse, entropy, d_logp, d_entropy];
    cuda.launch(&kernel, grid(cuda, RING + OUT), &[&sizes[..], &rows].concat());
}

fn kernel(cuda: &Cuda, name: &'static str, spread: bool) -> crate::cuda::Kernel {
    cuda.kernel(&SOURCE, name, &[("STAGES", Int(STAGES as i64)), ("SPREAD", Int(spread.into()))])
}

/// Rows of `d` bf16, as tiles of `tile` rows.
fn rows(cuda: &Cuda, data: View<'_>, d: usize, tile: usize) -> TensorMap {
    let dims = [d as u64, (data.len() / d) as u64];
    cuda.tensor_map(data.ptr(), DType::Bf16, &dims, &[d as u64 * 2], &[COLS as u32, tile as u32], Swizzle::B128)
}

/// A block for each multiprocessor; each goes from tile to tile.
fn grid(cuda: &Cuda, shared: usize) -> Grid {
    Grid::new([cuda.sms(), 1, 1], THREADS).shared(shared as u32)
}
