//! What both directions do with panels: operands packed over all of their k, and their products.
//!
//! Tiles are some queries and some keys of one head. Lanes come in groups, `[group][cell][lane]`, and so do the sums of
//! products with them, `[group][row][lane]`: a part of the rows, of the lanes or of k is a part of a slice.

use super::{Problem, Shape};
use crate::buffer::Disjoint;
use crate::isa::{Isa, vectorised};
use crate::panel::{self, CELLS, Cell, Lines, Multiply, Operand, Panel, Part, Rows, WIDEST_GROUP, group_width};
use crate::{Cpu, DType, Elem, View, bf16};

/// Fewest lanes of a group on any level.
pub const LEAST_GROUP: usize = WIDEST_GROUP / 2;

/// Rows or columns that sums have room for: whole groups of lanes on any level.
pub fn room(n: usize) -> usize {
    n.next_multiple_of(WIDEST_GROUP)
}

/// Panels that are multiplied at once.
const PANELS: usize = 4;

/// What cells hold, and how wide groups of lanes are.
#[derive(Clone, Copy)]
pub struct Panels {
    pub isa: Isa,
    pub cell: Cell,
    /// Lanes of a group.
    pub group: usize,
}

impl Panels {
    pub fn new(cpu: &Cpu, dtype: DType) -> Self {
        let level = cpu.isa().level();
        Self { isa: cpu.isa(), cell: Cell::of(level, dtype == DType::Bf16), group: group_width(level) }
    }

    /// Cells of k steps.
    pub fn cells(&self, k: usize) -> usize {
        self.cell.cells(k)
    }

    /// Whether cells hold two elements.
    pub fn pairs(&self) -> bool {
        self.cell == Cell::Pair
    }

    /// Packs `count` outer indices as groups of lanes over k; the rest of the last group, and of the cells, is zeros.
    pub fn lanes(&self, op: Operand<'_>, count: usize, (k, cells): (usize, usize), dst: &mut [u32]) {
        for first in (0..cells).step_by(CELLS) {
            let (k0, some) = (first * self.cell.depth(), CELLS.min(cells - first));
            let part =
                Part { first: 0, count, k0, kc: k.saturating_sub(k0).min(some * self.cell.depth()), cells: some };
            panel::lanes(
                self.isa,
                op,
                part,
                self.cell,
                (self.group, self.group * cells),
                &mut dst[first * self.group..],
            );
        }
    }

    /// `sums[count][lane]` (+)= rows . lanes of one group over some cells.
    pub fn multiply(
        &self,
        lanes: &[u32],
        (rows, form): (&[u32], Rows),
        (count, cells): (usize, usize),
        sums: &mut [f32],
        mut add: bool,
        ahead: &mut Ahead,
    ) {
        for from in (0..cells).step_by(PANELS * CELLS) {
            let mut panels = [Panel::NONE; PANELS];
            let some = panels.iter_mut().zip((from..cells).step_by(CELLS)).map(|(panel, first)| {
                *panel = Panel {
                    lanes: &lanes[first * self.group..],
                    rows: &rows[form.at(0, first)..],
                    cells: CELLS.min(cells - first),
                };
            });
            let some = some.count();
            let product = Multiply {
                panels: &panels[..some],
                lanes_apart: self.group,
                width: self.group,
                form,
                count,
                sums,
                add,
                finish: None,
                ahead: ahead.next(),
            };
            product.run(self.isa, self.cell);
            add = true;
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

/// Rows of cells, by element: what was gathered.
pub fn gathered<'a>(p: &Panels, rows: &'a [u32], cells: usize) -> Operand<'a> {
    if p.pairs() {
        by_element(View::Bf16(bytemuck::cast_slice(rows)), 0, 2 * cells)
    } else {
        by_element(View::F32(bytemuck::cast_slice(rows)), 0, cells)
    }
}

/// Which keys: n of head h from key `at` on.
#[derive(Clone, Copy)]
pub struct Keys {
    pub h: usize,
    pub at: usize,
    pub n: usize,
}

/// Copies keys to rows of cells, each `[nope | rope]`, and their values if there is room for any.
pub fn gather<T: Elem>(p: &Panels, x: &Problem<'_>, which: Keys, keys: &mut [u32], values: &mut [u32]) {
    let Shape { heads, nope, rope, v, k_pe_stride, .. } = x.shape;
    let (up, pe) = (T::of(x.kv_up), T::of(x.k_pe));
    let (key_cells, value_cells) = (p.cells(nope + rope), p.cells(v));
    for j in 0..which.n {
        let up = &up[((which.at + j) * heads + which.h) * (nope + v)..][..nope + v];
        let pe = &pe[(which.at + j) * k_pe_stride..][..rope];
        row(p, [&up[..nope], pe], &mut keys[j * key_cells..][..key_cells]);
        if !values.is_empty() {
            row(p, [&up[nope..], &[]], &mut values[j * value_cells..][..value_cells]);
        }
    }
}

/// Memory that is asked for beside products, one part after the other: rows of tokens lie far apart, so that the CPU does
/// not foresee them.
pub struct Ahead {
    now: [Lines<'static>; 2],
    waiting: [Lines<'static>; Self::MOST],
    first: usize,
    count: usize,
}

impl Ahead {
    /// Parts that can wait.
    const MOST: usize = 8;
    /// Lines of a part that are asked for in a step of a product.
    const EACH: usize = 3;

    pub fn new() -> Self {
        Self { now: [Lines::NONE; 2], waiting: [Lines::NONE; Self::MOST], first: 0, count: 0 }
    }

    /// Asks for `rows` rows of `width` elements, `apart` elements from one to the next; not if too much waits.
    pub fn rows<T>(&mut self, at: *const T, rows: (usize, usize), width: usize) {
        if self.count < Self::MOST {
            self.waiting[(self.first + self.count) % Self::MOST] = Lines::of_rows(at, rows, width, Self::EACH);
            self.count += 1;
        }
    }

    /// Asks for the rows of n tokens from `at` on, of `heads` heads of `width` elements.
    pub fn tokens<T: Elem>(&mut self, data: View<'_>, (at, h, heads): (usize, usize, usize), n: usize, width: usize) {
        self.rows(T::of(data).as_ptr().wrapping_add((at * heads + h) * width), (n, heads * width), width);
    }

    /// Asks for keys and their values.
    pub fn keys<T: Elem>(&mut self, x: &Problem<'_>, Keys { h, at, n }: Keys) {
        let s = &x.shape;
        self.tokens::<T>(x.kv_up, (at, h, s.heads), n, s.nope + s.v);
        self.rows(T::of(x.k_pe).as_ptr().wrapping_add(at * s.k_pe_stride), (n, s.k_pe_stride), s.rope);
    }

    /// What is asked for beside the next product.
    fn next(&mut self) -> &mut [Lines<'static>; 2] {
        for lines in &mut self.now {
            if lines.done() && self.count > 0 {
                *lines = self.waiting[self.first];
                (self.first, self.count) = ((self.first + 1) % Self::MOST, self.count - 1);
            }
        }
        &mut self.now
    }
}

/// The cells of two parts of a row.
fn row<T: Elem>(p: &Panels, parts: [&[T]; 2], cells: &mut [u32]) {
    if p.pairs() {
        let to: &mut [bf16] = bytemuck::cast_slice_mut(cells);
        let (first, rest) = to.split_at_mut(parts[0].len());
        let (second, rest) = rest.split_at_mut(parts[1].len());
        first.copy_from_slice(bytemuck::cast_slice(parts[0]));
        second.copy_from_slice(bytemuck::cast_slice(parts[1]));
        rest.fill(bf16::ZERO);
    } else {
        let (first, second) = bytemuck::cast_slice_mut(cells).split_at_mut(parts[0].len());
        widen(p.isa, parts[0], first);
        widen(p.isa, parts[1], second);
    }
}

vectorised! {
    fn widen<T: Elem>(isa: Isa, from: &[T], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(o, x)| *o = x.f32());
    }
}

/// Where the values of head h begin in kv_up from key `at` on, and their distance.
pub fn values_at(s: &Shape, h: usize, at: usize) -> (usize, usize) {
    ((at * s.heads + h) * (s.nope + s.v) + s.nope, s.heads * (s.nope + s.v))
}

vectorised! {
    /// Writes n rows of sums `[group][rows][lane]` to rows `apart` elements apart of an output: each times its factor,
    /// rounded.
    pub fn store<T: Elem>(
        isa: Isa,
        sums: (&[f32], usize, usize),
        factors: &[f32],
        width: usize,
        to: (&Disjoint<'_, T>, usize, usize),
    ) {
        let ((sums, group, rows), (to, first, apart)) = (sums, to);
        for (q, factor) in factors.iter().enumerate() {
            // SAFETY: the rows are those of the caller's queries or keys and head, which belong to one task.
            let to = unsafe { to.part(first + q * apart, width) };
            for (sums, to) in sums[q * group..].chunks(rows * group).zip(to.chunks_mut(group)) {
                if let (Some(to), Some(sums)) = (to.first_chunk_mut::<32>(), sums.first_chunk::<32>()) {
                    for i in 0..32 {
                        to[i] = T::round(sums[i] * factor);
                    }
                } else {
                    to.iter_mut().zip(sums).for_each(|(o, x)| *o = T::round(x * factor));
                }
            }
        }
    }
}
