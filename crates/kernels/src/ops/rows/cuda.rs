//! Launches over rows, in the widest units that rows and addresses allow.

use crate::cuda::{Cuda, Grid, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr, ptr_mut};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("rows.cu");

const THREADS: usize = 256;
/// Units of a thread: the kernel's STEP.
const STEP: usize = 4;

/// Elements of the widest unit of at most 16 bytes that divides distances (in elements) and addresses.
fn unit(dtype: DType, distances: &[usize], addresses: &[u64]) -> usize {
    let size = float(dtype).size();
    let fits =
        |&elements: &usize| distances.iter().all(|d| d.is_multiple_of(elements)) && aligned(elements * size, addresses);
    [16, 8, 4, 2].into_iter().filter(|bytes| *bytes >= size).map(|bytes| bytes / size).find(fits).unwrap_or(1)
}

fn grid(units: usize) -> Grid {
    Grid::new([blocks(units, THREADS * STEP), 1, 1], THREADS as u32)
}

pub fn gather(cuda: &Cuda, x: View<'_>, dim: usize, index: View<'_>, mut out: ViewMut<'_>) {
    if dim == 0 {
        return;
    }
    let (dtype, n, rows) = (x.dtype(), index.len(), x.len() / dim);
    let (x, index, out) = (x.ptr(), ptr(index, DType::I32), ptr_mut(&mut out, dtype));
    let unit = unit(dtype, &[dim], &[x, out]);
    let units = dim / unit;
    let kernel = cuda.kernel(&SOURCE, "gather", &[("UNIT", Int((unit * dtype.size()) as i64))]);
    cuda.launch(&kernel, grid(n * units), &args![x, index, out, int(n), int(units) as u32, int(rows)]);
}

pub fn scatter_add(cuda: &Cuda, d: View<'_>, dim: usize, index: View<'_>, mut x: ViewMut<'_>) {
    if dim == 0 {
        return;
    }
    let (dtype, n, rows) = (d.dtype(), index.len(), x.len() / dim);
    let (d, index, x) = (d.ptr(), ptr(index, DType::I32), ptr_mut(&mut x, dtype));
    let unit = unit(dtype, &[dim], &[d, x]);
    let units = dim / unit;
    let defines = [("UNIT", Int((unit * dtype.size()) as i64)), ("ELEM", Type(dtype))];
    let kernel = cuda.kernel(&SOURCE, "scatter_add", &defines);
    cuda.launch(&kernel, grid(n * units), &args![d, index, x, int(n), int(units) as u32, int(rows)]);
}

pub fn copy_strided(
    cuda: &Cuda,
    (from, from_stride): (View<'_>, usize),
    (mut to, to_stride): (ViewMut<'_>, usize),
    rows: usize,
    width: usize,
) {
    if rows == 0 || width == 0 {
        return;
    }
    let need = |stride| (rows - 1) * stride + width;
    assert!(
        from.len() >= need(from_stride) && to.len() >= need(to_stride),
        "{rows} rows of {width}, {from_stride} and {to_stride} apart, from {} to {}",
        from.len(),
        to.len()
    );
    let dtype = from.dtype();
    let (from, to) = (from.ptr(), ptr_mut(&mut to, dtype));
    let unit = unit(dtype, &[width, from_stride, to_stride], &[from, to]);
    let units = width / unit;
    let kernel = cuda.kernel(&SOURCE, "copy_strided", &[("UNIT", Int((unit * dtype.size()) as i64))]);
    let (from_stride, to_stride) = ((from_stride / unit) as i64, (to_stride / unit) as i64);
    let grid = grid(rows * units);
    cuda.launch(&kernel, grid, &args![from, from_stride, to, to_stride, rows as i64, int(units) as u32]);
}
