//! Launching `sm90.cu`: BF16 products on Hopper's matrix units, one or one per expert. What an expert has is read on the
//! device; the host knows capacities only.

use crate::cuda::{Cuda, Grid, Source, Swizzle, TensorMap, Value::Int, Value::Type, args, source};
use crate::ops::gemm::Gemm;
use crate::{DType, View, ViewMut, Weight};

static SOURCE: Source = source!(sm90, "sm90.cu");

/// Experts whose tables fit into shared memory beside the largest ring.
pub(super) const MAX_EXPERTS: usize = 272;

/// A row-major matrix in the GPU's memory, or the first of a stack.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    ptr: u64,
    dtype: DType,
    rows: usize,
    cols: usize,
    ld: usize,
}

impl Matrix {
    fn of(view: View<'_>, rows: usize, cols: usize, ld: usize) -> Self {
        Self { ptr: view.ptr(), dtype: view.dtype(), rows, cols, ld }
    }

    /// Bytes of a row.
    fn pitch(&self) -> u64 {
        (self.ld * self.dtype.size()) as u64
    }

    /// What the copy engine asks of addresses and strides, and the window's base below of them. What it stores ends at a
    /// multiple of 16 bytes: shorter rows within longer ones would lose what is behind them.
    fn fits(&self) -> bool {
        let limit = 1 << 30;
        self.ptr.is_multiple_of(16)
            && self.pitch().is_multiple_of(16)
            && (self.cols * self.dtype.size()).is_multiple_of(16)
            && self.rows < limit
            && self.cols < limit
            && self.pitch().checked_mul(self.rows as u64).is_some_and(|bytes| bytes < self.ptr && bytes < 1 << 40)
    }

    /// Copied in boxes of `lines` rows by 128 bytes.
    fn tile(&self, lines: usize) -> [u32; 3] {
        [(128 / self.dtype.size()) as u32, lines as u32, 1]
    }

    /// Coordinates (column, row, which of `count` matrices one after another).
    pub(super) fn stack(&self, cuda: &Cuda, count: usize, lines: usize) -> TensorMap {
        let dims = [self.cols, self.rows, count].map(|d| d as u64);
        let strides = [self.pitch(), self.pitch() * self.rows as u64];
        cuda.tensor_map(self.ptr, self.dtype, &dims, &strides, &self.tile(lines), Swizzle::B128)
    }

    /// Coordinates (column, rows - size + row, offset + size) of a segment of `size` rows at `offset`: a row past its
    /// end lies outside.
    pub(super) fn window(&self, cuda: &Cuda, lines: usize) -> TensorMap {
        let dims = [self.cols, self.rows, self.rows + 1].map(|d| d as u64);
        let strides = [self.pitch(); 2];
        let base = self.ptr.wrapping_sub(self.pitch() * self.rows as u64);
        cuda.tensor_map(base, self.dtype, &dims, &strides, &self.tile(lines), Swizzle::B128)
    }
}

/// Shape of a block's tile and of its ring; see `sm90.cu`. A row's bits are the same with all of them.
#[derive(Clone, Copy)]
struct Tile {
    bm: usize,
    bn: usize,
    stages: usize,
    buffers: usize,
    cluster: usize,
    /// Time of 64 of k, in nanoseconds on an H200: arithmetic for the large tile, latencies for the small ones.
    step: usize,
}

const TILES: [Tile; 7] = [
    Tile { bm: 128, bn: 256, stages: 4, buffers: 2, cluster: 2, step: 630 },
    Tile { bm: 128, bn: 256, stages: 4, buffers: 2, cluster: 1, step: 640 },
    Tile { bm: 128, bn: 192, stages: 5, buffers: 1, cluster: 1, step: 530 },
    Tile { bm: 128, bn: 128, stages: 6, buffers: 2, cluster: 1, step: 360 },
    Tile { bm: 64, bn: 256, stages: 4, buffers: 2, cluster: 1, step: 430 },
    Tile { bm: 64, bn: 128, stages: 8, buffers: 1, cluster: 1, step: 290 },
    Tile { bm: 64, bn: 64, stages: 12, buffers: 1, cluster: 1, step: 260 },
];

impl Tile {
    /// Rows of a single product from which blocks share the loads of B.
    const MANY: usize = 512;

    /// The fastest for `groups` products of about `m` by `n` each. How the rows of several are split only the device
    /// knows: the time is the mean of that of an even split and of that of one that leaves two of five groups rows in
    /// one tile more.
    fn of(groups: usize, m: usize, n: usize, sms: usize) -> Self {
        let time = |t: &Self| {
            let rounds = |tiles: usize| (tiles * n.div_ceil(t.bn)).div_ceil(sms) * t.step;
            let even = groups * m.div_ceil(t.bm);
            let ragged = ((groups * m).div_ceil(t.bm) + groups * 2 / 5).max(even + groups / 8);
            rounds(even) + rounds(if groups > 1 { ragged } else { even })
        };
        let fit = TILES.iter().filter(|t| t.cluster == 1 || groups == 1 && m >= Self::MANY);
        *fit.min_by_key(|t| time(t)).unwrap_or(&TILES[1])
    }

    /// Warpgroups that multiply.
    fn groups(&self) -> usize {
        if self.bm * self.bn <= 4096 { 1 } else { 2 }
    }

    /// Rows of A that are copied at once.
    fn box_a(&self) -> usize {
        if self.cluster == 1 { 64 } else { self.bm }
    }

    /// The kernel's `Shared` with its tables.
    fn shared(&self, experts: usize) -> u32 {
        let ring = self.stages * (self.bm + self.bn) * 128;
        let tables = (experts + 1) * 4 + experts * 6 + 16;
        (ring + self.groups() * self.buffers * 8192 + self.stages * 44 + tables) as u32
    }
}

/// C (+)= op(A) op(B), or one product per expert.
struct Product<'a> {
    /// A is stored [k, m]; B is stored [k, n].
    trans: (bool, bool),
    a: Matrix,
    b: Matrix,
    c: Matrix,
    n: usize,
    k: usize,
    experts: usize,
    offsets: Option<View<'a>>,
    accumulate: bool,
}

impl Product<'_> {
    fn run(&self, cuda: &Cuda) {
        if [self.a.rows, self.c.rows, self.n, self.experts].contains(&0) {
            return;
        }
        let m = if self.trans.0 { self.c.rows } else { self.a.rows.div_ceil(self.experts) };
        self.run_by(cuda, &Tile::of(self.experts, m, self.n, cuda.sms() as usize));
    }

    fn run_by(&self, cuda: &Cuda, tile: &Tile) {
        let (ta, tb) = self.trans;
        let (a, b, c) = (&self.a, &self.b, &self.c);
        let defines = [
            ("TA", Int(ta.into())),
            ("TB", Int(tb.into())),
            ("OUT", Type(c.dtype)),
            ("ADD", Int(self.accumulate.into())),
            ("GROUPED", Int(self.offsets.is_some().into())),
            ("BM", Int(tile.bm as i64)),
            ("BN", Int(tile.bn as i64)),
            ("STAGES", Int(tile.stages as i64)),
            ("BUFFERS", Int(tile.buffers as i64)),
            ("CLUSTER", Int(tile.cluster as i64)),
            ("BAND", Int(16)),
        ];
        let kernel = cuda.kernel(&SOURCE, "sm90_gemm", &defines);
        let map_a = a.window(cuda, if ta { 64 } else { tile.box_a() });
        let map_b = match (ta, tb) {
            (true, true) => b.window(cuda, 64),
            (_, true) => b.stack(cuda, self.experts, 64),
            (_, false) => b.stack(cuda, self.experts, tile.bn / 2),
        };
        let map_c = if ta { c.stack(cuda, self.experts, 64) } else { c.window(cuda, 64) };
        // With offsets on the device the number of tiles is not known here; idle blocks leave at once.
        let blocks = (cuda.sms() as usize / tile.cluster * tile.cluster) as u32;
        let grid = Grid::new([blocks, 1, 1], 128 * (1 + tile.groups() as u32))
            .shared(tile.shared(self.experts))
            .cluster(tile.cluster as u32)
            .early();
        let offsets = self.offsets.map_or(0, |o| o.ptr());
        let counter = cuda.counters(1);
        cuda.launch(
            &kernel,
            grid,
            &args![
                map_a,
                map_b,
                map_c,
                offsets,
                counter,
                c.ptr,
                c.ld as i64,
                self.experts as i32,
                c.rows as i32,
                self.n as i32,
                self.k as i32,
                a.rows as i32
            ],
        );
    }
}

pub(super) fn fits(cuda: &Cuda, experts: usize, a: &Matrix, b: &Matrix, c: &Matrix) -> bool {
    cuda.has_wgmma()
        && experts <= MAX_EXPERTS
        && a.dtype == DType::Bf16
        && b.dtype == DType::Bf16
        && [a, b, c].iter().all(|x| x.fits())
}

/// Rows that both buffers of grouped rows have.
pub(super) fn capacity(x: View<'_>, in_cols: usize, y: View<'_>, out_cols: usize) -> usize {
    (x.len() / in_cols).min(y.len() / out_cols)
}

pub(super) fn rows(view: View<'_>, rows: usize, cols: usize) -> Matrix {
    Matrix::of(view, rows, cols, cols)
}

fn weight(w: &Weight<'_>) -> Matrix {
    Matrix::of(w.data, w.rows, w.cols, w.cols)
}

/// Whether [`forward`] takes these; or, given dy and dx, [`backward_input`]. It does not depend on the number of rows.
pub fn supports(cuda: &Cuda, x: View<'_>, w: &Weight<'_>, y: &ViewMut<'_>) -> bool {
    let (x, y) = (rows(x, 1, 8), rows(y.as_view(), 1, 8));
    let both = w.cols.is_multiple_of(8) && w.rows.is_multiple_of(8) && w.cols > 0 && w.rows > 0;
    both && fits(cuda, w.experts, &x, &weight(w), &y)
}

fn forward_product<'a>(x: View<'_>, offsets: View<'a>, w: &Weight<'_>, y: &ViewMut<'_>) -> Product<'a> {
    let cap = capacity(x, w.cols, y.as_view(), w.rows);
    Product {
        trans: (false, false),
        a: rows(x, cap, w.cols),
        b: weight(w),
        c: rows(y.as_view(), cap, w.rows),
        n: w.rows,
        k: w.cols,
        experts: w.experts,
        offsets: Some(offsets),
        accumulate: false,
    }
}

/// `y[row, out]` = `x[row, in]` W_e^T.
pub fn forward(cuda: &Cuda, x: View<'_>, offsets: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    forward_product(x, offsets, w, &y).run(cuda);
}

fn input_product<'a>(dy: View<'_>, offsets: View<'a>, w: &Weight<'_>, dx: &ViewMut<'_>) -> Product<'a> {
    let cap = capacity(dy, w.rows, dx.as_view(), w.cols);
    Product {
        trans: (false, true),
        a: rows(dy, cap, w.rows),
        b: weight(w),
        c: rows(dx.as_view(), cap, w.cols),
        n: w.cols,
        k: w.rows,
        experts: w.experts,
        offsets: Some(offsets),
        accumulate: false,
    }
}

/// `dx[row, in]` = `dy[row, out]` W_e.
pub fn backward_input(cuda: &Cuda, dy: View<'_>, offsets: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>) {
    input_product(dy, offsets, w, &dx).run(cuda);
}

fn matrices(g: &Gemm<'_>) -> [Matrix; 3] {
    let (ra, ca) = if g.ta { (g.k, g.m) } else { (g.m, g.k) };
    let (rb, cb) = if g.tb { (g.n, g.k) } else { (g.k, g.n) };
    [
        Matrix::of(g.a.data, ra, ca, g.a.ld),
        Matrix::of(g.b.data, rb, cb, g.b.ld),
        Matrix::of(g.c.data.as_view(), g.m, g.n, g.c.ld),
    ]
}

/// Whether [`dense`] takes these.
pub fn supports_dense(cuda: &Cuda, g: &Gemm<'_>) -> bool {
    let [a, b, c] = matrices(g);
    g.k > 0 && fits(cuda, 1, &a, &b, &c)
}

/// C (+)= op(A) op(B) with the bits of a row independent of the other rows.
pub fn dense(cuda: &Cuda, g: Gemm<'_>) {
    let [a, b, c] = matrices(&g);
    Product { trans: (g.ta, !g.tb), a, b, c, n: g.n, k: g.k, experts: 1, offsets: None, accumulate: g.accumulate }
        .run(cuda);
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::testing::{assert_close, assert_same_bits, buf, buf_on, gpu, normals, op_tolerance, skipped};
    use crate::{Buf, bf16};

    fn wide(b: &Buf) -> Vec<f64> {
        b.view().to_f32().into_iter().map(f64::from).collect()
    }

    /// Experts with none, one, more than a tile's rows; columns that no tile divides.
    #[test]
    fn every_tile_gives_the_same_bits() {
        let Some(ctx) = gpu() else { return };
        let Some(cuda) = ctx.device.as_cuda().filter(|c| c.has_wgmma()) else { return skipped("no wgmma") };
        let (offsets, out, cols) = ([0, 5, 305, 305, 306, 434, 504], 264, 392);
        let (n, experts) = (504, offsets.len() - 1);
        let host = |stream, len, scale| buf(DType::Bf16, &normals(stream, len, scale));
        let (x, dy, w) = (host(1, n * cols, 1.0), host(2, n * out, 1.0), host(3, experts * out * cols, 0.1));
        let expected_y = reference::forward(&wide(&x), &offsets, &wide(&w), out, cols);
        let (expected_dx, _) = reference::backward(&wide(&x), &wide(&dy), &offsets, &wide(&w), out, cols);
        let upload = |b: &Buf| buf_on(&ctx, DType::Bf16, &b.view().to_f32());
        let (x, dy, w, at) = (upload(&x), upload(&dy), upload(&w), ctx.from_i32(&offsets));
        let weight = Weight::stacked(w.view(), experts, out, cols);
        let mut first: Option<[Buf; 2]> = None;
        for tile in &TILES {
            let mut y = buf_on(&ctx, DType::Bf16, &vec![f32::from(bf16::NAN); n * out]);
            let mut dx = buf_on(&ctx, DType::Bf16, &vec![f32::from(bf16::NAN); n * cols]);
            forward_product(x.view(), at.view(), &weight, &y.view_mut()).run_by(cuda, tile);
            input_product(dy.view(), at.view(), &weight, &dx.view_mut()).run_by(cuda, tile);
            match &first {
                None => {
                    assert_close("y", &y, &expected_y, op_tolerance(DType::Bf16));
                    assert_close("dx", &dx, &expected_dx, op_tolerance(DType::Bf16));
                    first = Some([y, dx]);
                }
                Some([y0, dx0]) => {
                    assert_same_bits("y", y0, &y);
                    assert_same_bits("dx", dx0, &dx);
                }
            }
        }
    }

    /// More tiles than blocks: which block takes which tile differs from run to run, the bits do not, and the counter is
    /// 0 again.
    #[test]
    fn whoever_takes_a_tile() {
        let Some(ctx) = gpu() else { return };
        let Some(cuda) = ctx.device.as_cuda().filter(|c| c.has_wgmma()) else { return skipped("no wgmma") };
        let offsets = [0, 300, 300, 301, 365, 429, 493, 558, 700, 828, 829, 840, 1000, 1064];
        let (n, experts) = (1064, offsets.len() - 1);
        for (out, cols) in [(2568, 136), (136, 2568), (2568, 64)] {
            let data = |stream, len| buf_on(&ctx, DType::Bf16, &normals(stream, len, 1.0));
            let (x, dy, w) = (data(1, n * cols), data(2, n * out), data(3, experts * out * cols));
            let (weight, at) = (Weight::stacked(w.view(), experts, out, cols), ctx.from_i32(&offsets));
            let mut first: Option<[Buf; 2]> = None;
            for tile in TILES.iter().chain(&TILES) {
                let mut y = buf_on(&ctx, DType::Bf16, &vec![f32::from(bf16::NAN); n * out]);
                let mut dx = buf_on(&ctx, DType::Bf16, &vec![f32::from(bf16::NAN); n * cols]);
                forward_product(x.view(), at.view(), &weight, &y.view_mut()).run_by(cuda, tile);
                input_product(dy.view(), at.view(), &weight, &dx.view_mut()).run_by(cuda, tile);
                let [y0, dx0] = first.get_or_insert_with(|| [y.clone(), dx.clone()]);
                assert_same_bits("y", y0, &y);
                assert_same_bits("dx", dx0, &dx);
            }
            let mut counter = [1u32];
            cuda.read(cuda.counters(1), bytemuck::cast_slice_mut(&mut counter));
            assert_eq!(counter, [0]);
        }
    }

    #[test]
    fn tiles_of_experts_with_few_rows() {
        let of = |groups, m, n| {
            let tile = Tile::of(groups, m, n, 132);
            (tile.bm, tile.bn, tile.cluster)
        };
        // One round with room for rows that are split unevenly, as wide as memory likes it.
        assert_eq!(of(8, 128, 1024), (128, 128, 1));
        assert_eq!(of(8, 128, 2048), (128, 192, 1));
        assert_eq!(of(8, 128, 2816), (128, 256, 1));
        // Many rounds: the tile that multiplies fastest.
        assert_eq!(of(64, 128, 2816), (128, 256, 1));
        assert_eq!(of(64, 1024, 1024), (128, 256, 1));
        assert_eq!(of(1, 8192, 1024), (128, 256, 2));
        assert_eq!(of(1, 1, 1024), (64, 64, 1));
    }
}
