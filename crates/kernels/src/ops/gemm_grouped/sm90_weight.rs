//! Launching `sm90_weight.cu`: the experts' weight gradients on Hopper's matrix units. What an expert has is read on the
//! device; the host knows capacities only.

use super::sm90::{MAX_EXPERTS, capacity, fits, rows};
use crate::cuda::{Cuda, Grid, Source, Value::Int, args, source};
use crate::{DType, View, ViewMut};

static SOURCE: Source = source!(sm90, "sm90_weight.cu");

/// The kernel's steps of 64 rows that a chunk of an expert's rows has at least.
const MIN_CHUNK: usize = 16;
/// Shared memory that a block may have.
const SHARED: usize = 227 << 10;
/// Bytes of a box of 64 x 64 in BF16, or of a piece of dW.
const BOX: usize = 8192;

/// Shape of a warpgroup's tile; the rest as in `sm90_weight.cu`.
#[derive(Clone, Copy)]
struct Tile {
    bm: usize,
    bn: usize,
    buffers: usize,
    band: usize,
    split: usize,
    evict: bool,
    /// Blocks that share the loads of x.
    cluster: usize,
}

const LARGE: Tile = Tile { bm: 128, bn: 192, buffers: 2, band: 4, split: 2, evict: true, cluster: 2 };
const SMALL: Tile = Tile { bm: 128, bn: 128, buffers: 2, band: 8, split: 1, evict: false, cluster: 1 };

impl Tile {
    /// The large one loads less for each product. The small one leaves less idle at the end, where there are few tiles.
    /// The choice is the same for adding and for overwriting, as experts may be cut otherwise with the other.
    fn of(experts: usize, r: usize, cols: usize, sms: usize) -> Self {
        if experts * LARGE.shares(r, cols) < 8 * (sms / LARGE.cluster) { SMALL } else { LARGE }
    }

    /// Stages of the ring, and the shared memory with everything beside it.
    fn ring(&self, experts: usize) -> (usize, u32) {
        let numbers = 16 * 12 + 8;
        let beside = 2 * self.buffers * BOX + numbers + (3 * experts + 2) * 4;
        let stage = (self.bm + self.bn) / 64 * BOX + 16;
        let stages = (SHARED - beside) / stage;
        (stages, (stages * stage + beside) as u32)
    }

    /// What a cluster takes at once, a tile for each block, is so many times in a matrix.
    fn shares(&self, r: usize, cols: usize) -> usize {
        r.div_ceil(self.bm * self.cluster) * cols.div_ceil(self.bn)
    }
}

/// Whether [`backward_weight`] takes these.
pub fn supports(cuda: &Cuda, x: View<'_>, dy: View<'_>, r: usize, cols: usize, dw: &ViewMut<'_>) -> bool {
    let both = r.is_multiple_of(8) && cols.is_multiple_of(8) && r > 0 && cols > 0;
    both && dw.dtype() == DType::F32 && capacity(x, cols, dy, r) > 0 && {
        let experts = dw.len() / (r * cols);
        fits(cuda, experts, &rows(dy, 1, r), &rows(x, 1, cols), &rows(dw.as_view(), r, cols))
    }
}

/// `dW_e[out, in]` (+)= `dy[rows of e]`^T `x[rows of e]`; without rows an expert's is unchanged, or zero if it is
/// overwritten.
pub fn backward_weight(
    cuda: &Cuda,
    x: View<'_>,
    dy: View<'_>,
    offsets: View<'_>,
    (r, cols): (usize, usize),
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let tile = Tile::of(offsets.len() - 1, r, cols, cuda.sms() as usize);
    run_by(&tile, cuda, [x, dy, offsets], (r, cols), dw, accumulate);
}

fn run_by(
    tile: &Tile,
    cuda: &Cuda,
    [x, dy, offsets]: [View<'_>; 3],
    (r, cols): (usize, usize),
    dw: ViewMut<'_>,
    accumulate: bool,
) {
    let (cap, experts) = (capacity(x, cols, dy, r), offsets.len() - 1);
    if experts == 0 {
        return;
    }
    assert!(experts <= MAX_EXPERTS, "{experts} experts");
    let clusters = cuda.sms() as usize / tile.cluster;
    // Chunks but an expert's last leave their sums in memory. A chunk has more than its part of a cluster's share of all
    // steps, and no fewer than MIN_CHUNK.
    let parts = clusters * tile.split + 1;
    let kept = parts.min(tile.shares(r, cols) * (cap / (64 * MIN_CHUNK))).max(1);
    let sums = cuda.empty(DType::F32, kept * tile.cluster * tile.bm * tile.bn);
    let (stages, shared) = tile.ring(experts);
    let defines = [
        ("ADD", Int(accumulate.into())),
        ("BM", Int(tile.bm as i64)),
        ("BN", Int(tile.bn as i64)),
        ("STAGES", Int(stages as i64)),
        ("CLUSTER", Int(tile.cluster as i64)),
        ("BAND", Int(tile.band as i64)),
        ("SPLIT", Int(tile.split as i64)),
        ("MIN_CHUNK", Int(MIN_CHUNK as i64)),
        ("PARTS", Int(parts as i64)),
        ("BUFFERS", Int(tile.buffers as i64)),
        ("EVICT", Int(tile.evict.into())),
    ];
    let kernel = cuda.kernel(&SOURCE, "sm90_weight", &defines);
    let (a, b, c) = (rows(dy, cap, r), rows(x, cap, cols), rows(dw.as_view(), r, cols));
    let (map_a, map_b, map_c) = (a.window(cuda, 64), b.window(cuda, 64), c.stack(cuda, experts, 64));
    // With offsets on the device the number of items is not known here; idle blocks leave at once.
    let blocks = (clusters * tile.cluster) as u32;
    let grid = Grid::new([blocks, 1, 1], 384).shared(shared).cluster(tile.cluster as u32).early();
    cuda.launch(
        &kernel,
        grid,
        &args![
            map_a,
            map_b,
            map_c,
            offsets.ptr(),
            sums.view().ptr(),
            cuda.counters(2 + parts * tile.cluster),
            experts as i32,
            r as i32,
            cols as i32,
            cap as i32
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::testing::{assert_close, assert_same_bits, buf, buf_on, gpu, normals, op_tolerance, skipped};
    use crate::{Buf, bf16};

    fn wide(b: &Buf) -> Vec<f64> {
        b.view().to_f32().into_iter().map(f64::from).collect()
    }

    /// Experts with none, one, more than a chunk's rows and with most of them; columns that no tile divides.
    #[test]
    fn adds_and_overwrites_with_the_same_bits_every_time() {
        let Some(ctx) = gpu() else { return };
        let Some(cuda) = ctx.device.as_cuda().filter(|c| c.has_wgmma()) else { return skipped("no wgmma") };
        let (offsets, out, cols) = ([0, 5, 2605, 2605, 2606, 2734, 3504], 264, 392);
        let (n, experts) = (3504, offsets.len() - 1);
        let host = |stream, len| buf(DType::Bf16, &normals(stream, len, 1.0));
        let (x, dy) = (host(1, n * cols), host(2, n * out));
        let w = vec![0.0; experts * out * cols];
        let (_, expected) = reference::backward(&wide(&x), &wide(&dy), &offsets, &w, out, cols);
        let upload = |b: &Buf| buf_on(&ctx, DType::Bf16, &b.view().to_f32());
        let (x, dy, at) = (upload(&x), upload(&dy), ctx.from_i32(&offsets));
        for tile in [SMALL, LARGE] {
            let mut bits: Option<Buf> = None;
            for (accumulate, start, plus) in [(false, f32::from(bf16::NAN), 0.0), (true, 0.0, 0.0), (true, 5.0, 5.0)] {
                let run = || {
                    let mut dw = buf_on(&ctx, DType::F32, &vec![start; w.len()]);
                    run_by(&tile, cuda, [x.view(), dy.view(), at.view()], (out, cols), dw.view_mut(), accumulate);
                    dw
                };
                let first = run();
                let expected: Vec<f64> = expected.iter().map(|w| w + plus).collect();
                assert_close("dw", &first, &expected, op_tolerance(DType::F32));
                for _ in 0..3 {
                    assert_same_bits("dw again", &first, &run());
                }
                // Both forms cut the rows alike.
                if plus == 0.0 {
                    match &bits {
                        None => bits = Some(first),
                        Some(bits) => assert_same_bits("dw added to zero", bits, &first),
                    }
                }
            }
        }
    }

    /// Most experts without rows: items that only write zeros follow one another in no time.
    #[test]
    fn experts_without_rows_follow_one_another() {
        let Some(ctx) = gpu() else { return };
        let Some(cuda) = ctx.device.as_cuda().filter(|c| c.has_wgmma()) else { return skipped("no wgmma") };
        let (experts, out, cols, n) = (64, 512, 384, 1000);
        let offsets: Vec<i32> = (0..=experts).map(|e| if e < 20 { 0 } else { (250 * (e - 19)).min(n) }).collect();
        let some = |stream, len| buf_on(&ctx, DType::Bf16, &normals(stream, len, 1.0));
        let (x, dy) = (some(1, n as usize * cols), some(2, n as usize * out));
        let at = ctx.from_i32(&offsets);
        for tile in [SMALL, LARGE] {
            for (accumulate, start, left) in [(false, f32::NAN, 0.0), (true, 3.0, 3.0)] {
                let run = || {
                    let mut dw = ctx.empty(DType::F32, experts as usize * out * cols);
                    cuda.fill_words(dw.view_mut(), start.to_bits());
                    run_by(&tile, cuda, [x.view(), dy.view(), at.view()], (out, cols), dw.view_mut(), accumulate);
                    dw
                };
                let first = run();
                for (e, dw) in first.view().to_f32().chunks_exact(out * cols).enumerate() {
                    let empty = offsets[e] == offsets[e + 1];
                    let right = |&x: &f32| if empty { x == left } else { x.is_finite() };
                    assert!(dw.iter().all(right), "expert {e}");
                }
                // Without a wait in between.
                let others: Vec<Buf> = (0..12).map(|_| run()).collect();
                for other in &others {
                    assert_same_bits("dw again", &first, other);
                }
            }
        }
    }
}
