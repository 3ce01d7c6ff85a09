//! Launches of the rotation: how many tokens share a block, and how wide it reads.

use super::Rope;
use crate::DType;
use crate::cuda::{Cuda, Grid, Source, Value::Int, Value::Type, args, source};
use crate::ops::launch::{aligned, blocks, float, int, ptr};

static SOURCE: Source = source!("rope.cu");

/// Threads of a block: the kernel's THREADS.
const THREADS: usize = 256;
/// Parts that a thread has in flight.
const STEP: usize = 4;
/// Most tokens of a block, and most angles, which lie in its shared memory.
const TOKENS: usize = 32;
const ANGLES: usize = 4096;

/// See [`super::apply`].
pub fn apply(cuda: &Cuda, mut a: Rope<'_>) {
    let (n, half, dtype) = (a.positions.len(), a.inv_freq.len(), float(a.x.dtype()));
    if n == 0 || a.heads == 0 || half == 0 {
        return;
    }
    assert!(half <= ANGLES, "{half} pairs in a head, at most {ANGLES}");
    let x = a.x.ptr() + (a.offset * dtype.size()) as u64;
    let pack = 16 / dtype.size();
    // Pairs of 16 bytes, or of two times 16 bytes where the halves of a head are apart.
    let pairs = if a.interleaved { pack / 2 } else { pack };
    let wide = aligned(16, &[x])
        && a.token_stride.is_multiple_of(pack)
        && (a.heads == 1 || a.head_stride.is_multiple_of(pack))
        && half.is_multiple_of(pairs);
    let parts = a.heads * (if wide { half / pairs } else { half });
    let tokens = (THREADS * STEP / parts).clamp(1, TOKENS).min(ANGLES / half);
    let defines = [
        ("ELEM", Type(dtype)),
        ("WIDE", Int(wide.into())),
        ("INTERLEAVED", Int(a.interleaved.into())),
        ("STEP", Int(STEP as i64)),
    ];
    let kernel = cuda.kernel(&SOURCE, "rope", &defines);
    let turns = tokens * half * 2 * size_of::<f32>();
    let grid = Grid::new([blocks(n, tokens), 1, 1], THREADS as u32).shared(turns as u32);
    let (positions, inv_freq) = (ptr(a.positions, DType::I32), ptr(a.inv_freq, DType::F32));
    let sign = if a.inverse { -1.0f32 } else { 1.0 };
    let (token_stride, heads) = (a.token_stride as i64, int(a.heads) as u32);
    let head_stride = if a.heads == 1 { 0 } else { int(a.head_stride) as u32 };
    cuda.launch(
        &kernel,
        grid,
        &args![
            x,
            token_stride,
            heads,
            head_stride,
            positions,
            inv_freq,
            half as u32,
            a.factor,
            sign,
            int(n),
            tokens as u32
        ],
    );
}
