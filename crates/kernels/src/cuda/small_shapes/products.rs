//! Matrix products, attention, the head.

use super::{cumulative, floats, integers, numbers};
use crate::ops::gemm::{Gemm, Mat, MatMut};
use crate::ops::{gemm_grouped as experts, head_loss as head, mla_decode as decode, mla_prefill as prefill};
use crate::{Buf, Ctx, DType, Weight};

pub(in crate::cuda) fn gemm(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // Rows of whole vectors and not; one row; a sum that is cut into pieces where A is transposed.
    for (m, n, k, pad) in [(136, 72, 200, 8), (70, 65, 130, 3), (1, 17, 9, 0), (16, 24, 1100, 0)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let stored = |rows: usize, cols: usize, t: bool| if t { (cols, rows + pad) } else { (rows, cols + pad) };
            let (a, b) = (stored(m, k, ta), stored(k, n, tb));
            let weight = if tb { dtype } else { DType::F32 };
            for (db, dc, accumulate) in [(dtype, dtype, false), (dtype, DType::F32, true), (weight, dtype, true)] {
                let left = numbers(ctx, dtype, 1, a.0 * a.1);
                let right = numbers(ctx, db, 2, b.0 * b.1);
                let mut c = numbers(ctx, dc, 3, m * (n + pad));
                let g = Gemm {
                    m,
                    n,
                    k,
                    a: Mat { data: left.view(), ld: a.1 },
                    ta,
                    b: Mat { data: right.view(), ld: b.1 },
                    tb,
                    c: MatMut { data: c.view_mut(), ld: n + pad },
                    accumulate,
                };
                crate::ops::gemm::gemm(ctx, g);
                out.push(c);
            }
        }
    }
    out
}

pub(in crate::cuda) fn gemm_grouped(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // More rows than a tile, none, one; so many that Hopper's weight gradient cuts them into chunks. The buffers have room
    // for more than there are.
    let few: &[i32] = &[130, 0, 71, 1];
    for (lengths, rows, cols) in [(few, 136, 72), (few, 21, 35), (&[3, 1100, 0], 24, 16)] {
        let (offsets, e) = (cumulative(ctx, lengths), lengths.len());
        let capacity = lengths.iter().sum::<i32>() as usize + 8;
        let (x, dy) = (numbers(ctx, dtype, 1, capacity * cols), numbers(ctx, dtype, 2, capacity * rows));
        let w = numbers(ctx, dtype, 3, e * rows * cols);
        let w = Weight::stacked(w.view(), e, rows, cols);
        let (mut y, mut dx) = (ctx.zeros(dtype, capacity * rows), ctx.zeros(dtype, capacity * cols));
        let (mut dw, mut sum) = (ctx.empty(DType::F32, e * rows * cols), floats(ctx, 4, e * rows * cols));
        experts::grouped(ctx, x.view(), offsets.view(), &w, y.view_mut());
        experts::grouped_backward_input(ctx, dy.view(), offsets.view(), &w, dx.view_mut());
        for (dw, accumulate) in [(&mut dw, false), (&mut sum, true)] {
            let dw = dw.view_mut();
            experts::grouped_backward_weight(ctx, x.view(), dy.view(), offsets.view(), rows, cols, dw, accumulate);
        }
        out.extend([y, dx, dw, sum]);
    }
    out
}

/// What is asked of the head beside log-probabilities.
#[derive(Clone, Copy)]
enum Ask {
    Nothing,
    Entropy,
    All,
}

pub(in crate::cuda) fn head_loss(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // A vocabulary in two slices, of the plain kernels and of Hopper's; rows that are no vectors.
    for (n, v, d, ask) in
        [(130, 520, 64, Ask::Entropy), (5, 8200, 16, Ask::Nothing), (33, 4100, 24, Ask::All), (17, 300, 21, Ask::All)]
    {
        let (hidden, weight) = (numbers(ctx, dtype, 1, n * d), numbers(ctx, dtype, 2, v * d));
        let targets: Vec<i32> = (0..n).map(|i| if i % 5 == 4 { -1 } else { (i * 31 % v) as i32 }).collect();
        let targets = ctx.from_i32(&targets);
        let (given, all) = (integers(ctx, 2 * n, v), matches!(ask, Ask::All));
        let x = head::Inputs {
            hidden: hidden.view(),
            weight: Weight::new(weight.view(), v, d),
            targets: targets.view(),
            temperature: 0.7,
            given: all.then(|| given.view()),
        };
        let [mut lse, mut logp, mut entropy] = [0; 3].map(|_| ctx.empty(DType::F32, n));
        let [mut given_logp, mut best] = [2, 3].map(|k| ctx.empty(DType::F32, k * n));
        let mut ids = ctx.empty(DType::I32, 3 * n);
        let outputs = head::Outputs {
            lse: lse.view_mut(),
            logp: logp.view_mut(),
            entropy: entropy.view_mut(),
            given_logp: all.then(|| given_logp.view_mut()),
            top: all.then(|| (ids.view_mut(), best.view_mut())),
        };
        head::forward(ctx, x, outputs);

        let mut d_logp = ctx.empty(DType::F32, n);
        head::target_weights(ctx, targets.view(), 0.125, d_logp.view_mut());
        let (d_entropy, d_given) = (floats(ctx, 3, n), floats(ctx, 4, 2 * n));
        let (mut d_hidden, mut d_weight) = (ctx.empty(dtype, n * d), floats(ctx, 5, v * d));
        let gradients = head::Gradients {
            d_logp: d_logp.view(),
            d_entropy: (!matches!(ask, Ask::Nothing)).then(|| d_entropy.view()),
            d_given: all.then(|| d_given.view()),
            d_hidden: Some(d_hidden.view_mut()),
            d_weight: Some((d_weight.view_mut(), all)),
        };
        let b = head::Backward { lse: lse.view(), entropy: entropy.view(), gradients };
        head::backward(ctx, x, b);
        out.extend([lse, logp, entropy, d_logp, d_hidden, d_weight]);
        if all {
            out.extend([given_logp, ids, best]);
        }
    }
    out
}

pub(in crate::cuda) fn mla_decode(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // Several queries of a sequence; keys of several parts; rows of whole vectors and not.
    let (queries, lengths) = ([1, 3, 0, 2], [130, 65, 1, 333]);
    let (cu_q, nq, seqs, max_blocks) = (cumulative(ctx, &queries), 6, 4, 6);
    let table: Vec<i32> = (0..seqs * max_blocks).map(|i| (i * 7 % (seqs * max_blocks)) as i32).collect();
    let (table, lengths) = (ctx.from_i32(&table), ctx.from_i32(&lengths));
    for (heads, latent, rope) in [(5, 64, 16), (17, 20, 6)] {
        let width = latent + rope;
        let q = numbers(ctx, dtype, 1, nq * heads * width);
        let cache = numbers(ctx, dtype, 2, seqs * max_blocks * decode::BLOCK * width);
        let (mut y, mut lse) = (ctx.empty(dtype, nq * heads * latent), ctx.empty(DType::F32, nq * heads));
        let a = decode::Decode {
            heads,
            latent,
            rope,
            scale: 0.1,
            q: q.view(),
            cache: cache.view(),
            block_table: table.view(),
            cu_q: cu_q.view(),
            lengths: lengths.view(),
            out: y.view_mut(),
            lse: lse.view_mut(),
        };
        decode::forward(ctx, a);
        out.extend([y, lse]);
    }
    out
}

pub(in crate::cuda) fn mla_prefill(ctx: &Ctx, dtype: DType) -> Vec<Buf> {
    let mut out = Vec::new();
    // V3's heads, also as a continuation; heads of whole vectors; odd ones; ones too wide for sums in registers.
    for (heads, [nope, rope, v], [queries, keys], stride) in [
        (2, [128, 64, 128], [[199, 3], [199, 3]], 64),
        (1, [128, 64, 128], [[3, 70], [131, 72]], 72),
        (3, [32, 16, 32], [[70, 1], [70, 130]], 16),
        (2, [12, 6, 10], [[37, 66], [37, 66]], 7),
        (1, [192, 64, 128], [[5, 9], [66, 9]], 64),
    ] {
        let total = |lengths: [i32; 2]| lengths.iter().sum::<i32>() as usize;
        let (nq, nk) = (total(queries), total(keys));
        let shape = prefill::Shape { heads, nope, rope, v, k_pe_stride: stride, scale: 0.1 };
        let q = numbers(ctx, dtype, 1, nq * heads * (nope + rope));
        let kv_up = numbers(ctx, dtype, 2, nk * heads * (nope + v));
        let k_pe = numbers(ctx, dtype, 3, nk * stride);
        let (cu_q, cu_k) = (cumulative(ctx, &queries), cumulative(ctx, &keys));
        let x = prefill::Inputs {
            q: q.view(),
            kv_up: kv_up.view(),
            k_pe: k_pe.view(),
            cu_q: cu_q.view(),
            cu_k: cu_k.view(),
        };
        let (mut y, mut lse) = (ctx.empty(dtype, nq * heads * v), ctx.empty(DType::F32, nq * heads));
        prefill::forward(ctx, shape, x, y.view_mut(), lse.view_mut());
        let dout = numbers(ctx, dtype, 4, y.len());
        let (mut dq, mut dkv_up) = (ctx.empty(dtype, q.len()), ctx.empty(dtype, kv_up.len()));
        let mut dk_pe = ctx.zeros(dtype, nk * stride);
        let b = prefill::Backward {
            out: y.view(),
            lse: lse.view(),
            dout: dout.view(),
            dq: dq.view_mut(),
            dkv_up: dkv_up.view_mut(),
            dk_pe: dk_pe.view_mut(),
            dk_pe_stride: stride,
        };
        prefill::backward(ctx, shape, x, b);
        out.extend([y, lse, dq, dkv_up, dk_pe]);
    }
    out
}
