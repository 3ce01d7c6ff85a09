//! Launches the backward of Hopper. Which head dims it takes is fixed (V3's); the kernel's file says how it works.

use super::{Backward, Inputs, Shape};
use crate::cuda::{Cuda, Grid, PRELUDE, SM90, Source, Swizzle, args};
use crate::{Buf, DType};

static SOURCE: Source = Source {
    name: "sm90_backward.cu",
    heads: &[PRELUDE, SM90, include_str!("sm90_backward.cuh")],
    text: include_str!("sm90_backward.cu"),
};

// As in the kernel.
const NOPE: usize = 128;
const ROPE: usize = 64;
const V: usize = 128;
const QK: usize = NOPE + ROPE;
const QUERIES: usize = 64;
const KEYS: usize = 128;
const STAT_HEADS: usize = 4;
/// The kernel's tiles, barriers and works, and what it may lose to alignment.
const SHARED: usize = 230_720 + 2 * 52 + 1024;
/// Heads whose works take turns in the order of tickets: more of them let the last blocks of a launch end at about the
/// same time, fewer find more of their data in the second-level cache.
const GROUP: usize = 1;

/// Whether the Hopper backward takes this: wgmma there, bf16, V3's head dims, pointers and strides that TMA takes, at
/// least one query and one key.
pub(super) fn supports(cuda: &Cuda, shape: &Shape, x: &Inputs<'_>, b: &Backward<'_>) -> bool {
    let aligned = |ptr: u64| ptr.is_multiple_of(16);
    cuda.has_wgmma()
        && x.q.dtype() == DType::Bf16
        && (shape.nope, shape.rope, shape.v) == (NOPE, ROPE, V)
        && !x.q.is_empty()
        && !x.kv_up.is_empty()
        && shape.k_pe_stride.is_multiple_of(8)
        && b.dk_pe_stride.is_multiple_of(2)
        && [x.q.ptr(), x.kv_up.ptr(), x.k_pe.ptr(), b.out.ptr(), b.dout.ptr()].into_iter().all(aligned)
        && [&b.dq, &b.dkv_up].into_iter().all(|v| aligned(v.as_view().ptr()))
        && b.dk_pe.as_view().ptr().is_multiple_of(4)
}

/// Only where `supports` says so.
pub(super) fn backward(cuda: &Cuda, shape: &Shape, x: &Inputs<'_>, mut b: Backward<'_>) {
    let heads = shape.heads;
    let (nq, nk) = (x.q.len() / (heads * QK), x.kv_up.len() / (heads * (NOPE + V)));
    let sequences = x.cu_q.len() - 1;
    // Sequences begin tiles of their own: at most one is lost to each.
    let (query_tiles, key_tiles) = (nq / QUERIES + sequences, nk / KEYS + sequences);
    let group = heads.min(GROUP);
    // Sums of dQ are kept for as many heads as may be worked on at once, and for those that would wait for these.
    let slots = heads.min((4 * cuda.sms() as usize).div_ceil(key_tiles) + 2 * group);

    let stats = cuda.uninit(DType::F32, heads * query_tiles * 2 * QUERIES);
    let sums = cuda.uninit(DType::F32, query_tiles * slots * QUERIES * QK);
    let pe_sums = cuda.uninit(DType::F32, key_tiles * KEYS * ROPE);
    let counters = cuda.uninit(DType::I32, 1 + query_tiles * slots + key_tiles);
    let [stats, sums, pe_sums, counters] = [&stats, &sums, &pe_sums, &counters].map(Buf::view);

    let prepare = cuda.kernel(&SOURCE, "mla_backward_stats", &[]);
    let grid = Grid::new([query_tiles as u32, heads.div_ceil(STAT_HEADS) as u32, 1], 256);
    cuda.launch(
        &prepare,
        grid,
        &args![
            b.out.ptr(),
            b.dout.ptr(),
            b.lse.ptr(),
            b.dq.ptr(),
            stats.ptr(),
            counters.ptr(),
            counters.len() as i32,
            x.cu_q.ptr(),
            sequences as i32,
            heads as i32,
        ],
    );

    let map = |ptr: u64, row: usize, rows: usize, stride: usize, tile: [u32; 2], swizzle| {
        cuda.tensor_map(ptr, DType::Bf16, &[row as u64, rows as u64], &[2 * stride as u64], &tile, swizzle)
    };
    let rows = |ptr: u64, row: usize, n: usize, tile: [u32; 2], swizzle| map(ptr, row, n, row, tile, swizzle);
    let q = rows(x.q.ptr(), heads * QK, nq, [64, QUERIES as u32], Swizzle::B128);
    let dout = rows(b.dout.ptr(), heads * V, nq, [64, QUERIES as u32], Swizzle::B128);
    let k = rows(x.kv_up.ptr(), heads * (NOPE + V), nk, [32, KEYS as u32], Swizzle::B64);
    let v = rows(x.kv_up.ptr(), heads * (NOPE + V), nk, [64, KEYS as u32], Swizzle::B128);
    let k_pe = map(x.k_pe.ptr(), ROPE, nk, shape.k_pe_stride, [32, KEYS as u32], Swizzle::B64);
    let kernel = cuda.kernel(&SOURCE, "mla_backward", &[]);
    // One block fits a multiprocessor, and takes work until there is none.
    let blocks = (key_tiles * heads).min(cuda.sms() as usize);
    let grid = Grid::new([blocks as u32, 1, 1], 384).shared(SHARED as u32);
    cuda.launch(
        &kernel,
        grid,
        &args![
            q,
            dout,
            k,
            v,
            k_pe,
            stats.ptr(),
            sums.ptr(),
            pe_sums.ptr(),
            counters.ptr(),
            b.dq.ptr(),
            b.dkv_up.ptr(),
            b.dk_pe.ptr(),
            x.cu_q.ptr(),
            x.cu_k.ptr(),
            b.dk_pe_stride as i64,
            sequences as i32,
            heads as i32,
            group as i32,
            slots as i32,
            query_tiles as i32,
            key_tiles as i32,
            shape.scale,
        ],
    );
}
