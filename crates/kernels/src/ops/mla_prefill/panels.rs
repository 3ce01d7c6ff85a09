//! What both directions do with panels: tiles of operands packed over all of their k, and their products.
//!
//! A tile is 64 queries or 64 keys of one head. Scores lie as `[keys][queries]`: the softmax then runs along contiguous
//! queries without a horizontal sum, and they are packed as lanes (queries) or as rows (keys) without being turned.

use super::tile::TILE;
use super::{Problem, Shape};
use crate::isa::{Isa, SQUARE, transpose, vectorised};
use crate::panel::{self, Cell, Lines, Multiply, Operand, Panel, Part, ROW_CELLS, Rows, WIDEST_GROUP, group_width};
use crate::{Cpu, DType, Elem, View};

/// What cells hold, and how wide groups of lanes are.
#[derive(Clone, Copy)]
pub struct Panels {
    pub isa: Isa,
    cell: Cell,
    group: usize,
}

/// Rows or columns that panels and sums have room for: whole groups of lanes on any level.
pub fn room(n: usize) -> usize {
    n.next_multiple_of(WIDEST_GROUP)
}

impl Panels {
    pub fn new(cpu: &Cpu, dtype: DType) -> Self {
        let level = cpu.isa().level();
        Self { isa: cpu.isa(), cell: Cell::of(level, dtype == DType::Bf16), group: group_width(level) }
    }

    /// Words of the lanes of `width` outer indices (whole groups) over k.
    pub fn lanes_len(&self, width: usize, k: usize) -> usize {
        self.cell.pieces(k).map(|(_, kc)| self.cell.cells(kc) * width).sum()
    }

    /// Words of the rows of `count` outer indices over k.
    pub fn rows_len(&self, count: usize, k: usize) -> usize {
        self.cell.pieces(k).count() * room(count) * ROW_CELLS
    }

    /// Packs `count` outer indices as lanes, `width` of them with zeros.
    pub fn lanes(&self, op: Operand<'_>, count: usize, width: usize, k: usize, dst: &mut [u32]) {
        if count.next_multiple_of(self.group) < width {
            dst.fill(0);
        }
        let mut at = 0;
        for (k0, kc) in self.cell.pieces(k) {
            let cells = self.cell.cells(kc);
            let part = Part { first: 0, count, k0, kc, cells };
            panel::lanes(self.isa, op, part, self.cell, (self.group, self.group * cells), &mut dst[at..]);
            at += cells * width;
        }
    }

    /// Packs `count` outer indices as rows.
    pub fn rows(&self, op: Operand<'_>, count: usize, k: usize, dst: &mut [u32]) {
        for (panel, (k0, kc)) in dst.chunks_exact_mut(room(count) * ROW_CELLS).zip(self.cell.pieces(k)) {
            let part = Part { first: 0, count, k0, kc, cells: self.cell.cells(kc) };
            panel::rows(self.isa, op, part, self.cell, panel);
        }
    }

    /// `sums[count][width]` (+)= rows . lanes over k.
    pub fn multiply(
        &self,
        (lanes, width): (&[u32], usize),
        (rows, count): (&[u32], usize),
        k: usize,
        sums: &mut [f32],
        add: bool,
    ) {
        let mut at = 0;
        for (i, (k0, kc)) in self.cell.pieces(k).enumerate() {
            let cells = self.cell.cells(kc);
            let product = Multiply {
                panels: &[Panel { lanes: &lanes[at..], rows: &rows[i * room(count) * ROW_CELLS..], cells }],
                lanes_apart: self.group,
                width,
                form: Rows::Along(ROW_CELLS),
                count,
                sums,
                add: add || k0 > 0,
                finish: None,
                ahead: &mut [Lines::NONE; 2],
            };
            product.run(self.isa, self.cell);
            at += cells * width;
        }
    }
}

/// Outer index: token; k: the elements of its head.
pub fn by_token(data: View<'_>, from: usize, ld: usize) -> Operand<'_> {
    Operand::new(data.slice(from.min(data.len())..data.len()), ld, true)
}

/// Outer index: the elements of a head; k: tokens.
pub fn by_element(data: View<'_>, from: usize, ld: usize) -> Operand<'_> {
    Operand { k_contiguous: false, ..by_token(data, from, ld) }
}

/// Copies n keys of head h from key `at` on, each `[nope | rope]`.
pub fn gather_keys<T: Elem>(x: &Problem<'_>, h: usize, at: usize, n: usize, keys: &mut [T]) {
    let Shape { heads, nope, rope, v, k_pe_stride, .. } = x.shape;
    let (kv_up, k_pe) = (T::of(x.kv_up), T::of(x.k_pe));
    for (j, key) in keys.chunks_exact_mut(nope + rope).enumerate().take(n) {
        let (up, pe) = key.split_at_mut(nope);
        up.copy_from_slice(&kv_up[((at + j) * heads + h) * (nope + v)..][..nope]);
        pe.copy_from_slice(&k_pe[(at + j) * k_pe_stride..][..rope]);
    }
}

/// Where the values of head h begin in kv_up from key `at` on, and their distance.
pub fn values_at(s: &Shape, h: usize, at: usize) -> (usize, usize) {
    ((at * s.heads + h) * (s.nope + s.v) + s.nope, s.heads * (s.nope + s.v))
}

/// `out[q][c]` = `sums[c][q]` for c < n; out's rows are `room(n)` long.
pub fn turn(isa: Isa, sums: &[f32], n: usize, out: &mut [f32]) {
    let ld = room(n);
    let (sums, out) = (bytemuck::cast_slice(sums), bytemuck::cast_slice_mut(out));
    for c in (0..n).step_by(SQUARE) {
        for q in (0..TILE).step_by(SQUARE) {
            transpose(isa, &sums[c * TILE + q..], TILE, &mut out[q * ld + c..], ld, SQUARE);
        }
    }
}

vectorised! {
    /// Multiplies each row of sums `[n][TILE]` by alpha.
    pub fn scale_columns(isa: Isa, sums: &mut [f32], alpha: &[f32; TILE]) {
        for row in sums.as_chunks_mut::<TILE>().0 {
            for (s, a) in row.iter_mut().zip(alpha) {
                *s *= a;
            }
        }
    }
}

vectorised! {
    /// Rounds a row times a factor.
    pub fn round_scaled<T: Elem>(isa: Isa, from: &[f32], factor: f32, to: &mut [T]) {
        for (o, x) in to.iter_mut().zip(from) {
            *o = T::round(x * factor);
        }
    }
}
