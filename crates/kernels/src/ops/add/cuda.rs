//! Launches of elementwise operations: one kernel for each set of types and width of access.

use crate::cuda::{Arg, Cuda, Grid, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("add.cu");

const THREADS: usize = 256;
/// Packs of a thread: the kernel's STEP.
const STEP: usize = 4;

/// A launch over `len` elements of arrays of these types and addresses; the last is written.
fn launch(cuda: &Cuda, name: &'static str, arrays: [(DType, u64); 3], len: usize, args: &[Arg]) {
    if len == 0 {
        return;
    }
    let [from, other, elem] = arrays.map(|(dtype, _)| float(dtype));
    let widest = arrays.iter().map(|(dtype, _)| dtype.size()).max().unwrap_or(4);
    let pack = 16 / widest;
    let pack = if arrays.iter().all(|(dtype, ptr)| aligned(pack * dtype.size(), &[*ptr])) { pack } else { 1 };
    let defines = [("FROM", Type(from)), ("OTHER", Type(other)), ("ELEM", Type(elem)), ("PACK", Int(pack as i64))];
    let kernel = cuda.kernel(&SOURCE, name, &defines);
    // The elements past the last pack are the first block's: there is always one.
    let grid = Grid::new([blocks(len / pack, THREADS * STEP).max(1), 1, 1], THREADS as u32);
    cuda.launch(&kernel, grid, args);
}

pub fn add(cuda: &Cuda, a: View<'_>, b: View<'_>, mut out: ViewMut<'_>) {
    let (len, to) = (out.len(), out.ptr());
    let arrays = [(a.dtype(), a.ptr()), (b.dtype(), b.ptr()), (out.dtype(), to)];
    launch(cuda, "add", arrays, len, &args![a.ptr(), b.ptr(), to, len as i64]);
}

pub fn accumulate(cuda: &Cuda, a: View<'_>, mut out: ViewMut<'_>) {
    let (len, to) = (out.len(), out.ptr());
    let arrays = [(a.dtype(), a.ptr()), (out.dtype(), to), (out.dtype(), to)];
    launch(cuda, "add", arrays, len, &args![a.ptr(), to, to, len as i64]);
}

pub fn convert(cuda: &Cuda, a: View<'_>, mut out: ViewMut<'_>) {
    let (len, to) = (out.len(), out.ptr());
    let arrays = [(a.dtype(), a.ptr()), (out.dtype(), to), (out.dtype(), to)];
    launch(cuda, "convert", arrays, len, &args![a.ptr(), to, len as i64]);
}

pub fn blend(cuda: &Cuda, weight: f32, a: View<'_>, mut out: ViewMut<'_>) {
    let (len, to) = (out.len(), out.ptr());
    let arrays = [(a.dtype(), a.ptr()), (out.dtype(), to), (out.dtype(), to)];
    launch(cuda, "blend", arrays, len, &args![a.ptr(), to, to, len as i64, weight]);
}
