//! General matrix product with FP32 accumulation: C[m,n] (+)= op(A)[m,k] op(B)[k,n]. Operands may be f32 or bf16 in any
//! mix; bf16 is widened exactly, sums are f32, and a bf16 C is rounded once (after adding the old C when accumulating).
//!
//! Batch invariance: the bits of a row of C depend on that row of op(A), on B, k and n, never on m: one row alone
//! equals the same row among any others. Accumulation over k has a fixed order that depends on k alone.
//! Accumulating adds the finished product to the old C: C = C + (sum over k), so that gradients of two micro-batches
//! add as if each had been computed alone.
//! k = 0 leaves C at zero (or unchanged when accumulating).

use crate::{Ctx, View, ViewMut, Weight};

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

/// Arguments of [`gemm`].
#[derive(Debug)]
pub struct Gemm<'a> {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// [m, k], or [k, m] if `ta`.
    pub a: Mat<'a>,
    /// A is stored transposed.
    pub ta: bool,
    /// [k, n], or [n, k] if `tb`.
    pub b: Mat<'a>,
    /// B is stored transposed.
    pub tb: bool,
    /// [m, n].
    pub c: MatMut<'a>,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

/// C (+)= op(A) op(B). See the module's contract.
pub fn gemm(ctx: &Ctx, g: Gemm<'_>) {
    todo!()
}

/// y[N, out] = x[N, in] W^T (W [out, in]).
pub fn linear(ctx: &Ctx, x: View<'_>, w: &Weight<'_>, y: ViewMut<'_>) {
    let n = x.len() / w.cols;
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

/// dx[N, in] (+)= dy[N, out] W.
pub fn linear_backward_input(ctx: &Ctx, dy: View<'_>, w: &Weight<'_>, dx: ViewMut<'_>, accumulate: bool) {
    let n = dy.len() / w.rows;
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

/// dW[out, in] += dy[N, out]^T x[N, in]; dW is f32.
pub fn linear_backward_weight(ctx: &Ctx, x: View<'_>, dy: View<'_>, rows: usize, cols: usize, dw: ViewMut<'_>) {
    let n = x.len() / cols;
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
            c: MatMut { data: dw, ld: cols },
            accumulate: true,
        },
    );
}
