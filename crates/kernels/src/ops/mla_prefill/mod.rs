//! Attention of MLA in its multi-head form, for training and prefill: tiled (no T x T buffer), varlen, causal,
//! unequal head dims. Query head = `[P nope | R rope]`, key head = `[P from kv_up | R shared k_pe]`, value head = W.
//! score = (q . k) * scale in f32, softmax in f32; all is summed in f32, outputs are rounded once. With inputs of bf16,
//! levels that multiply bf16, and GPUs, round the probabilities, and in backward the gradients of the scores, before the
//! products with values, keys and queries, as FlashAttention does.
//! How keys are split into tiles depends on that sequence's length alone: one sequence alone equals the same among
//! others, to the bit, if values are finite. A weight of zero may or may not meet an infinite one that a query does not see.
//! On the host's cores what is not finite in a query, or in a key that it sees, reaches its output and nothing of another
//! sequence.

mod any;
mod backward;
mod backward_tiles;
mod cpu;
mod cuda;
mod panels;
mod queries;
#[cfg(test)]
pub(super) mod reference;
pub(super) mod scratch;
mod sm90_backward;
mod sm90_forward;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub(super) mod weigh;

#[cfg(target_arch = "x86_64")]
use crate::bf16;
use crate::sizes::sizes;
use crate::{Ctx, DType, Device, Elem, Level, View, ViewMut, Workers, ops::by_dtype};
pub(super) use queries::Seen;

/// Sizes shared by forward and backward.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// H.
    pub heads: usize,
    /// P, qk_nope_head_dim.
    pub nope: usize,
    /// R, qk_rope_head_dim.
    pub rope: usize,
    /// W, v_head_dim.
    pub v: usize,
    /// Elements from one token's k_pe to the next (>= R): k_pe may be the tail of kv_a's rows.
    pub k_pe_stride: usize,
    /// Softmax scale (YaRN's m^2 included), above 0: maxima are taken before it is applied.
    pub scale: f32,
}

/// Inputs of both directions. Sequence s has queries `cu_q[s]`..`cu_q[s+1]` and keys `cu_k[s]`..`cu_k[s+1]`; causal,
/// aligned at the end: query i of q_len sees keys 0 ..= k_len - q_len + i.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[Nq, H, P + R]`, rotated.
    pub q: View<'a>,
    /// `[Nk, H, P + W]`: per head k_nope then v (kv_b_proj's output).
    pub kv_up: View<'a>,
    /// `[Nk, R]` with rows `k_pe_stride` apart, rotated.
    pub k_pe: View<'a>,
    /// i32 `[S + 1]`.
    pub cu_q: View<'a>,
    /// i32 `[S + 1]`.
    pub cu_k: View<'a>,
}

/// out `[Nq, H, W]` and lse f32 `[Nq, H]` (natural log of the sum of exp of the scaled scores). A query that sees no
/// key gets zeros and -inf.
pub fn forward(ctx: &Ctx, shape: Shape, x: Inputs<'_>, out: ViewMut<'_>, lse: ViewMut<'_>) {
    let _timer = ctx.timer(
        "mla_prefill forward",
        sizes![shape.heads, shape.nope, shape.rope, shape.v, shape.k_pe_stride, x.q, x.kv_up, x.cu_q],
    );
    let (nq, _) = check(&shape, &x);
    let (h, w) = (shape.heads, shape.v);
    assert_eq!(out.len(), nq * h * w, "out of {nq} queries x {h} heads x {w}");
    assert_eq!(lse.len(), nq * h, "lse of {nq} queries x {h} heads");
    match &ctx.device {
        Device::Cuda(cuda) => cuda::forward(cuda, shape, &x, out, lse),
        #[cfg(target_arch = "x86_64")]
        Device::Cpu(cpu) if tiles::takes(cpu, x.q.dtype()) => {
            tiles::forward(cpu, &Problem::new(shape, &x), bf16::of_mut(out), lse.f32());
        }
        Device::Cpu(cpu) => {
            by_dtype!(x.q.dtype(), T => cpu::forward::<T>(cpu, &Problem::new(shape, &x), T::of_mut(out), lse.f32()))
        }
    }
}

/// What backward reads beside the inputs, and what it writes.
#[derive(Debug)]
pub struct Backward<'a> {
    /// `[Nq, H, W]`, the forward's.
    pub out: View<'a>,
    /// f32 `[Nq, H]`, the forward's.
    pub lse: View<'a>,
    /// `[Nq, H, W]`.
    pub dout: View<'a>,
    /// `[Nq, H, P + R]`, overwritten.
    pub dq: ViewMut<'a>,
    /// `[Nk, H, P + W]`, overwritten.
    pub dkv_up: ViewMut<'a>,
    /// `[Nk, R]` with rows `dk_pe_stride` apart, overwritten: heads are summed in order.
    pub dk_pe: ViewMut<'a>,
    /// Elements from one row of dk_pe to the next (>= R).
    pub dk_pe_stride: usize,
}

/// Gradients of q, kv_up and k_pe; deterministic.
pub fn backward(ctx: &Ctx, shape: Shape, x: Inputs<'_>, b: Backward<'_>) {
    let _timer = ctx.timer(
        "mla_prefill backward",
        sizes![shape.heads, shape.nope, shape.rope, shape.v, shape.k_pe_stride, x.q, x.kv_up, x.cu_q],
    );
    let (nq, nk) = check(&shape, &x);
    let Shape { heads: h, nope: p, rope: r, v: w, .. } = shape;
    assert_eq!(b.out.len(), nq * h * w, "out of {nq} queries x {h} heads x {w}");
    assert_eq!(b.dout.len(), nq * h * w, "dout of {nq} queries x {h} heads x {w}");
    assert_eq!(b.lse.len(), nq * h, "lse of {nq} queries x {h} heads");
    assert_eq!(b.dq.len(), nq * h * (p + r), "dq of {nq} queries x {h} heads x {p} + {r}");
    assert_eq!(b.dkv_up.len(), nk * h * (p + w), "dkv_up of {nk} keys x {h} heads x {p} + {w}");
    check_rows("dk_pe", b.dk_pe.len(), nk, r, b.dk_pe_stride);
    match &ctx.device {
        Device::Cuda(cuda) => cuda::backward(cuda, shape, &x, b),
        #[cfg(target_arch = "x86_64")]
        Device::Cpu(cpu) if tiles::takes(cpu, x.q.dtype()) => {
            tiles::backward(cpu, &Problem::new(shape, &x), b);
        }
        Device::Cpu(cpu) => {
            by_dtype!(x.q.dtype(), T => backward::backward::<T>(cpu, &Problem::new(shape, &x), b))
        }
    }
}

/// Bytes that the host's cores take, each for itself, for both directions over `sequences` of `tokens` each: what grows
/// with the sequence, which backward takes.
pub fn scratch(workers: Workers, dtype: DType, shape: &Shape, sequences: usize, tokens: usize) -> usize {
    let tasks = workers.threads.min(sequences * shape.heads);
    let on_tiles = workers.level == Level::Amx && dtype == DType::Bf16;
    tasks
        * if on_tiles {
            tiles_of_keys(shape, tokens) * TILE_BYTES
        } else {
            backward_tiles::bytes_of_keys(shape, tokens)
        }
}

/// Bytes of a tile.
const TILE_BYTES: usize = 1024;

/// Tiles that backward on AMX keeps of a sequence's keys.
fn tiles_of_keys(s: &Shape, keys: usize) -> usize {
    keys.div_ceil(32) * (8 * (s.nope + s.rope).div_ceil(32) + 6 * s.v.div_ceil(32))
}

/// The inputs of one call.
struct Problem<'a> {
    shape: Shape,
    q: View<'a>,
    kv_up: View<'a>,
    k_pe: View<'a>,
    cu_q: &'a [i32],
    cu_k: &'a [i32],
}

impl<'a> Problem<'a> {
    fn new(shape: Shape, x: &Inputs<'a>) -> Self {
        Self { shape, q: x.q, kv_up: x.kv_up, k_pe: x.k_pe, cu_q: x.cu_q.i32(), cu_k: x.cu_k.i32() }
    }
}

/// Asserts what both directions need of their inputs; returns Nq and Nk.
fn check(shape: &Shape, x: &Inputs<'_>) -> (usize, usize) {
    let Shape { heads: h, nope: p, rope: r, v: w, scale, .. } = *shape;
    assert!(h > 0 && p + r > 0 && w > 0, "attention of {h} heads of {p} + {r} and {w}");
    assert!(scale > 0.0, "attention with a scale of {scale}");
    assert_eq!(x.cu_q.len(), x.cu_k.len(), "cumulative lengths of queries and keys");
    let (nq, nk) = if x.cu_q.is_host() {
        (total(x.cu_q.i32()), total(x.cu_k.i32()))
    } else {
        // The last cumulative lengths are on the device.
        assert!(!x.cu_q.is_empty(), "cumulative lengths start at 0");
        (x.q.len() / (h * (p + r)), x.kv_up.len() / (h * (p + w)))
    };
    assert_eq!(x.q.len(), nq * h * (p + r), "q of {nq} queries x {h} heads x {p} + {r}");
    assert_eq!(x.kv_up.len(), nk * h * (p + w), "kv_up of {nk} keys x {h} heads x {p} + {w}");
    check_rows("k_pe", x.k_pe.len(), nk, r, shape.k_pe_stride);
    (nq, nk)
}

/// The last of cumulative lengths in host memory.
fn total(cu: &[i32]) -> usize {
    assert!(cu.first() == Some(&0) && cu.is_sorted(), "cumulative lengths start at 0 and do not fall: {cu:?}");
    cu[cu.len() - 1] as usize
}

/// Asserts that `len` elements hold `n` rows of `width` that lie `stride` apart.
fn check_rows(name: &str, len: usize, n: usize, width: usize, stride: usize) {
    assert!(stride >= width, "{name}: rows of {width}, {stride} apart");
    assert!(
        n == 0 || len >= (n - 1) * stride + width,
        "{name}: {len} elements for {n} rows of {width}, {stride} apart"
    );
}
