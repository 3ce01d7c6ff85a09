//! Products on a GPU: cuBLASLt where nothing asks for batch invariance, else kernels of our own, which have it: wgmma
//! where the GPU has it and the addresses allow it, `gemm.cu` for all else. Which of ours computes a product depends on
//! its dtypes, n, k, strides and the alignment of its addresses, never on m.

use super::{Gemm, Mat};
use crate::cuda::{self, Cuda, Grid, Source, Value, args, source};
use crate::ops::gemm_grouped::sm90;
use crate::{Buf, DType, View, ViewMut};

static SOURCE: Source = source!(mma, "gemm.cu");

pub(super) fn gemm(cuda: &Cuda, mut g: Gemm<'_>) {
    // Adding an empty sum would turn -0 into 0.
    if g.m == 0 || g.n == 0 || (g.accumulate && g.k == 0) {
        return;
    }
    if cuda.invariant() && sm90::supports_dense(cuda, &g) {
        return sm90::dense(cuda, g);
    }
    if !cuda.invariant() && by_library(cuda, &mut g) {
        return;
    }
    let (a, b) = (Side::of(&g.a, !g.ta), Side::of(&g.b, g.tb));
    let product = Product { m: g.m, n: g.n, k: g.k, a, b, ldc: g.c.ld, add: g.accumulate, rows: Rows::All };
    product.run(cuda, g.c.data);
}

/// By cuBLASLt; false if it has nothing for these operands.
fn by_library(cuda: &Cuda, g: &mut Gemm<'_>) -> bool {
    let same = g.a.data.dtype() == g.b.data.dtype();
    if !same || g.k == 0 || (g.a.data.dtype() == DType::F32 && g.c.data.dtype() != DType::F32) {
        return false;
    }
    let (a, b, c) = (g.a.data.ptr(), g.b.data.ptr(), g.c.data.ptr());
    let product = cuda::Product {
        m: g.m,
        n: g.n,
        k: g.k,
        a: cuda::Operand::new(a, g.a.data.dtype(), g.a.ld, g.ta),
        b: cuda::Operand::new(b, g.b.data.dtype(), g.b.ld, g.tb),
        c: cuda::Operand::new(c, g.c.data.dtype(), g.c.ld, false),
        accumulate: g.accumulate,
    };
    cuda.multiply(&product, a, b, c).unwrap_or_else(|e| cuda.blas_failed(&e))
}

/// An operand of [`Product`].
pub(crate) struct Side<'a> {
    pub data: View<'a>,
    /// Elements from one row to the next.
    pub ld: usize,
    /// k is the inner dimension.
    pub inner_k: bool,
}

impl<'a> Side<'a> {
    fn of(m: &Mat<'a>, inner_k: bool) -> Self {
        Self { data: m.data, ld: m.ld, inner_k }
    }
}

/// What a product's rows are.
pub(crate) enum Rows<'a> {
    /// One matrix.
    All,
    /// Rows of A and C sorted by expert, at most `capacity` of them; B holds a matrix for each expert. m is not used.
    ByExpert { offsets: View<'a>, capacity: usize },
    /// Rows of A and B, which the sums go over, sorted by expert; C holds a matrix for each expert. k is not used.
    Summed { offsets: View<'a> },
}

/// A product, or one for each expert, for the kernels of `gemm.cu`.
pub(crate) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Side<'a>,
    pub b: Side<'a>,
    pub ldc: usize,
    pub add: bool,
    pub rows: Rows<'a>,
}

/// Which kernel of `gemm.cu`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Multiply-adds in f32.
    Simt,
    /// mma.sync on bf16.
    Mma,
    /// The same, with one f32 operand or both cut into planes of bf16.
    Planes,
}

/// Sizes of a kernel: a block's tile and what a warp (mma) or a thread (simt) has of it.
#[derive(Clone, Copy)]
struct Tile {
    m: usize,
    n: usize,
    k: usize,
    part: (usize, usize),
    stages: usize,
    /// Blocks that a multiprocessor should have room for.
    blocks: usize,
}

impl Tile {
    const fn new((m, n, k): (usize, usize, usize), part: (usize, usize), stages: usize, blocks: usize) -> Self {
        Self { m, n, k, part, stages, blocks }
    }
}

/// By mma.sync; the chain over k, and so the bits, are the same in all.
const LARGE: Tile = Tile::new((128, 128, 64), (64, 64), 3, 2);
const MIDDLE: Tile = Tile::new((64, 64, 64), (32, 32), 4, 2);
const FEW_ROWS: Tile = Tile::new((16, 32, 128), (16, 16), 4, 2);
/// With planes of one operand, or of both; likewise.
const MIDDLE_PLANES: Tile = Tile::new((64, 64, 64), (32, 32), 3, 2);
const MIDDLE_BOTH_PLANES: Tile = Tile::new((64, 64, 32), (32, 32), 3, 3);
const FEW_ROWS_PLANES: Tile = Tile::new((16, 32, 128), (16, 16), 3, 2);
/// By multiply-adds; likewise.
const LARGE_SIMT: Tile = Tile::new((128, 128, 16), (8, 8), 0, 1);
const MIDDLE_SIMT: Tile = Tile::new((64, 64, 16), (4, 4), 0, 2);
const FEW_ROWS_SIMT: Tile = Tile::new((16, 16, 128), (1, 2), 0, 1);

/// Blocks that keep a GPU busy, more or less: the number that a long sum is cut for.
const BUSY: usize = 256;
/// Shortest piece of a sum.
const PIECE: usize = 512;
/// bf16 numbers whose sum an f32 number is.
const PLANES: usize = 3;
/// As many of them as both operands need for a result in bf16.
const PLANES_FOR_BF16: usize = 2;

/// An operand as a kernel takes it.
#[derive(Clone, Copy)]
struct Matrix {
    ptr: u64,
    dtype: DType,
    ld: usize,
    planes: usize,
    /// Elements from one plane to the next.
    plane: usize,
}

impl Matrix {
    fn of(s: &Side<'_>) -> Self {
        Self { ptr: s.data.ptr(), dtype: s.data.dtype(), ld: s.ld, planes: 1, plane: 0 }
    }

    /// Rows that wide loads and stores fit.
    fn wide(&self) -> bool {
        self.ptr.is_multiple_of(16) && (self.ld * self.dtype.size()).is_multiple_of(16)
    }

    /// As planes of bf16, `rows` by `cols` as stored; the memory is in the second.
    fn split(self, cuda: &Cuda, (rows, cols): (usize, usize), count: usize) -> (Self, Option<Buf>) {
        if self.dtype != DType::F32 {
            return (self, None);
        }
        let pitch = cols.next_multiple_of(8);
        let plane = rows * pitch;
        let mut planes = cuda.uninit(DType::Bf16, count * plane);
        let ptr = planes.view_mut().ptr();
        let wide = Value::Int(self.wide().into());
        let defines = [("SPLIT", Value::Int(1)), ("PLANES", Value::Int(count as i64)), ("WIDE", wide)];
        let kernel = cuda.kernel(&SOURCE, "gemm_split", &defines);
        let grid = Grid::new([blocks_of((plane / 8).div_ceil(256)), 1, 1], 256);
        let sizes = (number(rows), number(cols), self.ld as i64, number(pitch));
        cuda.launch(&kernel, grid, &args![self.ptr, ptr, sizes.0, sizes.1, sizes.2, sizes.3]);
        (Self { ptr, dtype: DType::Bf16, ld: pitch, planes: count, plane }, Some(planes))
    }
}

impl Product<'_> {
    fn unit(&self, c: DType) -> Unit {
        match (self.a.data.dtype(), self.b.data.dtype()) {
            (DType::Bf16, DType::Bf16) => Unit::Mma,
            // Per expert, and where a result in f32 is to be as plain f32 has it.
            _ if !matches!(self.rows, Rows::All) => Unit::Simt,
            (DType::F32, DType::F32) if c == DType::F32 => Unit::Simt,
            _ => Unit::Planes,
        }
    }

    fn tile(&self, unit: Unit, sms: usize) -> Tile {
        let (large, middle, few_rows) = match unit {
            Unit::Mma => (LARGE, MIDDLE, FEW_ROWS),
            Unit::Planes if self.a.data.dtype() == self.b.data.dtype() => {
                (MIDDLE_BOTH_PLANES, MIDDLE_BOTH_PLANES, FEW_ROWS_PLANES)
            }
            Unit::Planes => (MIDDLE_PLANES, MIDDLE_PLANES, FEW_ROWS_PLANES),
            Unit::Simt => (LARGE_SIMT, MIDDLE_SIMT, FEW_ROWS_SIMT),
        };
        let rows = match &self.rows {
            Rows::ByExpert { offsets, capacity } => capacity.div_ceil(offsets.len() - 1),
            _ => self.m,
        };
        // Few tiles of a weight gradient are cut along k instead.
        if self.a.inner_k && (rows <= 16 || self.blocks(middle) * 4 <= sms) {
            few_rows
        } else if rows <= 64 || self.blocks(large) < sms {
            middle
        } else {
            large
        }
    }

    /// Tiles of C, or a bound on their number.
    fn blocks(&self, t: Tile) -> usize {
        let columns = self.n.div_ceil(t.n);
        match &self.rows {
            Rows::All => self.m.div_ceil(t.m) * columns,
            // An expert's last tile may have a single row.
            Rows::ByExpert { offsets, capacity } => (capacity / t.m + capacity.min(&(offsets.len() - 1))) * columns,
            Rows::Summed { offsets } => (offsets.len() - 1) * self.m.div_ceil(t.m) * columns,
        }
    }

    /// Length of the pieces that a long sum of few tiles is cut into, so that more than a few multiprocessors work on
    /// it. A weight gradient's only, which knows no batch: A is transposed.
    fn piece(&self, t: Tile) -> usize {
        if self.a.inner_k || !matches!(self.rows, Rows::All) {
            return self.k.max(1);
        }
        let pieces = (BUSY / self.blocks(t).max(1)).min(self.k / PIECE).max(1);
        self.k.div_ceil(pieces).next_multiple_of(t.k).max(t.k)
    }

    /// C (+)= A B.
    pub fn run(&self, cuda: &Cuda, mut c: ViewMut<'_>) {
        let unit = self.unit(c.dtype());
        let (a, b) = (Matrix::of(&self.a), Matrix::of(&self.b));
        let ((a, _planes_of_a), (b, _planes_of_b)) = if unit == Unit::Planes {
            let stored = |inner_k, outer| if inner_k { (outer, self.k) } else { (self.k, outer) };
            let count = if a.dtype == b.dtype { PLANES_FOR_BF16 } else { PLANES };
            let (size_a, size_b) = (stored(self.a.inner_k, self.m), stored(self.b.inner_k, self.n));
            (a.split(cuda, size_a, count), b.split(cuda, size_b, count))
        } else {
            ((a, None), (b, None))
        };
        let tile = self.tile(unit, cuda.sms() as usize);
        let piece = self.piece(tile);
        let pieces = self.k.div_ceil(piece).max(1);
        let out = Matrix { ptr: c.ptr(), dtype: c.dtype(), ld: self.ldc, planes: 1, plane: 0 };
        if pieces == 1 {
            return self.launch(cuda, (unit, tile), (piece, 1), [a, b, out], self.add);
        }
        let size = self.m * self.n;
        let mut sums = cuda.uninit(DType::F32, pieces * size);
        let ptr = sums.view_mut().ptr();
        let parts = Matrix { ptr, dtype: DType::F32, ld: self.n, planes: 1, plane: 0 };
        self.launch(cuda, (unit, tile), (piece, pieces), [a, b, parts], false);
        let defines = [("SUM", Value::Int(1)), ("C_TYPE", Value::Type(out.dtype))];
        let kernel = cuda.kernel(&SOURCE, "gemm_sum", &defines);
        let grid = Grid::new([blocks_of(size.div_ceil(256)), 1, 1], 256);
        let (count, n, ldc, add) = (number(pieces), number(self.n), self.ldc as i64, i32::from(self.add));
        cuda.launch(&kernel, grid, &args![ptr, out.ptr, count, size as i64, n, ldc, add]);
    }

    fn launch(
        &self,
        cuda: &Cuda,
        (unit, t): (Unit, Tile),
        (piece, pieces): (usize, usize),
        [a, b, c]: [Matrix; 3],
        add: bool,
    ) {
        let int = |x: usize| Value::Int(x as i64);
        let flag = |x: bool| Value::Int(x.into());
        let (mode, offsets, experts) = match &self.rows {
            Rows::All => (0, 0, 1),
            Rows::ByExpert { offsets, .. } => (1, offsets.ptr(), offsets.len() - 1),
            Rows::Summed { offsets } => (2, offsets.ptr(), offsets.len() - 1),
        };
        let mut defines = vec![
            ("A_TYPE", Value::Type(a.dtype)),
            ("B_TYPE", Value::Type(b.dtype)),
            ("C_TYPE", Value::Type(c.dtype)),
            ("A_K", flag(self.a.inner_k)),
            ("B_K", flag(self.b.inner_k)),
            ("WIDE", flag(a.wide() && b.wide() && c.wide())),
            ("MODE", int(mode)),
            ("EXPERTS", int(experts)),
            ("TILE_M", int(t.m)),
            ("TILE_N", int(t.n)),
            ("TILE_K", int(t.k)),
            ("BLOCKS", int(t.blocks)),
        ];
        let (m, n, k, piece) = (number(self.m), number(self.n), number(self.k), number(piece));
        let (lda, ldb, ldc, add) = (a.ld as i64, b.ld as i64, c.ld as i64, i32::from(add));
        let parts = (t.m / t.part.0) * (t.n / t.part.1);
        let grid = |threads: usize| Grid::new([blocks_of(self.blocks(t)), pieces as u32, 1], threads as u32);
        if unit == Unit::Simt {
            defines.extend([("SIMT", int(1)), ("CELL_M", int(t.part.0)), ("CELL_N", int(t.part.1))]);
            let kernel = cuda.kernel(&SOURCE, "gemm_simt", &defines);
            let args = args![a.ptr, b.ptr, c.ptr, m, n, k, piece, lda, ldb, ldc, offsets, add];
            return cuda.launch(&kernel, grid(parts), &args);
        }
        defines.extend([("MMA", int(1)), ("WARP_M", int(t.part.0)), ("WARP_N", int(t.part.1))]);
        defines.extend([("STAGES", int(t.stages)), ("A_PLANES", int(a.planes)), ("B_PLANES", int(b.planes))]);
        let kernel = cuda.kernel(&SOURCE, "gemm_mma", &defines);
        // The stages; afterwards sixteen rows of sums of each warp.
        let ring = t.stages * (a.planes * t.m + b.planes * t.n) * t.k * 2;
        let shared = ring.max(parts * 16 * (t.part.1 + 8) * 4);
        let (plane_a, plane_b) = (a.plane as i64, b.plane as i64);
        let args = args![a.ptr, b.ptr, c.ptr, m, n, k, piece, lda, ldb, ldc, offsets, add, plane_a, plane_b];
        cuda.launch(&kernel, grid(parts * 32).shared(shared as u32), &args);
    }
}

/// A size as the kernels take it.
fn number(x: usize) -> i32 {
    i32::try_from(x).unwrap_or_else(|_| panic!("a product with a side of {x}: at most {} on a GPU", i32::MAX))
}

fn blocks_of(x: usize) -> u32 {
    number(x) as u32
}
