//! Absorbed attention on a GPU: parts of each query's keys, then their merger. Queries are taken some at a time, so
//! that what the parts leave has a bounded size; the bits do not depend on how many.

use super::{BLOCK, Decode};
use crate::DType;
use crate::cuda::{Cuda, Grid, Kernel, Source, Value, args, source};

static PLAIN: Source = source!("mla_decode.cu");
static MMA: Source = source!(mma, "mla_decode_mma.cu");

/// Heads of a block, most parts of a query, least blocks of one: as in the kernels.
const HEADS: usize = 16;
const PARTS: usize = 32;
const LEAST: usize = 2;
/// Most elements of what the parts leave.
const SUMS: usize = 16 << 20;
/// Threads of a block of the plain kernel, and of the one that merges.
const THREADS: u32 = 256;
/// Columns of a row that the plain kernel keeps at a time.
const STEP: usize = 64;
/// Widest row for which the other has room in shared memory.
const WIDEST: usize = 576;

/// What finds the parts, its threads and the bytes that a block shares: by mma.sync for bf16 in whole vectors of 16
/// bytes.
fn finder(cuda: &Cuda, a: &Decode<'_>) -> (Kernel, u32, usize) {
    let width = a.latent + a.rope;
    let mut defines = vec![("LATENT", Value::Int(a.latent as i64)), ("ROPE", Value::Int(a.rope as i64))];
    let even = a.latent.is_multiple_of(8) && a.rope.is_multiple_of(8) && width <= WIDEST;
    let aligned = [a.q.ptr(), a.cache.ptr()].iter().all(|p| p.is_multiple_of(16));
    if a.q.dtype() == DType::Bf16 && even && aligned {
        let row = DType::Bf16.size() * (width.next_multiple_of(16) + 8);
        let weights = DType::Bf16.size() * HEADS * (BLOCK + 8);
        let bytes = (HEADS + BLOCK) * row + weights + 2 * 4 * HEADS * size_of::<f32>();
        return (cuda.kernel(&MMA, "mla_decode_parts_mma", &defines), 128, bytes);
    }
    defines.push(("ELEM", Value::Type(a.q.dtype())));
    let floats = width * HEADS + BLOCK * (STEP + 1) + BLOCK * (HEADS + 4) + HEADS;
    (cuda.kernel(&PLAIN, "mla_decode_parts", &defines), THREADS, floats * size_of::<f32>())
}

/// How many of `nq` rows are computed at once, each with so many elements of partial sums, and the elements of all of these.
/// Never fewer for more rows or more elements: that a longer text takes at least as much memory is what its
/// prediction stands on. A grid's second dimension ends at 65,535.
fn at_once(nq: usize, each: usize) -> (usize, usize) {
    let most = (SUMS / each).clamp(1, 65_535).min(nq);
    (most, if most < nq { SUMS.max(each) } else { most * each })
}

/// See [`super::forward`].
pub(super) fn forward(cuda: &Cuda, mut a: Decode<'_>) {
    let (h, c, width, seqs) = (a.heads, a.latent, a.latent + a.rope, a.lengths.len());
    let nq = a.q.len() / (h * width);
    if nq == 0 {
        return;
    }
    let defines =
        [("ELEM", Value::Type(a.q.dtype())), ("LATENT", Value::Int(c as i64)), ("ROPE", Value::Int(a.rope as i64))];
    let (find, threads, shared) = finder(cuda, &a);
    let merge = cuda.kernel(&PLAIN, "mla_decode_merge", &defines);
    let max_blocks = a.block_table.len() / seqs;
    let parts = max_blocks.div_ceil(LEAST).clamp(1, PARTS);
    let (most, elements) = at_once(nq, h * parts * c);
    let sums = cuda.empty(DType::F32, elements);
    let stats = cuda.empty(DType::F32, elements / c * 2);
    for first in (0..nq).step_by(most) {
        let some = most.min(nq - first) as u32;
        let grid = Grid::new([(h.div_ceil(HEADS) * parts) as u32, some, 1], threads).shared(shared as u32);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// 16 and 128 heads, latents of 512: over the number of parts and of rows.
    #[test]
    fn more_work_takes_no_less_memory() {
        for heads in [16, 128] {
            let mut before = vec![0; 300];
            for parts in 1..=PARTS {
                let mut fewer = 0;
                for (nq, before) in (1..).zip(&mut before) {
                    let each = heads * parts * 512;
                    let (most, elements) = at_once(nq, each);
                    assert!(most >= 1 && most <= nq && most * each <= elements, "{nq} rows, {parts} parts");
                    assert!(elements >= fewer && elements >= *before, "{nq} rows, {parts} parts: {elements}");
                    (fewer, *before) = (elements, elements);
                }
            }
        }
    }
}
