//! Products on a GPU: cuBLASLt where nothing asks for batch invariance, else kernels of our own, which have it: wgmma
//! where the GPU has it and the addresses allow it, `gemm.cu` for all else. Which of ours computes a product depends on
//! its dtypes, n, k, strides and the alignment of its addresses, never on m.

use super::{Gemm, Mat};
use crate::cuda::{self, Cuda, Grid, Source, Value, args, source};
use crate::ops::gemm_grouped::sm90;
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!("gemm.cu");

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
const FEW_ROWS: Tile = Tile::new((16, 16, 128), (16, 16), 6, 4);
/// By multiply-adds; likewise.
const LARGE_SIMT: Tile = Tile::new((128, 128, 16), (8, 8), 0, 2);
const MIDDLE_SIMT: Tile = Tile::new((64, 64, 16), (4, 4), 0, 2);
const FEW_ROWS_SIMT: Tile = Tile::new((16, 16, 128), (1, 2), 0, 1);

/// Blocks that keep a GPU busy, more or less: the number that a long sum is cut for.
const BUSY: usize = 256;
/// Shortest piece of a sum.
const PIECE: usize = 512;

impl Product<'_> {
    fn mma(&self) -> bool {
        self.a.data.dtype() == DType::Bf16 && self.b.data.dtype() == DType::Bf16
    }

    fn tile(&self, sms: usize) -> Tile {
        let tiles = if self.mma() { [LARGE, MIDDLE, FEW_ROWS] } else { [LARGE_SIMT, MIDDLE_SIMT, FEW_ROWS_SIMT] };
        let rows = match &self.rows {
            Rows::ByExpert { offsets, capacity } => capacity.div_ceil(offsets.len() - 1),
            _ => self.m,
        };
        match rows {
            0..=16 => tiles[2],
            _ if rows <= 64 || self.blocks(tiles[0]) < sms => tiles[1],
            _ => tiles[0],
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
        self.k.div_ceil(pieces).next_multiple_of(t.k)
    }

    /// C (+)= A B.
    pub fn run(&self, cuda: &Cuda, mut c: ViewMut<'_>) {
        let tile = self.tile(cuda.sms() as usize);
        let piece = self.piece(tile);
        let pieces = self.k.div_ceil(piece).max(1);
        if pieces == 1 {
            return self.launch(cuda, tile, (piece, 1), (c.ptr(), c.dtype(), self.ldc), self.add);
        }
        let size = self.m * self.n;
        let mut sums = cuda.uninit(DType::F32, pieces * size);
        self.launch(cuda, tile, (piece, pieces), (sums.view_mut().ptr(), DType::F32, self.n), false);
        let defines = [("SUM", Value::Int(1)), ("C_TYPE", Value::Type(c.dtype()))];
        let kernel = cuda.kernel(&SOURCE, "gemm_sum", &defines);
        let grid = Grid::new([blocks_of(size.div_ceil(256)), 1, 1], 256);
        let count = pieces as i32;
        let add = i32::from(self.add);
        let arguments = args![sums.view().ptr(), c.ptr(), count, size as i64, self.n as i32, self.ldc as i64, add];
        cuda.launch(&kernel, grid, &arguments);
    }

    fn launch(
        &self,
        cuda: &Cuda,
        t: Tile,
        (piece, pieces): (usize, usize),
        (c, c_type, ldc): (u64, DType, usize),
        add: bool,
    ) {
        let int = |x: usize| Value::Int(x as i64);
        let wide = |ptr: u64, dtype: DType, ld: usize| ptr.is_multiple_of(16) && (ld * dtype.size()).is_multiple_of(16);
        let (a, b) = (&self.a, &self.b);
        let side = |s: &Side<'_>| wide(s.data.ptr(), s.data.dtype(), s.ld);
        let all_wide = side(a) && side(b) && wide(c, c_type, ldc);
        let (mode, offsets, experts) = match &self.rows {
            Rows::All => (0, 0, 1),
            Rows::ByExpert { offsets, .. } => (1, offsets.ptr(), offsets.len() - 1),
            Rows::Summed { offsets } => (2, offsets.ptr(), offsets.len() - 1),
        };
        let (name, unit, part) = if self.mma() {
            ("gemm_mma", "MMA", ["WARP_M", "WARP_N"])
        } else {
            ("gemm_simt", "SIMT", ["CELL_M", "CELL_N"])
        };
        let defines = [
            (unit, int(1)),
            ("A_TYPE", Value::Type(a.data.dtype())),
            ("B_TYPE", Value::Type(b.data.dtype())),
            ("C_TYPE", Value::Type(c_type)),
            ("A_K", int(usize::from(a.inner_k))),
            ("B_K", int(usize::from(b.inner_k))),
            ("WIDE", int(usize::from(all_wide))),
            ("MODE", int(mode)),
            ("EXPERTS", int(experts)),
            ("TILE_M", int(t.m)),
            ("TILE_N", int(t.n)),
            ("TILE_K", int(t.k)),
            (part[0], int(t.part.0)),
            (part[1], int(t.part.1)),
            ("STAGES", int(t.stages)),
            ("BLOCKS", int(t.blocks)),
        ];
        let kernel = cuda.kernel(&SOURCE, name, &defines);
        let parts = (t.m / t.part.0) * (t.n / t.part.1);
        let (threads, shared) = if self.mma() {
            // The stages; afterwards sixteen rows of sums of each warp.
            (parts * 32, (t.stages * (t.m + t.n) * t.k * 2).max(parts * 16 * (t.part.1 + 8) * 4))
        } else {
            (parts, 0)
        };
        let grid = Grid::new([blocks_of(self.blocks(t)), pieces as u32, 1], threads as u32).shared(shared as u32);
        let (pa, pb) = (a.data.ptr(), b.data.ptr());
        let (m, n, k, piece) = (number(self.m), number(self.n), number(self.k), number(piece));
        let (lda, ldb, ldc, add) = (a.ld as i64, b.ld as i64, ldc as i64, i32::from(add));
        cuda.launch(&kernel, grid, &args![pa, pb, c, m, n, k, piece, lda, ldb, ldc, offsets, add]);
    }
}

/// A size as the kernels take it.
fn number(x: usize) -> i32 {
    i32::try_from(x).unwrap_or_else(|_| panic!("a product with a side of {x}: at most {} on a GPU", i32::MAX))
}

fn blocks_of(x: usize) -> u32 {
    number(x) as u32
}
