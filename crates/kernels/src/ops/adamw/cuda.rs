//! AdamW on a GPU: one launch over all segments.

use super::cpu::one_minus;
use super::{AdamW, in_order};
use crate::DType::{Bf16, F32};
use crate::cuda::{Cuda, Grid, Source, Value::Int, args, source};

static SOURCE: Source = source!("adamw.cu");
const THREADS: u32 = 256;
/// Elements of a block, counted from the arena's start: a vector for each thread.
const BLOCK: usize = 4 * THREADS as usize;

/// One update of every element in a segment.
pub(super) fn step(cuda: &Cuda, mut a: AdamW<'_>) {
    let segments = in_order(a.segments, a.master.len());
    let (mut table, mut blocks) = (Vec::with_capacity(6 * segments.len()), 0);
    for s in &segments {
        let (start, end) = (s.range.start, s.range.end);
        let words = [start as u32, (start as u64 >> 32) as u32, end as u32, (end as u64 >> 32) as u32];
        table.extend([blocks as u32, u32::from(s.decay)].iter().chain(&words));
        blocks += (end - 1) / BLOCK - start / BLOCK + 1;
    }
    if blocks == 0 {
        return;
    }
    assert!(i32::try_from(blocks).is_ok(), "adamw: an arena of {} is too large for one launch", a.master.len());
    let state = [a.master.typed_ptr(F32), a.grad.typed_ptr(F32), a.m.typed_ptr(F32), a.v.typed_ptr(F32)];
    let compute = a.compute.map_or(0, |mut c| c.typed_ptr(Bf16));
    let wide = state.iter().chain([&compute]).all(|ptr| ptr.is_multiple_of(16));
    let kernel = cuda.kernel(&SOURCE, "adamw_step", &[("WIDE", Int(i64::from(wide)))]);
    let args = args![
        state[0],
        state[1],
        state[2],
        state[3],
        compute,
        cuda.constant(&table),
        segments.len() as i32,
        a.norm.typed_ptr(F32),
        a.schedule.typed_ptr(F32),
        a.clip,
        one_minus(a.beta1),
        a.beta2,
        one_minus(a.beta2),
        a.eps,
    ];
    cuda.launch(&kernel, Grid::new([blocks as u32, 1, 1], THREADS), &args);
}
