//! General matrix product with FP32 accumulation: `C[m,n]` (+)= op(A)`[m,k]` op(B)`[k,n]`. Operands may be f32 or bf16
//! in any mix; bf16 is widened exactly, sums are f32, and a bf16 C is rounded once (after adding the old C when
//! accumulating).
//!
//! Batch invariance: the bits of a row of C depend on that row of op(A), on B, k and n, never on m: one row alone
//! equals the same row among any others. Accumulation over k has a fixed order that depends on k alone.
//! Accumulating adds the finished product to the old C: C = C + (sum over k), so that gradients of two micro-batches
//! add as if each had been computed alone.
//! A GPU may cut k into pieces, by the shape, where A is transposed: a weight gradient, whose rows are no batch.
//! Of two f32 operands and a bf16 C a GPU may take the products to within 2^-16, a hundredth of C's rounding.
//! k = 0 leaves C at zero (or unchanged when accumulating).

mod beside;
pub(super) mod cpu;
pub(super) mod cuda;
mod few;
mod few_tiles;
#[cfg(test)]
mod reference;
mod strips;
#[cfg(test)]
mod tests;
mod tiles;

use crate::panel::Operand;
use crate::sizes::sizes;
use crate::{Ctx, DType, Device, Level, View, ViewMut, Weight, Workers};

/// A row-major matrix in a view: element (r, c) at `r * ld + c`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    /// First element first; may be longer than the matrix.
    pub data: View<'a>,
    /// Elements from one row to the next.
    pub ld: usize,
}

/// A row-major matrix to write; elements between rows (beyond n) stay untouched.
#[derive(Debug)]
pub struct MatMut<'a> {
    /// First element first; may be longer than the matrix.
    pub data: ViewMut<'a>,
    /// Elements from one row to the next.
    pub ld: usize,
}

/// Arguments of [`gemm()`].
#[derive(Debug)]
pub struct Gemm<'a> {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// `[m, k]`, or `[k, m]` if `ta`.
    pub a: Mat<'a>,
    /// A is stored transposed.
    pub ta: bool,
    /// `[k, n]`, or `[n, k]` if `tb`.
    pub b: Mat<'a>,
    /// B is stored transposed.
    pub tb: bool,
    /// `[m, n]`.
    pub c: MatMut<'a>,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

/// Which product of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// [`linear`].
    Forward,
    /// [`linear_backward_input`].
    Input,
    /// [`linear_backward_weight`].
    Weight,
}

/// Bytes that a product on the host's cores, with both operands of `dtype`, takes of the device's memory while it runs:
/// of a weight `[out, cols]` and as many rows as `rows` says, or of a stack of weights and the rows of each. `gathered`
/// says whether x (in [`Direction::Forward`]) or dy are the rows of tokens ([`super::gemm_grouped::Rows::Tokens`]).
pub fn scratch(
    workers: Workers,
    dtype: DType,
    direction: Direction,
    rows: &[usize],
    (out, cols): (usize, usize),
    gathered: bool,
) -> usize {
    let product = |&n: &usize| match direction {
        Direction::Forward => [n, out, cols],
        Direction::Input => [n, cols, out],
        Direction::Weight => [out, cols, n],
    };
    let products: Vec<_> = rows.iter().map(product).collect();
    let (Workers { level, threads }, along) = (workers, direction != Direction::Weight);
    if level == Level::Amx && dtype == DType::Bf16 {
        tiles::shared_bytes(&products, [along, direction == Direction::Forward], threads)
    } else {
        cpu::shared_bytes(level, threads, &products, dtype, (along, gathered))
    }
}

/// C (+)= op(A) op(B). See the module's contract.
pub fn gemm(ctx: &Ctx, g: Gemm<'_>) {
    let _timer =
        ctx.timer("gemm", sizes![g.m, g.n, g.k, g.a.data, g.a.ld, g.ta, g.b.data, g.b.ld, g.tb, g.c.data, g.c.ld]);
    let (m, n, k) = (g.m, g.n, g.k);
    let fits = |rows: usize, cols: usize, ld: usize, len: usize| {
        let end = || (rows - 1).checked_mul(ld).and_then(|before| before.checked_add(cols));
        rows == 0 || cols == 0 || (ld >= cols && end().is_some_and(|end| len >= end))
    };
    let (ra, ca) = if g.ta { (k, m) } else { (m, k) };
    let (rb, cb) = if g.tb { (n, k) } else { (k, n) };
    assert!(fits(ra, ca, g.a.ld, g.a.data.len()), "A [{ra}, {ca}] with ld {} in {}", g.a.ld, g.a.data.len());
    assert!(fits(rb, cb, g.b.ld, g.b.data.len()), "B [{rb}, {cb}] with ld {} in {}", g.b.ld, g.b.data.len());
    assert!(fits(m, n, g.c.ld, g.c.data.len()), "C [{m}, {n}] with ld {} in {}", g.c.ld, g.c.data.len());
    match &ctx.device {
        Device::Cuda(cuda) => cuda::gemm(cuda, g),
        Device::Cpu(cpu) => {
            // How far from a single row the next would be does not matter, nor how far rows without elements are apart: it
            // may be any number.
            let near = |ld: usize, rows: usize, cols: usize| if rows <= 1 || cols == 0 { cols } else { ld };
            let a = Operand::new(g.a.data, near(g.a.ld, ra, ca), !g.ta);
            let b = Operand::new(g.b.data, near(g.b.ld, rb, cb), g.tb);
            let product = cpu::Product { m, n, k, a, b, c: 0, ldc: near(g.c.ld, m, n) };
            cpu::run(cpu, &[product], g.c.data, g.accumulate);
        }
    }
}

/// `y[N, out]` = `x[N, in]` W^T (W `[out, in]`).
pub fn linear(ctx: &Ctx, x: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    let _timer = ctx.timer("gemm forward", sizes![x, w, y]);
    let n = rows_of(x.len(), w.cols, "x");
    assert_eq!(w.experts, 1, "a stack of {} matrices", w.experts);
    assert_eq!(y.len(), n * w.rows, "y of x [{n}, {}] and W [{}, {}]", w.cols, w.rows, w.cols);
    gemm(
        ctx,
        Gemm {
            m: n,
            n: w.rows,
            k: w.cols,
            a: Mat { data: x, ld: w.cols },
            ta: false,
            b: Mat { data: w.data, ld: w.cols },
            tb: true,
            c: MatMut { data: y, ld: w.rows },
            accumulate: false,
        },
    );
}

/// `dx[N, in]` (+)= `dy[N, out]` W.
pub fn linear_backward_input(ctx: &Ctx, dy: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>, accumulate: bool) {
    let _timer = ctx.timer("gemm backward input", sizes![dy, w, dx]);
    let n = rows_of(dy.len(), w.rows, "dy");
    assert_eq!(w.experts, 1, "a stack of {} matrices", w.experts);
    assert_eq!(dx.len(), n * w.cols, "dx of dy [{n}, {}] and W [{}, {}]", w.rows, w.rows, w.cols);
    gemm(
        ctx,
        Gemm {
            m: n,
            n: w.cols,
            k: w.rows,
            a: Mat { data: dy, ld: w.rows },
            ta: false,
            b: Mat { data: w.data, ld: w.cols },
            tb: false,
            c: MatMut { data: dx, ld: w.cols },
            accumulate,
        },
    );
}

/// `dW[rows, cols]` (+)= `dy[N, rows]`^T `x[N, cols]`; dW is f32, and may be columns of a wider matrix.
pub fn linear_backward_weight(
    ctx: &Ctx,
    x: View<'_>,
    dy: View<'_>,
    rows: usize,
    cols: usize,
    dw: MatMut<'_>,
    accumulate: bool,
) {
    let _timer = ctx.timer("gemm backward weight", sizes![x, dy, rows, cols, dw.data, dw.ld]);
    let n = rows_of(x.len(), cols, "x");
    assert_eq!(dy.len(), n * rows, "dy of x [{n}, {cols}] and W [{rows}, {cols}]");
    gemm(
        ctx,
        Gemm {
            m: rows,
            n: cols,
            k: n,
            a: Mat { data: dy, ld: rows },
            ta: true,
            b: Mat { data: x, ld: cols },
            tb: false,
            c: dw,
            accumulate,
        },
    );
}

/// Rows of a dense matrix with `cols` columns.
fn rows_of(len: usize, cols: usize, name: &str) -> usize {
    assert!(cols > 0 && len.is_multiple_of(cols), "{name}: {len} elements in rows of {cols}");
    len / cols
}
