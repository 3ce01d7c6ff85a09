//! A register-blocked f32 product over small dense tiles, and the rows that go into it and come out.
//!
//! Every element of the product is one sum over k in ascending order, whatever the block it is computed in: a row's bits
//! depend neither on how many rows stand beside it nor on where it lies in its tile.

use crate::Elem;
use crate::isa::{Lanes, Level};

/// Columns are padded to a multiple of this in every tile.
pub const PAD: usize = 16;

/// The padded number of columns.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// `C[m, n]` (+)= `A[m, k]` `B[k, n]`; A is read element by element at any strides, B and C by rows.
pub struct Product<'a> {
    /// Rows of C.
    pub m: usize,
    /// Columns of C, a multiple of [`PAD`].
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// A's elements.
    pub a: &'a [f32],
    /// From one row of A to the next.
    pub a_row: usize,
    /// From one column of A to the next.
    pub a_col: usize,
    /// B's elements.
    pub b: &'a [f32],
    /// From one row of B to the next.
    pub b_row: usize,
    /// From one row of C to the next.
    pub c_row: usize,
    /// Continue the sums that are in C, instead of starting from zero.
    pub add: bool,
}

impl Product<'_> {
    /// Computes it into c.
    #[inline(always)]
    pub fn write<V: Lanes>(&self, c: &mut [f32]) {
        if self.m == 0 || self.n == 0 {
            return;
        }
        assert!(self.n.is_multiple_of(PAD) && (self.m - 1) * self.c_row + self.n <= c.len(), "C is too short");
        if self.k > 0 {
            assert!((self.m - 1) * self.a_row + (self.k - 1) * self.a_col < self.a.len(), "A is too short");
            assert!((self.k - 1) * self.b_row + self.n <= self.b.len(), "B is too short");
        }
        // SAFETY: V is used inside a function compiled for it, and the asserts above bound every access of a block.
        unsafe { self.blocks::<V>(c) }
    }

    /// The product, in the register blocks that suit the level.
    #[inline(always)]
    unsafe fn blocks<V: Lanes>(&self, c: &mut [f32]) {
        let step = if V::LEVEL >= Level::Avx512 { 32 } else { 16 };
        let wide = self.n / step * step;
        for j in (0..wide).step_by(step) {
            // SAFETY: passed on from the caller; a step is as wide as its level's block.
            unsafe {
                match V::LEVEL {
                    Level::Avx512 | Level::Avx512Bf16 | Level::Amx => self.columns::<V, 8, 2>(c, j),
                    Level::Avx2 => self.columns::<V, 4, 2>(c, j),
                    Level::Portable => self.columns::<V, 2, 4>(c, j),
                }
            }
        }
        if wide < self.n {
            // SAFETY: passed on from the caller; n is a multiple of 16.
            unsafe { self.columns::<V, 8, 1>(c, wide) };
        }
    }

    /// All rows of the columns j .. j + NV * N, MR rows at a time, then one at a time.
    #[inline(always)]
    unsafe fn columns<V: Lanes, const MR: usize, const NV: usize>(&self, c: &mut [f32], j: usize) {
        let mut i = 0;
        while i + MR <= self.m {
            // SAFETY: passed on from the caller.
            unsafe { self.block::<V, MR, NV>(c, i, j) };
            i += MR;
        }
        while i < self.m {
            // SAFETY: passed on from the caller.
            unsafe { self.block::<V, 1, NV>(c, i, j) };
            i += 1;
        }
    }

    /// Rows i .. i + MR, columns j .. j + NV * N, with the sums in registers.
    #[inline(always)]
    unsafe fn block<V: Lanes, const MR: usize, const NV: usize>(&self, c: &mut [f32], i: usize, j: usize) {
        debug_assert!(i + MR <= self.m && j + NV * V::N <= self.n);
        // SAFETY: `write` checked that rows below m, columns below n and sums of length k stay inside a, b and c, and
        // this block's rows and columns are below m and n.
        unsafe {
            let a = self.a.as_ptr().add(i * self.a_row);
            let b = self.b.as_ptr().add(j);
            let c = c.as_mut_ptr().add(i * self.c_row + j);
            let mut sum = [[V::splat(0.0); NV]; MR];
            if self.add {
                for (r, row) in sum.iter_mut().enumerate() {
                    for (v, s) in row.iter_mut().enumerate() {
                        *s = V::load(c.add(r * self.c_row + v * V::N));
                    }
                }
            }
            for k in 0..self.k {
                let mut right = [V::splat(0.0); NV];
                for (v, x) in right.iter_mut().enumerate() {
                    *x = V::load(b.add(k * self.b_row + v * V::N));
                }
                for (r, row) in sum.iter_mut().enumerate() {
                    let left = V::splat(*a.add(r * self.a_row + k * self.a_col));
                    for (s, x) in row.iter_mut().zip(right) {
                        *s = left.mul_add(x, *s);
                    }
                }
            }
            for (r, row) in sum.iter().enumerate() {
                for (v, s) in row.iter().enumerate() {
                    s.store(c.add(r * self.c_row + v * V::N));
                }
            }
        }
    }
}

/// Widens a row.
#[inline(always)]
pub fn widen<T: Elem>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    for (o, x) in to.iter_mut().zip(from) {
        *o = x.f32();
    }
}

/// Rounds a row times a factor.
#[inline(always)]
pub fn round_scaled<T: Elem>(from: &[f32], factor: f32, to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    for (o, x) in to.iter_mut().zip(from) {
        *o = T::round(x * factor);
    }
}

#[cfg(test)]
mod tests {
    use super::{PAD, Product};
    use crate::Isa;
    use crate::isa::{Job, Lanes};
    use crate::testing::{isas, normals};

    struct Multiply<'a>(Product<'a>, &'a mut [f32]);
    impl Job for Multiply<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            self.0.write::<V>(self.1);
        }
    }

    fn check_product(isa: Isa) {
        for (m, n, k) in [(1, PAD, 1), (7, 2 * PAD, 3), (64, 3 * PAD, 50), (19, 4 * PAD, 64), (5, PAD, 0)] {
            for (a_row, a_col) in [(k + 2, 1), (1, 64)] {
                for add in [false, true] {
                    let a = normals(1, 64 * 64.max(k + 2), 1.0);
                    let b = normals(2, k.max(1) * (n + 3), 1.0);
                    let before = normals(3, m * (n + 1), 1.0);
                    let mut c = before.clone();
                    let (b_row, c_row) = (n + 3, n + 1);
                    isa.run(Multiply(Product { m, n, k, a: &a, a_row, a_col, b: &b, b_row, c_row, add }, &mut c));
                    for (i, (&c, &old)) in c.iter().zip(&before).enumerate() {
                        let (i, j) = (i / c_row, i % c_row);
                        let mut e = if add || j == n { f64::from(old) } else { 0.0 };
                        for l in (0..k).filter(|_| j < n) {
                            e += f64::from(a[i * a_row + l * a_col]) * f64::from(b[l * b_row + j]);
                        }
                        assert!((f64::from(c) - e).abs() < 2e-5, "{m} {n} {k} {add} at {i}, {j}: {c}, expected {e}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_on_every_level() {
        isas().into_iter().for_each(check_product);
    }
}
