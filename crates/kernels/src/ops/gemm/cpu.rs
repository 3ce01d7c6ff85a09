//! The product on the host's cores: a list of products is cut into output tiles, and the tiles are the tasks. A task packs
//! the panels of its tile, sums it in its thread's scratch (`kernel`), and rounds the sums into the output.
//!
//! Lanes run over C's columns, so that what is stored is contiguous. Tiles and pieces of k follow the shape and the
//! level; the bits of an element depend on neither, since every sum is one chain over k.

use super::tiles;
use crate::buffer::Pod;
use crate::isa::{Isa, Level, SQUARE, vectorised};
use crate::panel::{self, CELLS, Cell, Multiply, Operand, Part, ROW_CELLS, group_width};
use crate::{AlignedVec, Cpu, DType, Elem, ViewMut, bf16};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

/// One product of a list: `C[m, n]` (+)= `A[m, k]` `B[k, n]`, with C at an offset of the output shared by the list.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Outer index m.
    pub a: Operand<'a>,
    /// Outer index n.
    pub b: Operand<'a>,
    /// Where C begins in the output.
    pub c: usize,
    /// Elements from one row of C to the next.
    pub ldc: usize,
}

/// Largest tile: its sums and panels fit the second-level cache. Rows are a multiple of every level's register block.
const ROWS: usize = 240;
const COLUMNS: usize = 256;
/// Smallest tile that a product is cut into for the sake of balance.
const LEAST_ROWS: usize = 48;
const LEAST_COLUMNS: usize = 64;
/// Tasks to aim for: enough to keep 16 workers busy; with more, small products would spend their time on packing.
const TASKS: usize = 16;
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 18;

impl Product<'_> {
    fn is_bf16(&self) -> bool {
        self.a.data.dtype() == DType::Bf16 && self.b.data.dtype() == DType::Bf16
    }

    fn work(&self) -> usize {
        self.m * self.n * self.k.max(1)
    }

    /// Rows and columns of a tile when a task should do about `work` multiply-adds.
    fn tile(&self, work: usize) -> (usize, usize) {
        let (mut r, mut c) = (ROWS, COLUMNS);
        while r * c * self.k > work && (c > LEAST_COLUMNS || r > LEAST_ROWS) {
            // Columns first: packing their lanes is the dearer part, and it is shared by the tile's rows.
            if c > LEAST_COLUMNS { c /= 2 } else { r = (r / 2).max(LEAST_ROWS) }
        }
        (even(self.m, r, 12), even(self.n, c, 32))
    }
}

/// Size of the parts when `len` is cut into as few equal parts of at most about `most` as will do.
fn even(len: usize, most: usize, multiple: usize) -> usize {
    len.div_ceil(len.div_ceil(most)).next_multiple_of(multiple)
}

/// A tile of a product.
struct Task {
    product: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Computes all products. Their outputs follow one another in `out`, in the order of the list.
pub fn run(cpu: &Cpu, products: &[Product<'_>], out: ViewMut<'_>, accumulate: bool) {
    let mut end = 0;
    for p in products.iter().filter(|p| p.m > 0 && p.n > 0) {
        assert!(p.ldc >= p.n && p.c >= end, "outputs overlap: {p:?} begins before {end}");
        // Checked, because what tasks may write rests on it.
        let rows = (p.m - 1).checked_mul(p.ldc).and_then(|rows| rows.checked_add(p.n));
        let after = rows.and_then(|rows| rows.checked_add(p.c));
        end = after.unwrap_or_else(|| panic!("an output that ends nowhere: {p:?}"));
    }
    assert!(end <= out.len(), "outputs end at {end} of {}", out.len());
    let out = Output::new(out);
    if cpu.isa().level() == Level::Amx && products.first().is_some_and(Product::is_bf16) {
        assert!(products.iter().all(Product::is_bf16), "products of several types in one list");
        return tiles::run(cpu, products, &out, accumulate);
    }
    let tasks = tasks(products, accumulate);
    cpu.for_each(tasks.len(), |i| {
        let t = &tasks[i];
        SCRATCH.with_borrow_mut(|s| tile(cpu.isa(), &products[t.product], t, s, &out, accumulate));
    });
}

fn tasks(products: &[Product<'_>], accumulate: bool) -> Vec<Task> {
    let total: usize = products.iter().map(Product::work).sum();
    let work = (total / TASKS).max(LEAST_WORK);
    let mut tasks = Vec::new();
    // Adding an empty sum would turn -0 into 0.
    let idle = |p: &Product<'_>| p.m == 0 || p.n == 0 || (accumulate && p.k == 0);
    for (product, p) in products.iter().enumerate().filter(|(_, p)| !idle(p)) {
        let (tm, tn) = p.tile(work);
        for j in (0..p.n).step_by(tn) {
            for i in (0..p.m).step_by(tm) {
                tasks.push(Task { product, rows: i..(i + tm).min(p.m), cols: j..(j + tn).min(p.n) });
            }
        }
    }
    tasks
}

/// A worker's panels and its tile of sums.
struct Scratch {
    lanes: AlignedVec<u32>,
    rows: AlignedVec<u32>,
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        lanes: AlignedVec::zeros(0),
        rows: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
    });
}

pub(super) fn reserve<T: Pod>(v: &mut AlignedVec<T>, len: usize) {
    if v.len() < len {
        *v = AlignedVec::zeros(len);
    }
}

fn tile(isa: Isa, p: &Product<'_>, t: &Task, s: &mut Scratch, out: &Output<'_>, accumulate: bool) {
    let cell = Cell::of(isa, p.is_bf16());
    let group = group_width(isa);
    let width = t.cols.len().next_multiple_of(group);
    let count = t.rows.len();
    reserve(&mut s.sums, count * width);
    reserve(&mut s.lanes, CELLS * width);
    reserve(&mut s.rows, count.next_multiple_of(SQUARE) * ROW_CELLS);
    if p.k == 0 {
        s.sums[..count * width].fill(0.0);
    }
    for (k0, kc) in cell.pieces(p.k) {
        let cells = cell.cells(kc);
        let part = |range: &Range<usize>| Part { first: range.start, count: range.len(), k0, kc, cells };
        panel::lanes(isa, p.b, part(&t.cols), cell, group, &mut s.lanes);
        panel::rows(isa, p.a, part(&t.rows), cell, &mut s.rows);
        let multiply = Multiply { lanes: &s.lanes, width, rows: &s.rows, count, cells, sums: &mut s.sums, add: k0 > 0 };
        multiply.run(isa, cell);
    }
    store(isa, t, &s.sums, width, p, out, accumulate);
}

vectorised! {
    /// Moves a tile's finished sums to C.
    fn store(isa: Isa, t: &Task, sums: &[f32], width: usize, p: &Product<'_>, out: &Output<'_>, accumulate: bool) {
        for (sums, i) in sums.chunks_exact(width).zip(t.rows.clone()) {
            let at = p.c + i * p.ldc + t.cols.start;
            // SAFETY: products lie apart in the output (asserted by `run`), rows of one lie `ldc >= n` apart, and the tasks
            // partition its rows and columns: no other task touches these elements.
            let c = unsafe { out.segment(at, t.cols.len()) };
            match c {
                Segment::F32(c) => finish(c, sums, accumulate),
                Segment::Bf16(c) => finish(c, sums, accumulate),
            }
        }
    }
}

#[inline(always)]
pub(super) fn finish<T: Elem>(c: &mut [T], sums: &[f32], accumulate: bool) {
    if accumulate {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(c.f32() + s));
    } else {
        c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(*s));
    }
}

/// The output, written by many tasks at once, each its own elements.
pub(super) struct Output<'a> {
    data: Pointer,
    len: usize,
    life: PhantomData<&'a mut ()>,
}

#[derive(Clone, Copy)]
pub(super) enum Pointer {
    F32(*mut f32),
    Bf16(*mut bf16),
}

/// Consecutive elements of the output.
enum Segment<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

// SAFETY: an Output only hands out segments, and whoever asks for one promises that no other task has its elements.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    fn new(v: ViewMut<'a>) -> Self {
        let len = v.len();
        let data = match v {
            ViewMut::F32(x) => Pointer::F32(x.as_mut_ptr()),
            ViewMut::Bf16(x) => Pointer::Bf16(x.as_mut_ptr()),
            ViewMut::I32(_) | ViewMut::Cuda(_) => panic!("expected a float output in host memory"),
        };
        Self { data, len, life: PhantomData }
    }

    /// Where `rows` rows of `len` elements begin, `stride` apart; whoever writes them promises what `segment` asks for.
    #[inline(always)]
    pub fn at(&self, at: usize, len: usize, rows: usize, stride: usize) -> Pointer {
        let end = at + rows.saturating_sub(1) * stride + len;
        assert!(end <= self.len, "{rows} rows of {len} at {at}, {stride} apart, of {}", self.len);
        // SAFETY: within the borrowed output as just asserted.
        unsafe {
            match self.data {
                Pointer::F32(p) => Pointer::F32(p.add(at)),
                Pointer::Bf16(p) => Pointer::Bf16(p.add(at)),
            }
        }
    }

    /// `len` elements from `at`.
    ///
    /// # Safety
    /// Nothing else refers to any of them while the segment lives.
    unsafe fn segment(&self, at: usize, len: usize) -> Segment<'_> {
        assert!(at <= self.len && len <= self.len - at, "segment {at} + {len} of {}", self.len);
        // SAFETY: within the borrowed output as just asserted, and unshared, as the caller promises.
        unsafe {
            match self.data {
                Pointer::F32(p) => Segment::F32(std::slice::from_raw_parts_mut(p.add(at), len)),
                Pointer::Bf16(p) => Segment::Bf16(std::slice::from_raw_parts_mut(p.add(at), len)),
            }
        }
    }
}
