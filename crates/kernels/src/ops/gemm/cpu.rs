//! The product on the host's cores: a list of products is cut into output tiles, the tiles are the tasks, and each
//! tile is summed in its thread's scratch by the `gemm` crate's microkernels, called single-threaded.
//!
//! Why a row's bits do not depend on the other rows: within one call, the microkernels keep one accumulator per output
//! element and add to it with one fused multiply-add per step of k, in order of k; tile and register blocking change
//! which elements are computed together, not how one is computed. That holds where the crate takes neither its paths
//! for vectors (one row or one column), nor the one for at most two steps of k, nor the one for small products of two
//! k-contiguous operands, nor cuts k itself (above 512). So k is cut here, by its length alone, into pieces of 3 to 256
//! (shorter products are padded with zeros), lanes are packed and padded to whole vectors, and there are at least two
//! rows. For the same reason the choice of tiles and of the operand that takes the lanes is free to follow the shape.
//!
//! Which vectors the microkernels use is the crate's own choice, whatever level the device carries (see `isa`).

use super::pack::{self, Operand, Part};
use crate::isa::{Isa, vectorised};
use crate::{AlignedVec, Cpu, Elem, View, ViewMut, bf16};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Range, RangeInclusive};

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

/// Longest piece of k.
const K_PIECE: usize = 256;
/// Shortest piece of k that the microkernels sum in their usual order.
const K_LEAST: usize = 3;
/// Lanes are padded to a multiple of the widest vector.
const VECTOR: usize = 16;
/// Largest and smallest tile. The smallest lanes fill the widest register block; rows are a multiple of the six rows
/// of a register block.
const LANES: Range<usize> = 64..256;
const ROWS: Range<usize> = 48..240;
/// Tasks to aim for: enough to balance 16 workers.
const TASKS: usize = 32;
/// Multiply-adds below which a task is not worth cutting further.
const LEAST_WORK: usize = 1 << 18;
/// With both operands k-contiguous, A takes the lanes when its rows about fill one vector, which saves transposing B.
/// With fewer rows most lanes would be idle; with more, the tile's rows share the cost of transposing.
const FILLS_A_VECTOR: RangeInclusive<usize> = 9..=VECTOR;

impl Product<'_> {
    fn work(&self) -> usize {
        self.m * self.n * self.k.max(1)
    }

    /// Whether the lanes run over n. They run over the index that is contiguous in memory if there is one.
    fn lanes_are_columns(&self) -> bool {
        !self.b.k_contiguous || (self.a.k_contiguous && !FILLS_A_VECTOR.contains(&self.m))
    }

    /// Rows and columns of a tile when a task should do about `work` multiply-adds.
    fn tile(&self, work: usize) -> (usize, usize) {
        let (mut l, mut r) = (LANES.end, ROWS.end);
        while l * r * self.k > work && (l > LANES.start || r > ROWS.start) {
            // Lanes first: packing them is the dearer part, and it is shared by the tile's rows.
            if l > LANES.start { l /= 2 } else { r = (r / 2).max(ROWS.start) }
        }
        if self.lanes_are_columns() {
            (even(self.m, r, 6), even(self.n, l, VECTOR))
        } else {
            (even(self.m, l, VECTOR), even(self.n, r, 6))
        }
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
        end = p.c + (p.m - 1) * p.ldc + p.n;
    }
    assert!(end <= out.len(), "outputs end at {end} of {}", out.len());
    let tasks = tasks(products, accumulate);
    let out = Output::new(out);
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
    lanes: AlignedVec<f32>,
    rows: AlignedVec<f32>,
    sums: AlignedVec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        lanes: AlignedVec::zeros(0),
        rows: AlignedVec::zeros(0),
        sums: AlignedVec::zeros(0),
    });
}

fn reserve(v: &mut AlignedVec<f32>, len: usize) {
    if v.len() < len {
        *v = AlignedVec::zeros(len);
    }
}

fn tile(isa: Isa, p: &Product<'_>, t: &Task, s: &mut Scratch, out: &Output<'_>, accumulate: bool) {
    let by_columns = p.lanes_are_columns();
    let (lane_op, lanes, row_op, rows) =
        if by_columns { (p.b, &t.cols, p.a, &t.rows) } else { (p.a, &t.rows, p.b, &t.cols) };
    let width = lanes.len().next_multiple_of(VECTOR);
    // A single row is computed twice, so that it takes the path of several.
    let count = rows.len().max(2);
    reserve(&mut s.sums, count * width);
    if p.k == 0 {
        s.sums[..count * width].fill(0.0);
    }
    let step = p.k.div_ceil(p.k.div_ceil(K_PIECE).max(1)).max(1);
    for k0 in (0..p.k).step_by(step) {
        let kc = step.min(p.k - k0);
        let depth = kc.max(K_LEAST);
        let part = Part { first: lanes.start, count: lanes.len(), k0, kc, depth };
        let panel = lanes_in_place(lane_op, part, width).unwrap_or_else(|| {
            reserve(&mut s.lanes, depth * width);
            pack::lanes(isa, lane_op, part, width, &mut s.lanes);
            Panel { data: &s.lanes, outer: 1, k: width }
        });
        let part = Part { first: rows.start, count: rows.len(), ..part };
        let rows = rows_in_place(row_op, part).unwrap_or_else(|| {
            reserve(&mut s.rows, depth * part.count);
            let (outer, k) = pack::rows(isa, row_op, part, &mut s.rows);
            Panel { data: &s.rows, outer, k }
        });
        multiply(panel, width, depth, rows, part.count, &mut s.sums, k0 > 0);
    }
    store(isa, t, &s.sums, width, by_columns, p, out, accumulate);
}

/// A part of an operand as the kernel reads it: element (o, k) at `o * outer + k * k`.
#[derive(Clone, Copy)]
struct Panel<'a> {
    data: &'a [f32],
    outer: usize,
    k: usize,
}

/// Lanes that can be read where they are: whole vectors of them.
fn lanes_in_place(op: Operand<'_>, p: Part, width: usize) -> Option<Panel<'_>> {
    match op.data {
        View::F32(x) if !op.k_contiguous && p.depth == p.kc && p.count == width => {
            Some(Panel { data: &x[p.k0 * op.ld + p.first..], outer: 1, k: op.ld })
        }
        _ => None,
    }
}

/// Rows that can be read where they are.
fn rows_in_place(op: Operand<'_>, p: Part) -> Option<Panel<'_>> {
    match op.data {
        View::F32(x) if op.k_contiguous && p.depth == p.kc => {
            Some(Panel { data: &x[p.first * op.ld + p.k0..], outer: op.ld, k: 1 })
        }
        _ => None,
    }
}

/// `sums[r, lane]` (+)= sum over k of `rows[r, k]` * `lanes[k, lane]`.
fn multiply(lanes: Panel<'_>, width: usize, depth: usize, rows: Panel<'_>, count: usize, sums: &mut [f32], add: bool) {
    let (calls, row) = if count == 1 { (2, 0) } else { (count, rows.outer) };
    assert!(depth >= K_LEAST && width.is_multiple_of(VECTOR) && lanes.outer == 1 && lanes.k >= width);
    assert!(lanes.data.len() >= (depth - 1) * lanes.k + width && sums.len() >= calls * width);
    assert!(rows.data.len() > (calls - 1) * row + (depth - 1) * rows.k);
    // SAFETY: the crate reads width lanes and the rows at the strides given and, when adding, the sums, and
    // writes calls * width sums; the asserts above bound all three, and the borrows keep the sums apart from the rest.
    unsafe {
        gemm::gemm(
            width,
            calls,
            depth,
            sums.as_mut_ptr(),
            width as isize,
            1,
            add,
            lanes.data.as_ptr(),
            lanes.k as isize,
            1,
            rows.data.as_ptr(),
            row as isize,
            rows.k as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

vectorised! {
    /// Moves a tile's finished sums to C.
    fn store(isa: Isa, t: &Task, sums: &[f32], width: usize, by_columns: bool, p: &Product<'_>, out: &Output<'_>, accumulate: bool) {
        for (r, i) in t.rows.clone().enumerate() {
            let at = p.c + i * p.ldc + t.cols.start;
            // SAFETY: products lie apart in the output (asserted by `run`), rows of one lie `ldc >= n` apart, and the tasks
            // partition its rows and columns: no other task touches these elements.
            let c = unsafe { out.segment(at, t.cols.len()) };
            let (first, step) = if by_columns { (r * width, 1) } else { (r, width) };
            let sums = &sums[first..];
            match c {
                Segment::F32(c) => finish(c, sums, step, accumulate),
                Segment::Bf16(c) => finish(c, sums, step, accumulate),
            }
        }
    }
}

#[inline(always)]
fn finish<T: Elem>(c: &mut [T], sums: &[f32], step: usize, accumulate: bool) {
    match (step, accumulate) {
        (1, false) => c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(*s)),
        (1, true) => c.iter_mut().zip(sums).for_each(|(c, s)| *c = T::round(c.f32() + s)),
        (_, false) => c.iter_mut().zip(sums.iter().step_by(step)).for_each(|(c, s)| *c = T::round(*s)),
        (_, true) => c.iter_mut().zip(sums.iter().step_by(step)).for_each(|(c, s)| *c = T::round(c.f32() + s)),
    }
}

/// The output, written by many tasks at once, each its own elements.
struct Output<'a> {
    data: Pointer,
    len: usize,
    life: PhantomData<&'a mut ()>,
}

enum Pointer {
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
            ViewMut::I32(_) => panic!("expected a float output, found I32"),
        };
        Self { data, len, life: PhantomData }
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
