//! Absorbed attention on a GPU: parts of each query's keys, then their merger. Queries are taken some at a time, so that
//! what the parts leave has a bounded size; the bits do not depend on how many.

use super::{BLOCK, Decode};
use crate::DType;
use crate::cuda::{Cuda, Grid, Source, Value, args, source};

static SOURCE: Source = source!("mla_decode.cu");

/// Heads and threads of a block, columns of a row that it keeps at a time, most parts of a query, least blocks of one:
/// as in the kernel.
const HEADS: usize = 16;
const THREADS: u32 = 256;
const STEP: usize = 64;
const PARTS: usize = 32;
const LEAST: usize = 2;
/// Most elements of what the parts leave.
const SUMS: usize = 16 << 20;

/// See [`super::forward`].
pub(super) fn forward(cuda: &Cuda, mut a: Decode<'_>) {
    let (h, c, width, seqs) = (a.heads, a.latent, a.latent + a.rope, a.lengths.len());
    let nq = a.q.len() / (h * width);
    if nq == 0 {
        return;
    }
    let defines =
        [("ELEM", Value::Type(a.q.dtype())), ("LATENT", Value::Int(c as i64)), ("ROPE", Value::Int(a.rope as i64))];
    let find = cuda.kernel(&SOURCE, "mla_decode_parts", &defines);
    let merge = cuda.kernel(&SOURCE, "mla_decode_merge", &defines);
    let shared = size_of::<f32>() * (width * HEADS + BLOCK * (STEP + 1) + BLOCK * (HEADS + 4) + HEADS);
    let max_blocks = a.block_table.len() / seqs;
    let parts = max_blocks.div_ceil(LEAST).clamp(1, PARTS);
    // A grid's second dimension ends at 65,535.
    let most = (SUMS / (h * parts * c)).clamp(1, 65_535).min(nq);
    let sums = cuda.empty(DType::F32, most * h * parts * c);
    let stats = cuda.empty(DType::F32, most * h * parts * 2);
    for first in (0..nq).step_by(most) {
        let some = most.min(nq - first) as u32;
        let grid = Grid::new([(h.div_ceil(HEADS) * parts) as u32, some, 1], THREADS).shared(shared as u32);
        let args = args![
            a.q.ptr(),
            a.cache.ptr(),
            a.block_table.ptr(),
            a.cu_q.ptr(),
            a.lengths.ptr(),
            sums.view().ptr(),
            stats.view().ptr(),
            first as i32,
            seqs as i32,
            h as i32,
            max_blocks as i32,
            parts as i32,
            a.scale,
        ];
        cuda.launch(&find, grid, &args);
        let args = args![
            sums.view().ptr(),
            stats.view().ptr(),
            a.cu_q.ptr(),
            a.lengths.ptr(),
            a.out.ptr(),
            a.lse.ptr(),
            first as i32,
            seqs as i32,
            h as i32,
            parts as i32,
        ];
        cuda.launch(&merge, Grid::new([h as u32, some, 1], THREADS), &args);
    }
}
