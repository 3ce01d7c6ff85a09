//! Logits of some tokens over a slice of the vocabulary, or their gradients, and the matrix products that they are in.

use super::super::Inputs;
use super::super::gradient::RowGradient;
use super::ROWS;
use crate::isa::{Isa, vectorised};
use crate::ops::gemm::{Gemm, Mat, MatMut, gemm};
use crate::{AlignedVec, Cpu, Ctx, Elem, View, ViewMut, Weight, bf16};
use std::ops::Range;

/// Ids of one slice: wide enough for the matrix products, narrow enough that N x SLICE stays small beside N x D.
pub const SLICE: usize = 512;

/// The fixed slices of a vocabulary of `v` ids.
pub fn slices(v: usize) -> impl Iterator<Item = Range<usize>> {
    (0..v).step_by(SLICE).map(move |start| start..v.min(start + SLICE))
}

/// Where `id` is within a slice, if it is.
pub fn position(id: i32, ids: &Range<usize>) -> Option<usize> {
    usize::try_from(id).ok().filter(|id| ids.contains(id)).map(|id| id - ids.start)
}

/// Room for logits.
pub struct Logits {
    z: AlignedVec<f32>,
    /// Of all slices, not of one.
    pub all: bool,
    rows: usize,
    pub ld: usize,
}

impl Logits {
    /// Of `n` tokens over `v` ids, or over one slice of them.
    pub fn new(cpu: &Cpu, n: usize, v: usize, all: bool) -> Self {
        let ld = SLICE.min(v);
        let slices = if all { v.div_ceil(SLICE) } else { 1 };
        Self { z: cpu.empty(n * ld * slices), all, rows: n, ld }
    }

    /// Those of the first `n` tokens over some ids.
    pub fn slice(&mut self, n: usize, ids: &Range<usize>) -> Slice<'_> {
        let at = if self.all { ids.start / SLICE * self.rows * self.ld } else { 0 };
        Slice { z: &mut self.z[at..][..n * self.ld], ids: ids.clone(), ld: self.ld, n }
    }
}

/// The logits (or their gradients) of some tokens over one slice of the vocabulary.
pub struct Slice<'a> {
    z: &'a mut [f32],
    pub ids: Range<usize>,
    ld: usize,
    pub n: usize,
}

impl<'a> Slice<'a> {
    /// Row `r`, as wide as the slice.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.z[r * self.ld..][..self.ids.len()]
    }

    /// `z[N, ids]` = hidden `W[ids]`^T, not yet divided by the temperature.
    pub fn compute(&mut self, ctx: &Ctx, x: &Inputs<'_>) {
        let d = x.weight.cols;
        gemm(
            ctx,
            Gemm {
                m: self.n,
                n: self.ids.len(),
                k: d,
                a: Mat { data: x.hidden, ld: d },
                ta: false,
                b: Mat { data: weights_of(&x.weight, &self.ids), ld: d },
                tb: true,
                c: MatMut { data: ViewMut::F32(self.z), ld: self.ld },
                accumulate: false,
            },
        );
    }

    /// Logits in, their gradients out, as their products take them: rounded where the other operand is bf16 too, those are
    /// faster then. `given` are ids and their gradients, G a row.
    pub fn gradients(
        self,
        cpu: &Cpu,
        rows: &[RowGradient],
        given: Option<(&[i32], &[f32])>,
        scale: f32,
        rounded: Option<&'a mut [bf16]>,
    ) -> Mat<'a> {
        let (ids, ld) = (self.ids, self.ld);
        let row = |r: usize, z: &mut [f32]| {
            rows[r].apply(cpu.isa(), z, scale);
            if let Some(j) = position(rows[r].target, &ids) {
                z[j] += rows[r].d_target;
            }
            let Some((given, d_given)) = given else { return };
            let g = given.len() / rows.len();
            for (&id, &d) in given[r * g..][..g].iter().zip(&d_given[r * g..]) {
                if let Some(j) = position(id, &ids) {
                    z[j] += d * scale;
                }
            }
        };
        let (z, width) = (self.z, ids.len());
        let Some(to) = rounded else {
            cpu.chunks_mut(z, ROWS * ld, |block, z| {
                z.chunks_mut(ld).enumerate().for_each(|(i, z)| row(block * ROWS + i, &mut z[..width]));
            });
            return Mat { data: View::F32(z), ld };
        };
        let z = &*z;
        cpu.chunks_mut(to, ROWS * ld, |block, to| {
            // Not where the logits are, which would be written to memory once more.
            let mut dz = [0.0; SLICE];
            for (i, to) in to.chunks_mut(ld).enumerate() {
                let r = block * ROWS + i;
                dz[..width].copy_from_slice(&z[r * ld..][..width]);
                row(r, &mut dz[..width]);
                round(cpu.isa(), &dz[..width], to);
            }
        });
        Mat { data: View::Bf16(to), ld }
    }
}

/// `c[N, D]` = dz `W[ids]`, added to what the slices before left there.
pub fn times_weight(ctx: &Ctx, x: &Inputs<'_>, ids: &Range<usize>, dz: Mat<'_>, c: ViewMut<'_>) {
    let d = x.weight.cols;
    gemm(
        ctx,
        Gemm {
            m: x.targets.len(),
            n: d,
            k: ids.len(),
            a: dz,
            ta: false,
            b: Mat { data: weights_of(&x.weight, ids), ld: d },
            tb: false,
            c: MatMut { data: c, ld: d },
            accumulate: ids.start > 0,
        },
    );
}

/// `c[ids, D]` = dz^T hidden, or the same added to what is there.
pub fn transposed_times_hidden(
    ctx: &Ctx,
    x: &Inputs<'_>,
    ids: &Range<usize>,
    dz: Mat<'_>,
    c: ViewMut<'_>,
    accumulate: bool,
) {
    let d = x.weight.cols;
    gemm(
        ctx,
        Gemm {
            m: ids.len(),
            n: d,
            k: x.targets.len(),
            a: dz,
            ta: true,
            b: Mat { data: x.hidden, ld: d },
            tb: false,
            c: MatMut { data: c, ld: d },
            accumulate,
        },
    );
}

fn weights_of<'a>(w: &Weight<'a>, ids: &Range<usize>) -> View<'a> {
    w.data.slice(ids.start * w.cols..ids.end * w.cols)
}

vectorised! {
    fn round(isa: Isa, from: &[f32], to: &mut [bf16]) {
        to.iter_mut().zip(from).for_each(|(o, x)| *o = Elem::round(*x));
    }
}
