//! Launches of SwiGLU. The number of rows may be known to the device alone: grids come from the buffers.

use super::Backward;
use crate::cuda::{Cuda, Grid, Source, Value, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr, ptr_mut};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("swiglu.cu");

/// Threads of a block, unless a row has a block of its own: the kernel's THREADS.
const THREADS: usize = 256;
/// Packs of a thread in flight.
const STEP: usize = 2;
const WARP: usize = 32;

/// (elements of a pack, packs of a row): 16 bytes, or single elements where rows do not allow that.
fn packs(dtype: DType, width: usize, addresses: &[u64]) -> (usize, usize) {
    let pack = 16 / float(dtype).size();
    let pack = if width.is_multiple_of(pack) && aligned(16, addresses) { pack } else { 1 };
    (pack, width / pack)
}

fn defines(dtype: DType, pack: usize, team: usize) -> [(&'static str, Value); 4] {
    let wide = Int((pack > 1).into());
    [("ELEM", Type(dtype)), ("WIDE", wide), ("TEAM", Int(team as i64)), ("STEP", Int(STEP as i64))]
}

/// Where the count of rows is; 0 for none.
fn count(rows: Option<View<'_>>) -> u64 {
    rows.map_or(0, |r| ptr(r, DType::I32))
}

pub fn forward(cuda: &Cuda, gate_up: View<'_>, width: usize, rows: Option<View<'_>>, mut y: ViewMut<'_>) {
    let dtype = y.dtype();
    let (gate_up, out) = (ptr(gate_up, dtype), y.ptr());
    let (pack, packs) = packs(dtype, width, &[gate_up, out]);
    let n = y.len() / width;
    let kernel = cuda.kernel(&SOURCE, "swiglu_forward", &defines(dtype, pack, WARP));
    let grid = Grid::new([blocks(n * packs, THREADS * STEP), 1, 1], THREADS as u32);
    cuda.launch(&kernel, grid, &args![gate_up, out, count(rows), n as i64, int(width) as u32]);
}

pub fn backward(cuda: &Cuda, mut b: Backward<'_>) {
    let dtype = b.dy.dtype();
    let (dy, gate_up) = (b.dy.ptr(), ptr_mut(&mut b.gate_up, dtype));
    let (pack, packs) = packs(dtype, b.width, &[dy, gate_up]);
    let n = b.dy.len() / b.width;
    // Threads that share a row, and rows of a block: a block's warps each have one where rows are short.
    let team = if packs <= STEP * WARP { WARP } else { packs.div_ceil(STEP).next_multiple_of(WARP).min(THREADS) };
    let rows = if team == WARP { THREADS / WARP } else { 1 };
    let kernel = cuda.kernel(&SOURCE, "swiglu_backward", &defines(dtype, pack, team));
    let (weights, d_weights) = b.weights.map_or((0, 0), |(w, mut d)| (ptr(w, DType::F32), ptr_mut(&mut d, DType::F32)));
    let grid = Grid::new([blocks(n, rows), 1, 1], (team * rows) as u32);
    cuda.launch(&kernel, grid, &args![dy, gate_up, count(b.rows), weights, d_weights, n as i64, int(b.width) as u32]);
}
