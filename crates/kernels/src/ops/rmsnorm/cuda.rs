//! Launches of the norm: how many threads share a row, and how its backward is cut into blocks of rows.

use super::{Backward, Forward, WeightGradient};
use crate::DType;
use crate::cuda::{Cuda, Grid, Kernel, Source, Value, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr, ptr_mut};

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

    /// Threads that share a row, each having `packs` packs, or more where that were too many threads. A warp takes a
    /// short row alone, which costs no barrier.
    fn team(&self, packs: usize, rows: usize) -> Team {
        let threads = self.packs.div_ceil(packs).next_multiple_of(32).clamp(32, 512);
        Team { threads, rows: if threads == 32 { rows } else { 1 } }
    }

    fn kernel(&self, cuda: &Cuda, name: &'static str, team: &Team, more: &[(&'static str, Value)]) -> Kernel {
        let defines = [
            ("ELEM", Type(self.dtype)),
            ("WIDE", Int(self.wide.into())),
            ("TEAM", Int(team.threads as i64)),
            ("ROWS", Int(team.rows as i64)),
            ("PER_THREAD", Int(self.packs.div_ceil(team.threads) as i64)),
        ];
        cuda.kernel(&SOURCE, name, &[&defines, more].concat())
    }
}

/// Threads of a row, and rows that a block has at once.
struct Team {
    threads: usize,
    rows: usize,
}

impl Team {
    fn grid(&self, blocks: u32) -> Grid {
        Grid::new([blocks, 1, 1], (self.threads * self.rows) as u32)
    }
}

pub fn forward(cuda: &Cuda, mut a: Forward<'_>) {
    let (dtype, n, d) = (a.x.dtype(), a.rstd.len(), a.weight.len());
    let (x, w) = (a.x.ptr(), ptr(a.weight, DType::F32));
    let (y, rstd) = (ptr_mut(&mut a.y, dtype), ptr_mut(&mut a.rstd, DType::F32));
    let row = Row::new(dtype, d, &[x, w, y], &[a.x_stride]);
    let team = row.team(4, 4);
    let kernel = row.kernel(cuda, "rmsnorm_forward", &team, &[]);
    cuda.launch(
        &kernel,
        team.grid(blocks(n, team.rows)),
        &args![x, a.x_stride as i64, w, y, rstd, int(n), int(d), a.eps],
    );
}

/// Rows that a block of backward takes, of n rows that each have so many threads. It depends on shapes alone, as the order
/// of the weight's sum must.
fn block_rows(n: usize, team: &Team) -> usize {
    const MOST_BLOCKS: usize = 1024;
    let few = if team.rows > 1 { 32 } else { (team.threads / 4).clamp(16, 64) };
    n.div_ceil(MOST_BLOCKS).max(few)
}

pub fn backward(cuda: &Cuda, a: Backward<'_>) {
    let (dtype, n, d) = (a.x.dtype(), a.rstd.len(), a.weight.len());
    let (dy, x, w, rstd) = (ptr(a.dy, dtype), a.x.ptr(), ptr(a.weight, DType::F32), ptr(a.rstd, DType::F32));
    let (input, weight) = (a.input.is_some(), a.weight_gradient.is_some());
    let (dx, dx_stride, add) =
        a.input.map_or((0, a.x_stride, false), |mut i| (ptr_mut(&mut i.dx, dtype), i.dx_stride, i.accumulate));
    let row = Row::new(dtype, d, &[dy, x, w, dx], &[a.x_stride, dx_stride]);
    let team = row.team(2, 4);
    let block_rows = block_rows(n, &team);
    let row_blocks = blocks(n, block_rows);
    let mut partial = cuda.empty(DType::F32, if weight { row_blocks as usize * d } else { 0 });
    let mut partial = partial.view_mut();
    let asked = [("INPUT", Int(input.into())), ("WEIGHT", Int(weight.into()))];
    let kernel = row.kernel(cuda, "rmsnorm_backward", &team, &asked);
    let (x_stride, dx_stride, sums) = (a.x_stride as i64, dx_stride as i64, partial.ptr());
    let all = args![dy, x, x_stride, w, rstd, dx, dx_stride, sums, int(n), int(d), int(block_rows), i32::from(add)];
    cuda.launch(&kernel, team.grid(row_blocks), &all);
    if let Some(WeightGradient { mut dw, accumulate }) = a.weight_gradient {
        let kernel = row.kernel(cuda, "rmsnorm_backward_sum", &team, &asked);
        let all = args![sums, ptr_mut(&mut dw, DType::F32), row_blocks as i32, int(d), i32::from(accumulate)];
        cuda.launch(&kernel, Grid::new([blocks(d, 32), 1, 1], 1024), &all);
    }
}
