//! Every kernel compiles for every architecture: the operations run on devices that are not there, which note what they
//! are asked for, and NVRTC compiles that. Needs its library, no GPU.

use super::launch::{Module, Wanted};
use super::small_shapes::CASES;
use super::{Cuda, compile};
use crate::ops::{self, gemm, gemm_grouped, rmsnorm, swiglu};
use crate::testing::skipped;
use crate::{Ctx, DType, Device, Weight};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Compute capabilities from Ampere to Blackwell.
const ALL: &[(u32, u32)] = &[(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)];

/// What to compile for which of them: everything for each if the variable HADAL_TEST_ARCHS is `all`, which takes many
/// cores; else everything for Ampere and for Hopper what only Hopper has.
fn work() -> Vec<((u32, u32), Module)> {
    if std::env::var_os("HADAL_TEST_ARCHS").is_some_and(|v| v == "all") {
        return ALL.iter().flat_map(|&arch| wanted(arch).into_iter().map(move |w| (arch, w))).collect();
    }
    let (ampere, mut hopper) = (wanted((8, 0)), wanted((9, 0)));
    hopper.retain(|module, _| !ampere.contains_key(module));
    let of = |arch, wanted: Wanted| wanted.into_iter().map(move |w| (arch, w));
    of((8, 0), ampere).chain(of((9, 0), hopper)).collect()
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    if compile::present().is_err() {
        return skipped("no NVRTC");
    }
    let work = work();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        while let Some((arch, ((name, defines), (source, functions)))) = work.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let code = compile::compile(source.stem(), &source.whole(defines), &compile::options(*arch, arch.0 == 9));
            let failure = match code {
                Ok(code) => functions.iter().find(|f| !has(&code, f)).map(|f| format!("no kernel {f}")),
                Err(e) => Some(e.to_string()),
            };
            let macros = defines.replace("#define ", "").replace('\n', ", ");
            failures.lock().unwrap().extend(failure.map(|why| format!("{arch:?} {name} with {macros}: {why}")));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(worker))));
    println!("{} modules", work.len());
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} of {} do not compile:\n{}", failures.len(), work.len(), failures.join("\n"));
}

/// Whether machine code has an entry of that name.
fn has(code: &[u8], function: &str) -> bool {
    let section = [b".text.", function.as_bytes(), b"\0"].concat();
    code.windows(section.len()).any(|w| w == section)
}

/// What the operations ask of a GPU of that compute capability.
fn wanted(arch: (u32, u32)) -> Wanted {
    let host = crate::testing::ctx().host().clone();
    let cuda = Cuda::dry_as("a GPU that is not there".into(), arch, 132, usize::MAX, host);
    let ctx = Device::Cuda(cuda.clone()).ctx();
    cuda.set_invariant(true);
    super::tests::kernels(&ctx);
    for dtype in [DType::F32, DType::Bf16] {
        for case in CASES {
            case(&ctx, dtype);
        }
        large(&ctx, dtype);
    }
    cuda.wanted()
}

/// What small shapes do not reach: large tiles, and rows of the published models' widths.
fn large(ctx: &Ctx, dtype: DType) {
    let empty = |n: usize| ctx.empty(dtype, n);
    let (n, d, f, e) = (4096, 2048, 1408, 8);
    // Rows one element longer than what the widest loads take keep the general kernels in use on every GPU.
    for width in [d, d + 1] {
        let (x, w) = (empty(n * width), empty(d * width));
        let w = Weight::new(w.view(), d, width);
        let (mut y, mut dx, mut dw) = (empty(n * d), empty(n * width), ctx.zeros(DType::F32, d * width));
        gemm::linear(ctx, x.view(), &w, y.view_mut());
        gemm::linear_backward_input(ctx, y.view(), &w, dx.view_mut(), false);
        let dw = gemm::MatMut { data: dw.view_mut(), ld: width };
        gemm::linear_backward_weight(ctx, x.view(), y.view(), d, width, dw, true);

        let (offsets, w) = (ctx.zeros(DType::I32, e + 1), empty(e * f * width));
        let w = Weight::stacked(w.view(), e, f, width);
        let (mut y, mut dw) = (empty(n * f), ctx.zeros(DType::F32, e * f * width));
        gemm_grouped::grouped(ctx, x.view(), offsets.view(), &w, y.view_mut());
        gemm_grouped::grouped_backward_input(ctx, y.view(), offsets.view(), &w, dx.view_mut());
        for accumulate in [false, true] {
            let (x, dy, offsets) = (x.view(), y.view(), offsets.view());
            gemm_grouped::grouped_backward_weight(ctx, x, dy, offsets, f, width, dw.view_mut(), accumulate);
        }
    }
    for d in [128, 256, 512, 1536, 2048, 5120, 7168] {
        let (x, weight, rstd) = (empty(n * d), ctx.zeros(DType::F32, d), ctx.zeros(DType::F32, n));
        let (mut y, mut out, mut dw) = (empty(n * d), ctx.zeros(DType::F32, n), ctx.zeros(DType::F32, d));
        let a = rmsnorm::Forward {
            x: x.view(),
            x_stride: d,
            weight: weight.view(),
            eps: 1e-6,
            y: y.view_mut(),
            rstd: out.view_mut(),
        };
        rmsnorm::forward(ctx, a);
        for [input, weight_gradient] in [[true, true], [true, false], [false, true]] {
            let (dx, dw) = (y.view_mut(), dw.view_mut());
            let b = rmsnorm::Backward {
                dy: x.view(),
                x: x.view(),
                x_stride: d,
                weight: weight.view(),
                rstd: rstd.view(),
                input: input.then_some(rmsnorm::InputGradient { dx, dx_stride: d, accumulate: true }),
                weight_gradient: weight_gradient.then_some(rmsnorm::WeightGradient { dw, accumulate: true }),
            };
            rmsnorm::backward(ctx, b);
        }
        let mut gate_up = empty(2 * n * d);
        let b = swiglu::Backward { dy: y.view_mut(), gate_up: gate_up.view_mut(), width: d, rows: None, weights: None };
        swiglu::backward(ctx, b);
    }
    decode_of_v3(ctx, dtype);
}

/// The latent of the published models.
fn decode_of_v3(ctx: &Ctx, dtype: DType) {
    use ops::mla_decode::{BLOCK, Decode, forward};
    let (heads, latent, rope, seqs) = (128, 512, 64, 3);
    let q = ctx.empty(dtype, seqs * heads * (latent + rope));
    let cache = ctx.empty(dtype, BLOCK * (latent + rope));
    let [block_table, cu_q, lengths] = [seqs, seqs + 1, seqs].map(|n| ctx.zeros(DType::I32, n));
    let (mut out, mut lse) = (ctx.empty(dtype, seqs * heads * latent), ctx.empty(DType::F32, seqs * heads));
    let a = Decode {
        heads,
        latent,
        rope,
        scale: 0.1,
        q: q.view(),
        cache: cache.view(),
        block_table: block_table.view(),
        cu_q: cu_q.view(),
        lengths: lengths.view(),
        out: out.view_mut(),
        lse: lse.view_mut(),
    };
    forward(ctx, a);
}
