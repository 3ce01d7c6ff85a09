//! Launch of the Hopper forward, `sm90_forward.cu`: bf16, widths that are multiples of 16.
//! Two kernels: the first lists the tiles of queries, longest first, since only the device knows the sequences' lengths;
//! the second takes tile after tile from that list.

use super::{Inputs, Shape};
use crate::cuda::{Cuda, Grid, Source, Swizzle, TensorMap, Value::Int, args, source};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!(sm90, "sm90_forward.cu");

/// Warpgroups that compute, of 64 queries each.
const WARPGROUPS: usize = 2;
/// Keys of a block.
const KEYS: usize = 128;
/// Blocks of keys, and of values, in flight.
const STAGES: usize = 2;
/// Bytes of shared memory beside the tiles: barriers, the item at hand, and what aligning the tiles may take.
const REST: usize = 1536;
/// Shared memory that a block of threads may have.
const SHARED: usize = 227 << 10;
/// Keys and values of the heads that are worked on together, in bytes: they should stay in the L2 cache. Less of it for
/// short sequences, whose queries and outputs pass through it the faster; per key of the mean length, at least and at most.
const CACHED: (usize, usize, usize) = (20 << 10, 8 << 20, 32 << 20);
/// Threads of the kernel that plans, its BUCKETS.
const PLAN_THREADS: u32 = 1024;
/// Numbers of the plan before its entries, and of each entry.
const PLAN_NUMBERS: usize = 8;

/// Elements of a swizzled line of a matrix `width` wide.
fn line(width: usize) -> (usize, Swizzle) {
    match width {
        w if w.is_multiple_of(64) => (64, Swizzle::B128),
        w if w.is_multiple_of(32) => (32, Swizzle::B64),
        _ => (16, Swizzle::B32),
    }
}

fn shared(s: &Shape) -> usize {
    let queries = 64 * WARPGROUPS * (s.nope + s.rope);
    DType::Bf16.size() * (queries + STAGES * KEYS * (s.nope + s.rope + s.v)) + REST
}

/// Whether [`forward`] takes this.
pub(super) fn supports(cuda: &Cuda, shape: &Shape, x: &Inputs<'_>, out: &ViewMut<'_>) -> bool {
    let s = shape;
    let widths = s.nope > 0 && s.rope > 0 && s.nope.is_multiple_of(16) && s.rope.is_multiple_of(16);
    cuda.has_wgmma()
        && x.q.dtype() == DType::Bf16
        && widths
        && [32, 64, 96, 128].contains(&s.v)
        && shared(s) <= SHARED
        && s.k_pe_stride.is_multiple_of(8)
        && !x.q.is_empty()
        && !x.kv_up.is_empty()
        && [x.q.ptr(), x.kv_up.ptr(), x.k_pe.ptr(), out.as_view().ptr()].iter().all(|p| p.is_multiple_of(16))
}

/// A matrix of one part of every head, as boxes of `rows` rows: `rows_all` rows that lie `row` elements apart, heads that
/// lie `head` elements apart, `width` elements from `at` on.
struct Part<'a> {
    of: View<'a>,
    at: usize,
    width: usize,
    rows_all: usize,
    row: usize,
    heads: usize,
    head: usize,
    rows: usize,
}

impl Part<'_> {
    /// Dimensions: within a line, row, line, head. So a box is one line's worth of all its rows, then the next.
    fn map(&self, cuda: &Cuda) -> TensorMap {
        let (line, swizzle) = line(self.width);
        let size = DType::Bf16.size();
        let dims = [line, self.rows_all, self.width / line, self.heads].map(|x| x as u64);
        let strides = [self.row, line, self.head].map(|x| (x * size) as u64);
        let tile = [line, self.rows, self.width / line, 1].map(|x| x as u32);
        let at = self.of.ptr() + (self.at * size) as u64;
        cuda.tensor_map(at, DType::Bf16, &dims, &strides, &tile, swizzle)
    }
}

/// See [`super::forward`]; only what [`supports`] agreed to.
pub(super) fn forward(cuda: &Cuda, shape: Shape, x: &Inputs<'_>, mut out: ViewMut<'_>, mut lse: ViewMut<'_>) {
    let Shape { heads, nope, rope, v, k_pe_stride, scale } = shape;
    let (key, up) = (nope + rope, nope + v);
    let (nq, nk, sequences) = (x.q.len() / (heads * key), x.kv_up.len() / (heads * up), x.cu_q.len() - 1);
    if sequences == 0 {
        return;
    }
    let queries = |at, width| {
        let part = Part { of: x.q, at, width, rows_all: nq, row: heads * key, heads, head: key, rows: 64 };
        part.map(cuda)
    };
    let keys = |at, width| {
        let part = Part { of: x.kv_up, at, width, rows_all: nk, row: heads * up, heads, head: up, rows: KEYS };
        part.map(cuda)
    };
    // All heads share k_pe, so it is one head's.
    let k_pe = Part { of: x.k_pe, at: 0, width: rope, rows_all: nk, row: k_pe_stride, heads: 1, head: 8, rows: KEYS };

    let int = |n: usize| Int(n as i64);
    let defines = [
        ("NOPE", int(nope)),
        ("ROPE", int(rope)),
        ("VDIM", int(v)),
        ("WGS", int(WARPGROUPS)),
        ("BN", int(KEYS)),
        ("STAGES", int(STAGES)),
    ];
    // A sequence has at most one tile more than its share of full ones.
    let slots = nq / (64 * WARPGROUPS) + sequences;
    let mut plan = cuda.uninit(DType::I32, PLAN_NUMBERS * (1 + slots));
    let mut plan = plan.view_mut();
    let planner = cuda.kernel(&SOURCE, "mla_prefill_plan", &defines);
    cuda.launch(
        &planner,
        Grid::new([1, 1, 1], PLAN_THREADS),
        &args![x.cu_q.ptr(), x.cu_k.ptr(), sequences as i32, slots as i32, plan.ptr()],
    );

    let (per_key, least, most) = CACHED;
    let together = (nk / sequences * per_key).clamp(least, most);
    let sections = (x.kv_up.len() * DType::Bf16.size()).div_ceil(together).min(heads);
    let blocks = (slots * heads).min(cuda.sms() as usize);
    let threads = 128 * (WARPGROUPS + 1);
    let kernel = cuda.kernel(&SOURCE, "mla_prefill_forward", &defines);
    cuda.launch(
        &kernel,
        Grid::new([blocks as u32, 1, 1], threads as u32).shared(shared(&shape) as u32),
        &args![
            queries(0, nope),
            queries(nope, rope),
            keys(0, nope),
            k_pe.map(cuda),
            keys(nope, v),
            plan.ptr(),
            heads as i32,
            sections as i32,
            scale,
            out.ptr(),
            lse.ptr()
        ],
    );
}
