//! Launches of the look-up and of its adjoint, which sorts the positions by id first: the number of passes comes from
//! the size of the vocabulary, never from the ids.

use crate::cuda::{Cuda, Grid, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr, ptr_mut};
use crate::{DType, View, ViewMut, Weight};

static SOURCE: Source = source!("embedding.cu");

const THREADS: usize = 256;
/// Packs of a thread of the forward: the kernel's STEP.
const STEP: usize = 4;
/// Positions of a block of the sort and bits of a pass: the kernel's TILE and BITS.
const TILE: usize = 1024;
const BITS: u32 = 9;
/// Warps of a block that sums.
const SUM_WARPS: usize = 4;
const WARP: usize = 32;

pub fn forward(cuda: &Cuda, ids: View<'_>, table: &Weight<'_>, mut y: ViewMut<'_>) {
    let (n, d) = (ids.len(), table.cols);
    let (from, to) = (float(table.data.dtype()), float(y.dtype()));
    let (ids, rows, out) = (ptr(ids, DType::I32), table.data.ptr(), y.ptr());
    let pack = 16 / from.size().max(to.size());
    let wide = d.is_multiple_of(pack) && aligned(pack * from.size(), &[rows]) && aligned(pack * to.size(), &[out]);
    let pack = if wide { pack } else { 1 };
    let defines = [("TABLE", Type(from)), ("ELEM", Type(to)), ("PACK", Int(pack as i64))];
    let kernel = cuda.kernel(&SOURCE, "embedding_forward", &defines);
    let grid = Grid::new([blocks(n * (d / pack), THREADS * STEP), 1, 1], THREADS as u32);
    cuda.launch(&kernel, grid, &args![ids, rows, out, int(n), int(d) as u32, int(table.rows)]);
}

pub fn backward(cuda: &Cuda, ids: View<'_>, dy: View<'_>, d: usize, mut dtable: ViewMut<'_>) {
    let (dtype, n, vocabulary) = (float(dy.dtype()), ids.len(), dtable.len() / d);
    let (ids, dy, dtable) = (ptr(ids, DType::I32), dy.ptr(), ptr_mut(&mut dtable, DType::F32));
    let pack = 16 / dtype.size();
    let wide = d.is_multiple_of(pack) && aligned(16, &[dy, dtable]);
    let pack = if wide { pack } else { 1 };
    let defines = [("ELEM", Type(dtype)), ("PACK", Int(pack as i64))];
    let kernel = |name| cuda.kernel(&SOURCE, name, &defines);

    // Two places for ids and positions, between which the passes go.
    let mut pairs = [cuda.empty(DType::I32, 2 * n), cuda.empty(DType::I32, 2 * n)];
    let [first, second] = pairs.each_mut().map(|b| b.view_mut().ptr());
    let tiles = blocks(n, TILE);
    let mut counts = cuda.empty(DType::I32, tiles as usize * (1 << BITS));
    let counts = counts.view_mut().ptr();
    let sort = Grid::new([tiles, 1, 1], TILE as u32);
    let (mut from_ids, mut from_positions) = (ids, 0u64);
    let bits = usize::BITS - vocabulary.saturating_sub(1).leading_zeros();
    for pass in 0..bits.div_ceil(BITS).max(1) {
        let shift = int((pass * BITS) as usize);
        let to = if pass % 2 == 0 { first } else { second };
        let to_positions = to + (n * size_of::<i32>()) as u64;
        cuda.launch(&kernel("embedding_count"), sort, &args![from_ids, counts, int(n), shift]);
        let moved = args![from_ids, from_positions, counts, to, to_positions, int(n), shift];
        cuda.launch(&kernel("embedding_sort"), sort, &moved);
        (from_ids, from_positions) = (to, to_positions);
    }
    // Blocks for the ids of many positions, a few columns each, and for those of few: see the kernel.
    let threads = WARP * SUM_WARPS;
    let windows = n.div_ceil(WARP);
    let many_columns = d.div_ceil(threads * (if wide { 4 / dtype.size() } else { 1 }));
    let few_columns = d.div_ceil(threads * pack);
    let grid = Grid::new([blocks(windows * many_columns + n * few_columns, 1), 1, 1], threads as u32);
    let [windows, many_columns, few_columns] = [windows, many_columns, few_columns].map(|x| int(x) as u32);
    let table = [int(n), int(d), int(vocabulary)];
    let sums = args![
        from_ids,
        from_positions,
        dy,
        dtable,
        table[0],
        table[1] as u32,
        table[2],
        windows,
        many_columns,
        few_columns
    ];
    cuda.launch(&kernel("embedding_sum"), grid, &sums);
}
