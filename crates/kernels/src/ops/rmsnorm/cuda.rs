//! Launches of the norm: how many threads share a row, and how its weight's gradient is cut into blocks of rows.

use super::{BackwardInput, Forward};
use crate::cuda::{Cuda, Grid, Kernel, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr, ptr_mut};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("rmsnorm.cu");

/// How a row is cut: in packs of 16 bytes, or of one element where the rows do not allow that.
struct Row {
    dtype: DType,
    wide: bool,
    /// Packs of a row.
    packs: usize,
}

impl Row {
    /// Rows of `d` elements; what must be a multiple of 16 bytes: addresses and, in elements, distances of rows.
    fn new(dtype: DType, d: usize, addresses: &[u64], strides: &[usize]) -> Self {
        let size = float(dtype).size();
        let pack = 16 / size;
        let wide = d.is_multiple_of(pack) && aligned(16, addresses) && strides.iter().all(|s| s.is_multiple_of(pack));
        Self { dtype, wide, packs: if wide { d / pack } else { d } }
    }

    /// (threads of a row, rows of a block), a thread having `each` packs, or more where that were too many threads. A
    /// warp takes a short row alone, which costs no barrier.
    fn team(&self, each: usize) -> (usize, usize) {
        let threads = self.packs.div_ceil(each).next_multiple_of(32).clamp(32, 512);
        (threads, if threads == 32 { 4 } else { 1 })
    }

    fn kernel(&self, cuda: &Cuda, name: &'static str, (team, rows): (usize, usize)) -> Kernel {
        let defines = [
            ("ELEM", Type(self.dtype)),
            ("WIDE", Int(self.wide.into())),
            ("TEAM", Int(team as i64)),
            ("ROWS", Int(rows as i64)),
            ("PER_THREAD", Int(self.packs.div_ceil(team) as i64)),
        ];
        cuda.kernel(&SOURCE, name, &defines)
    }
}

pub fn forward(cuda: &Cuda, mut a: Forward<'_>) {
    let (dtype, n, d) = (a.x.dtype(), a.rstd.len(), a.weight.len());
    let (x, w) = (a.x.ptr(), ptr(a.weight, DType::F32));
    let (y, rstd) = (ptr_mut(&mut a.y, dtype), ptr_mut(&mut a.rstd, DType::F32));
    let row = Row::new(dtype, d, &[x, w, y], &[a.x_stride]);
    let (team, rows) = row.team(4);
    let kernel = row.kernel(cuda, "rmsnorm_forward", (team, rows));
    let grid = Grid::new([blocks(n, rows), 1, 1], (team * rows) as u32);
    cuda.launch(&kernel, grid, &args![x, a.x_stride as i64, w, y, rstd, int(n), int(d), a.eps]);
}

pub fn backward_input(cuda: &Cuda, mut a: BackwardInput<'_>) {
    let (dtype, n, d) = (a.x.dtype(), a.rstd.len(), a.weight.len());
    let (dy, x, w) = (ptr(a.dy, dtype), a.x.ptr(), ptr(a.weight, DType::F32));
    let (rstd, dx) = (ptr(a.rstd, DType::F32), ptr_mut(&mut a.dx, dtype));
    let row = Row::new(dtype, d, &[dy, x, w, dx], &[a.x_stride, a.dx_stride]);
    let (team, rows) = row.team(2);
    let kernel = row.kernel(cuda, "rmsnorm_backward_input", (team, rows));
    let grid = Grid::new([blocks(n, rows), 1, 1], (team * rows) as u32);
    let (x_stride, dx_stride) = (a.x_stride as i64, a.dx_stride as i64);
    let accumulate = i32::from(a.accumulate);
    cuda.launch(&kernel, grid, &args![dy, x, x_stride, w, rstd, dx, dx_stride, int(n), int(d), accumulate]);
}

/// Rows that a block of the weight's gradient sums, of n rows that are cut into `tiles` blocks of columns: as many as
/// leave enough blocks for a large GPU. It depends on shapes alone, as the order of the sum must.
fn block_rows(n: usize, tiles: usize) -> usize {
    const ENOUGH: usize = 384;
    [256, 128, 64].into_iter().find(|rows| n.div_ceil(*rows) * tiles >= ENOUGH).unwrap_or(32)
}

pub fn backward_weight(cuda: &Cuda, dy: View<'_>, x: View<'_>, x_stride: usize, rstd: View<'_>, mut dw: ViewMut<'_>) {
    let (dtype, n, d) = (x.dtype(), rstd.len(), dw.len());
    let (dy, x, rstd, dw) = (ptr(dy, dtype), x.ptr(), ptr(rstd, DType::F32), ptr_mut(&mut dw, DType::F32));
    let row = Row::new(dtype, d, &[dy, x], &[x_stride]);
    let kernel = |name| row.kernel(cuda, name, (32, 8));
    let tiles = blocks(row.packs, 32);
    let rows = block_rows(n, tiles as usize);
    let row_blocks = blocks(n, rows);
    // One block of rows adds to dw itself.
    let several = if row_blocks > 1 { row_blocks as usize } else { 0 };
    let mut partial = cuda.empty(DType::F32, several * d);
    let mut partial_view = partial.view_mut();
    let partial = partial_view.ptr();
    let grid = Grid::new([tiles, row_blocks, 1], 256);
    let x_stride = x_stride as i64;
    cuda.launch(
        &kernel("rmsnorm_backward_weight"),
        grid,
        &args![dy, x, x_stride, rstd, partial, dw, int(n), int(d), int(rows)],
    );
    if several > 0 {
        let grid = Grid::new([blocks(d, 32), 1, 1], 256);
        cuda.launch(&kernel("rmsnorm_backward_weight_sum"), grid, &args![partial, dw, int(several), int(d)]);
    }
}
