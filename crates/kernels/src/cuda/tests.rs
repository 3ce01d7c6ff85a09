//! The device itself: memory, copies, launches, recordings. Each test needs a GPU.

use super::{Cuda, Grid, PRELUDE, SM90, Source, Value, args};
use crate::ops::{gemm, gemm_grouped, rmsnorm};
use crate::testing::{assert_same_bits, buf_on, gpu, normals, skipped};
use crate::{Buf, Ctx, DType, View, ViewMut, Weight};
use std::sync::Arc;

static SOURCE: Source = Source {
    name: "test.cu",
    heads: &[PRELUDE],
    text: "extern \"C\" __global__ void scale(T* x, int n, float by, const float* more) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) x[i] = narrow<T>(widen(x[i]) * by * more[0]);
    }",
};

fn scale(cuda: &Cuda, x: &mut Buf, by: f32, more: &Buf) {
    scale_at(cuda, x.dtype(), (x.view_mut().ptr(), x.len()), by, more);
}

/// Multiplies n elements at an address.
pub(super) fn scale_at(cuda: &Cuda, dtype: DType, (at, n): (u64, usize), by: f32, more: &Buf) {
    let kernel = cuda.kernel(&SOURCE, "scale", &[("T", Value::Type(dtype))]);
    let grid = Grid::new([n.div_ceil(128) as u32, 1, 1], 128);
    cuda.launch(&kernel, grid, &args![at, n as i32, by, more.view().ptr()]);
}

/// A kernel that may begin early: it lets the next one begin at once, and waits before it reads and writes.
static EARLY: Source = Source {
    name: "early.cu",
    heads: &[PRELUDE, SM90],
    text: "extern \"C\" __global__ void mix(const u32* x, u32* y, int n) {
        let_next_begin();
        wait_for_previous();
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
            y[i] = (y[i] ^ x[i]) * 2654435761u + i;
    }",
};

/// What [`EARLY`] does to an element.
fn mixed(x: u32, y: u32, i: usize) -> u32 {
    (y ^ x).wrapping_mul(2_654_435_761).wrapping_add(i as u32)
}

/// [`EARLY`] over all of `x` and `y`, in few blocks, so that the next launch's find room beside them.
fn mix(cuda: &Cuda, x: View<'_>, mut y: ViewMut<'_>) {
    let kernel = cuda.kernel(&EARLY, "mix", &[]);
    let n = x.len() as i32;
    cuda.launch(&kernel, Grid::new([64, 1, 1], 256).early(), &args![x.ptr(), y.ptr(), n]);
}

/// The kernels of these tests.
pub(super) fn kernels(ctx: &Ctx) {
    let Some(cuda) = ctx.device.as_cuda() else { return };
    let (mut x, one) = (ctx.zeros(DType::F32, 1), ctx.zeros(DType::F32, 1));
    scale(cuda, &mut x, 1.0, &one);
    if cuda.has_wgmma() {
        let (x, mut y) = (ctx.zeros(DType::I32, 1), ctx.zeros(DType::I32, 1));
        mix(cuda, x.view(), y.view_mut());
    }
}

/// The context and its GPU, if there is one.
#[track_caller]
pub(super) fn device() -> Option<(Ctx, Arc<Cuda>)> {
    let ctx = gpu()?;
    let cuda = ctx.device.as_cuda()?.clone();
    Some((ctx, cuda))
}

#[test]
fn what_goes_up_comes_down() {
    let Some((ctx, cuda)) = device() else { return };
    for n in [0usize, 1, 1000, 1 << 20] {
        let x = normals(1, n, 1.0);
        let mut on = ctx.from_f32(&x);
        assert_eq!(on.view().to_f32(), x);
        let one = ctx.filled(1, 2.0);
        scale(&cuda, &mut on, 0.5, &one);
        assert_eq!(on.to_host().view().f32(), x, "{n}");
        let copy = on.clone();
        scale(&cuda, &mut on, -1.0, &one);
        assert_eq!(copy.view().to_f32(), x);
        on.clear();
        assert!(on.view().to_f32().iter().all(|&x| x == 0.0));
    }
    let ids: Vec<i32> = (0..77).collect();
    let on = ctx.from_i32(&ids);
    assert_eq!(on.view().slice(7..70).to_i32(), &ids[7..70]);
    let later = ctx.download(on.view());
    assert_eq!(later.i32(), ids);
    assert!(ctx.empty(DType::F32, 9).view().to_f32().iter().all(|x| x.is_nan()));
    assert_eq!(cuda.memory().used, 512, "the ids alone are held");
}

#[test]
fn a_recording_replays_on_what_memory_holds_then() {
    let Some((ctx, cuda)) = device() else { return };
    let mut x = ctx.from_f32(&[1.0; 100]);
    let mut by = ctx.from_f32(&[3.0]);
    let step = |x: &mut Buf, by: &Buf| {
        let copy = ctx.copy_of(by.view());
        scale(&cuda, x, 1.0, &copy);
    };
    step(&mut x, &by);
    let (graph, ()) = cuda.capture(|| step(&mut x, &by));
    assert_eq!(x.view().to_f32(), [3.0; 100], "recording does nothing");
    let (waits, _) = cuda.waits();
    assert!(graph.replay());
    by.view_mut().write(&[5.0f32]);
    assert!(graph.replay());
    assert_eq!((cuda.waits().0, cuda.replays()), (waits, 2));
    assert_eq!(x.view().to_f32(), [45.0; 100]);
    // What the recording used for a while may not be in use for something else.
    let taken = ctx.empty(DType::F32, 1);
    assert!(!graph.replay());
    drop(taken);
    assert!(graph.replay());
}

/// Kernels that may begin early, behind fillings and copies that are long enough for them to be overtaken, behind one
/// another and before a copy and a filling: launched and replayed, each finds what the one before it left.
#[test]
fn what_begins_early_waits_for_fillings_and_copies() {
    let Some((ctx, cuda)) = device() else { return };
    if !cuda.has_wgmma() {
        return skipped("no wgmma");
    }
    const N: usize = 8 << 20;
    const ROUNDS: usize = 3;
    let zeros = || ctx.zeros(DType::I32, N);
    let (mut filled, mut state, mut copied, mut other) = (zeros(), zeros(), zeros(), zeros());
    let step = |filled: &mut Buf, state: &mut Buf, copied: &mut Buf, other: &mut Buf| {
        cuda.fill_words(filled.view_mut(), 7);
        mix(&cuda, filled.view(), state.view_mut());
        cuda.copy(state.view(), copied.view_mut());
        mix(&cuda, copied.view(), other.view_mut());
        mix(&cuda, other.view(), state.view_mut());
        // What comes too early finds this.
        cuda.fill_words(filled.view_mut(), 9);
        cuda.zero(copied.view_mut());
    };
    let expected = |rounds: usize| -> Vec<i32> {
        let of = |i| {
            let round = |(state, other), _| {
                let state = mixed(7, state, i);
                let other = mixed(state, other, i);
                (mixed(other, state, i), other)
            };
            (0..rounds).fold((0, 0), round).0 as i32
        };
        (0..N).map(of).collect()
    };
    for round in 1..=ROUNDS {
        step(&mut filled, &mut state, &mut copied, &mut other);
        assert!(state.view().to_i32() == expected(round), "launched, round {round}");
    }
    let (graph, ()) = cuda.capture(|| step(&mut filled, &mut state, &mut copied, &mut other));
    for round in ROUNDS + 1..=2 * ROUNDS {
        assert!(graph.replay());
        assert!(state.view().to_i32() == expected(round), "replayed, round {round}");
    }
    // One behind the other.
    (0..ROUNDS).for_each(|_| assert!(graph.replay()));
    assert!(state.view().to_i32() == expected(3 * ROUNDS), "replayed without a wait in between");
}

/// Experts' products, which begin early on Hopper, between copies and fillings: a replayed step has the bits of a
/// launched one.
#[test]
fn products_of_experts_wait_for_fillings_and_copies() {
    let Some((ctx, cuda)) = device() else { return };
    let (rows, dim, width, experts) = (4096, 512, 256, 8);
    let data = |stream, n| buf_on(&ctx, DType::Bf16, &normals(stream, n, 0.1));
    let (source, w) = (data(1, rows * dim), data(2, experts * width * dim));
    let w = Weight::stacked(w.view(), experts, width, dim);
    let offsets = ctx.from_i32(&[0, 5, 805, 805, 2000, 2001, 3000, 3500, 4096]);
    let run = |replayed: bool| {
        let (mut x, mut y) = (ctx.zeros(DType::Bf16, rows * dim), ctx.zeros(DType::Bf16, rows * width));
        let (mut dy, mut dw) = (y.clone(), ctx.zeros(DType::F32, experts * width * dim));
        let mut step = || {
            cuda.copy(source.view(), x.view_mut());
            gemm_grouped::grouped(&ctx, x.view(), offsets.view(), &w, y.view_mut());
            cuda.copy(y.view(), dy.view_mut());
            let (at, to) = (offsets.view(), dw.view_mut());
            gemm_grouped::grouped_backward_weight(&ctx, x.view(), dy.view(), at, width, dim, to, true);
            gemm_grouped::grouped_backward_input(&ctx, dy.view(), offsets.view(), &w, x.view_mut());
            cuda.zero(dy.view_mut());
        };
        // What is uploaded once is there afterwards.
        step();
        if replayed {
            let (graph, ()) = cuda.capture(&mut step);
            (0..3).for_each(|_| assert!(graph.replay()));
        } else {
            (0..3).for_each(|_| step());
        }
        [x, y, dw]
    };
    let (launched, replayed) = (run(false), run(true));
    for (name, (a, b)) in ["dx", "y", "dw"].iter().zip(launched.iter().zip(&replayed)) {
        assert_same_bits(name, a, b);
    }
    assert!(launched[2].view().to_f32().iter().any(|&x| x != 0.0));
}

#[test]
fn tables_are_uploaded_once() {
    let Some((_, cuda)) = device() else { return };
    let (a, b) = (cuda.constant(&[1, 2, 3]), cuda.constant(&[1, 2, 4]));
    assert!(a != b && a == cuda.constant(&[1, 2, 3]));
    let mut words = [0u32; 3];
    cuda.read(b, bytemuck::cast_slice_mut(&mut words));
    assert_eq!(words, [1, 2, 4]);
}

#[test]
fn more_memory_than_there_is_says_so() {
    let Some((ctx, cuda)) = device() else { return };
    let all = cuda.total_memory();
    let quiet = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ctx.empty(DType::F32, all)));
    let failure = quiet.expect_err("four times the memory of the GPU");
    assert!(super::is_failure());
    let message = failure.downcast_ref::<String>().expect("a message for the user");
    assert!(message.contains("GiB wanted") && message.contains("recompute"), "{message}");
    // And the device goes on.
    assert_eq!(ctx.from_f32(&[1.0]).view().to_f32(), [1.0]);
}

/// What runs out of memory is told what would need less: training, or who has said what else.
#[test]
fn a_shortage_says_what_needs_less() {
    let said = |advice: Option<&'static str>| {
        let cuda = Cuda::dry(None, crate::testing::ctx().host().clone());
        advice.into_iter().for_each(|less| cuda.advise(less));
        let held = cuda.zeros(DType::F32, 1 << 28);
        let message = cuda.shortage(3 << 30, (5 << 29, 10 << 30), "why");
        drop(held);
        message
    };
    let begins =
        "GPU 0 (NVIDIA H200): 3.00 GiB wanted, 1.00 GiB in use by this process, 2.50 of 10.00 GiB free (why); ";
    let in_training = "a smaller batch, a shorter sequence or recompute = \"all\" needs less: `hadal inspect --device \
                       cuda` predicts how much";
    for (advice, ends) in [(None, in_training), (Some("fewer --tokens need less"), "fewer --tokens need less")] {
        let found = said(advice);
        assert_eq!(found, format!("{begins}{ends}"));
    }
}

/// What a GPU that is not there holds is what one would hold that is.
#[test]
fn a_dry_device_counts_what_a_real_one_takes() {
    let host = crate::testing::ctx().host().clone();
    let dry = crate::Device::Cuda(Cuda::dry(None, host)).ctx();
    let work = |ctx: &Ctx| {
        let kept = ctx.zeros(DType::F32, 1000);
        let mut sizes: Vec<Option<Buf>> = (1..20).map(|i| Some(ctx.empty(DType::Bf16, i * 7919))).collect();
        sizes.iter_mut().step_by(3).for_each(|b| drop(b.take()));
        sizes.extend((1..20).map(|i| Some(ctx.from_f32(&vec![1.0; i * 5000]))));
        let mut sum = ctx.zeros(DType::F32, 5000);
        crate::ops::add::accumulate(ctx, sizes[20].as_ref().unwrap().view().slice(0..5000), sum.view_mut());
        drop(kept);
        ctx.device.as_cuda().unwrap().memory()
    };
    let counted = work(&dry);
    assert!(counted.peak > 2_000_000 && counted.reached >= counted.peak && counted.used < counted.peak);
    let Some((ctx, cuda)) = device() else { return };
    cuda.reserve(counted.reached);
    let taken = work(&ctx);
    assert_eq!((taken.peak, taken.reached, taken.used), (counted.peak, counted.reached, counted.used));
    assert_eq!(taken.taken, counted.reached.max(64 << 20), "one piece is enough");
}

/// The message of a failure, whose cause may be anything that was launched before.
#[test]
fn a_failure_names_ops_and_sizes() {
    let cuda = Cuda::dry(None, crate::testing::ctx().host().clone());
    let ctx = crate::Device::Cuda(cuda.clone()).ctx();
    let (x, weight, mut y) = (ctx.empty(DType::Bf16, 512), ctx.filled(64, 1.0), ctx.empty(DType::Bf16, 512));
    let mut rstd = ctx.empty(DType::F32, 8);
    let (x_stride, eps) = (64, 1e-6);
    let (out, kept) = (y.view_mut(), rstd.view_mut());
    let norm = rmsnorm::Forward { x: x.view(), x_stride, weight: weight.view(), eps, y: out, rstd: kept };
    rmsnorm::forward(&ctx, norm);
    let square = Weight::new(x.view(), 8, 64);
    gemm::linear(&ctx, y.view(), &square, ctx.empty(DType::F32, 64).view_mut());
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cuda.fail("waiting for the device: why")));
    let message = failed.expect_err("a failure").downcast_ref::<String>().expect("a message for the user").clone();
    let expected = "GPU 0 (NVIDIA H200): waiting for the device: why; launched last: rmsnorm forward (x bf16[512], \
                    x_stride 64, weight f32[64], y bf16[512], rstd f32[8]): rmsnorm_forward, grid [2, 1, 1]; gemm (m 8, \
                    n 8, k 64, a.data bf16[512], a.ld 64, ta 0, b.data bf16[512], b.ld 64, tb 1, c.data f32[64], c.ld 8): \
                    cuBLASLt (HADAL_CUDA_SYNC=1 waits after each, which tells the one that failed)";
    assert_eq!(message, expected);
}

#[test]
fn views_of_the_wrong_place_are_refused() {
    let host = Buf::host_zeros(DType::F32, 1);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| host.view().ptr()));
    assert!(refused.is_err());
    let Some((ctx, _)) = device() else { return };
    let on = ctx.from_f32(&[1.0]);
    assert!(matches!(on.view(), View::Cuda(_)) && !on.view().is_host());
}
