use super::{BLOCK, Decode, forward, reference};
use crate::ops::mla_prefill;
use crate::testing::{assert_close, assert_same_bits, buf, ctx, isas, levels, normals, op_tolerance, thread_counts};
use crate::{Buf, Ctx, DType};
use hadal_numerics::Tolerance;

/// A cache filled with sequences whose blocks are scattered in it; what no sequence holds is NaN.
struct Case {
    heads: usize,
    latent: usize,
    rope: usize,
    scale: f32,
    q: Buf,
    cache: Buf,
    block_table: Vec<i32>,
    cu_q: Vec<i32>,
    lengths: Vec<i32>,
}

const MAX_BLOCKS: usize = 5;

impl Case {
    /// Sequences of (queries, keys). Sequence s holds the same numbers wherever it stands if `first` says which it is.
    fn new(
        dtype: DType,
        (heads, latent, rope): (usize, usize, usize),
        first: usize,
        sequences: &[(usize, usize)],
    ) -> Self {
        let width = latent + rope;
        let blocks = sequences.len() * MAX_BLOCKS + 1;
        let mut cache = vec![f32::NAN; blocks * BLOCK * width];
        let (mut block_table, mut q, mut cu_q) = (Vec::new(), Vec::new(), vec![0]);
        for (s, &(queries, keys)) in sequences.iter().enumerate() {
            let rows = normals(100 + (first + s) as u64, keys * width, 1.0);
            // Multiplication by 7 permutes the blocks: their number shares no factor with it.
            assert!(!blocks.is_multiple_of(7), "blocks would collide");
            let table: Vec<usize> = (0..MAX_BLOCKS).map(|b| (s * MAX_BLOCKS + b) * 7 % blocks).collect();
            for k in 0..keys {
                let at = (table[k / BLOCK] * BLOCK + k % BLOCK) * width;
                cache[at..at + width].copy_from_slice(&rows[k * width..(k + 1) * width]);
            }
            // Entries beyond the length are not read: make them invalid.
            block_table.extend((0..MAX_BLOCKS).map(|b| if b * BLOCK < keys { table[b] as i32 } else { -7 }));
            q.extend(normals(200 + (first + s) as u64, queries * heads * width, 1.0));
            cu_q.push(cu_q[s] + queries as i32);
        }
        let lengths = sequences.iter().map(|s| s.1 as i32).collect();
        let scale = 1.5 / (width as f32).sqrt();
        Self { heads, latent, rope, scale, q: buf(dtype, &q), cache: buf(dtype, &cache), block_table, cu_q, lengths }
    }

    fn run(&self, ctx: &Ctx) -> (Buf, Buf) {
        let n = self.cu_q[self.cu_q.len() - 1] as usize * self.heads;
        let (mut out, mut lse) = (ctx.zeros(self.q.dtype(), n * self.latent), ctx.zeros(DType::F32, n));
        let (table, cu_q, lengths) =
            (ctx.from_i32(&self.block_table), ctx.from_i32(&self.cu_q), ctx.from_i32(&self.lengths));
        let (q, cache) = (ctx.here(self.q.clone()), ctx.here(self.cache.clone()));
        let a = Decode {
            heads: self.heads,
            latent: self.latent,
            rope: self.rope,
            scale: self.scale,
            q: q.view(),
            cache: cache.view(),
            block_table: table.view(),
            cu_q: cu_q.view(),
            lengths: lengths.view(),
            out: out.view_mut(),
            lse: lse.view_mut(),
        };
        forward(ctx, a);
        (out, lse)
    }

    fn reference(&self) -> reference::Inputs {
        reference::Inputs {
            heads: self.heads,
            latent: self.latent,
            rope: self.rope,
            scale: self.scale.into(),
            q: f64s(&self.q),
            cache: f64s(&self.cache),
            block_table: self.block_table.clone(),
            cu_q: self.cu_q.clone(),
            lengths: self.lengths.clone(),
        }
    }
}

fn f64s(b: &Buf) -> Vec<f64> {
    b.view().to_f32().into_iter().map(f64::from).collect()
}

/// Elements `at * width` on, `n * width` of them.
fn rows(b: &Buf, at: usize, n: usize, width: usize) -> Buf {
    buf(b.dtype(), &b.view().to_f32()[at * width..(at + n) * width])
}

const SEQUENCES: [(usize, usize); 6] = [(1, 1), (1, 64), (3, 65), (0, 20), (1, 200), (70, 130)];

#[test]
fn agrees_with_the_reference() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for sizes in [(4, 32, 8), (3, 19, 5), (17, 16, 16), (32, 24, 0)] {
                for sequences in [&SEQUENCES[..], &SEQUENCES[3..4], &[(5, 2)], &[]] {
                    let case = Case::new(dtype, sizes, 0, sequences);
                    let (out, lse) = case.run(&ctx);
                    let (o, l) = reference::forward(&case.reference());
                    let name = format!("{dtype:?} {sizes:?} {sequences:?}");
                    assert_close(&format!("out, {name}"), &out, &o, op_tolerance(dtype));
                    assert_close(&format!("lse, {name}"), &lse, &l, Tolerance::F32_OP);
                }
            }
            let case = Case::new(dtype, (16, 512, 64), 0, &[(1, 130)]);
            let (out, _) = case.run(&ctx);
            assert_close("576 and 512", &out, &reference::forward(&case.reference()).0, op_tolerance(dtype));
        }
    }
}

/// Absorbing kv_b_proj into the query and the output changes the arithmetic, not the function.
#[test]
fn absorbed_equals_unabsorbed() {
    let (heads, nope, rope, v, latent) = (3, 6, 4, 5, 8);
    let case = Case::new(DType::F32, (heads, latent, rope), 0, &[(4, 70), (2, 2)]);
    let mut absorbed = case.reference();
    let f64s = |stream, n| -> Vec<f64> { normals(stream, n, 1.0).into_iter().map(f64::from).collect() };
    let (wk, wv) = (f64s(1, heads * nope * latent), f64s(2, heads * v * latent));
    let nq = case.cu_q[2] as usize;
    let q = f64s(3, nq * heads * (nope + rope));
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
    // q_abs = q_nope Wk, then q_rope.
    absorbed.q = Vec::new();
    for (i, q) in q.chunks(nope + rope).enumerate() {
        let wk = &wk[i % heads * nope * latent..][..nope * latent];
        absorbed.q.extend((0..latent).map(|c| (0..nope).map(|p| q[p] * wk[p * latent + c]).sum::<f64>()));
        absorbed.q.extend_from_slice(&q[nope..]);
    }
    let (mut kv_up, mut k_pe) = (Vec::new(), Vec::new());
    for s in 0..2 {
        for k in 0..case.lengths[s] as usize {
            let block = case.block_table[s * MAX_BLOCKS + k / BLOCK] as usize;
            let row = &absorbed.cache[(block * BLOCK + k % BLOCK) * (latent + rope)..][..latent + rope];
            for h in 0..heads {
                let of = |w: &[f64], n: usize, i: usize| dot(&w[(h * n + i) * latent..][..latent], &row[..latent]);
                kv_up.extend((0..nope).map(|i| of(&wk, nope, i)));
                kv_up.extend((0..v).map(|i| of(&wv, v, i)));
            }
            k_pe.extend_from_slice(&row[latent..]);
        }
    }
    let shape = mla_prefill::Shape { heads, nope, rope, v, k_pe_stride: rope, scale: case.scale };
    let cu_k = vec![0, case.lengths[0], case.lengths[0] + case.lengths[1]];
    let plain = mla_prefill::reference::Inputs { q, kv_up, k_pe, cu_q: case.cu_q.clone(), cu_k };
    let (expected, expected_lse) = mla_prefill::reference::forward(&shape, &plain);
    let (out, lse) = reference::forward(&absorbed);
    let mut i = 0;
    for (row, latents) in out.chunks(latent).enumerate() {
        assert!((lse[row] - expected_lse[row]).abs() < 1e-12);
        for c in 0..v {
            let o = dot(&wv[(row % heads * v + c) * latent..][..latent], latents);
            assert!((o - expected[i]).abs() < 1e-12, "{o} and {}", expected[i]);
            i += 1;
        }
    }
    assert_eq!(i, expected.len());
}

#[test]
fn one_by_one_equals_a_chunk() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            let (sizes, n, total) = ((6, 24, 8), 75, 140);
            let chunk = Case::new(dtype, sizes, 0, &[(n, total)]);
            let (out, lse) = chunk.run(&ctx);
            let (heads, width) = (sizes.0, sizes.1 + sizes.2);
            for i in 0..n {
                let mut one = Case::new(dtype, sizes, 0, &[(1, total - n + 1 + i)]);
                one.q = rows(&chunk.q, i, 1, heads * width);
                let (o, l) = one.run(&ctx);
                assert_same_bits(&format!("out of token {i}"), &rows(&out, i, 1, heads * sizes.1), &o);
                assert_same_bits(&format!("lse of token {i}"), &rows(&lse, i, 1, heads), &l);
            }
        }
    }
}

#[test]
fn a_sequence_alone_equals_itself_among_others() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            let sizes = (4, 32, 8);
            let (out, lse) = Case::new(dtype, sizes, 0, &SEQUENCES).run(&ctx);
            let mut at = 0;
            for (s, &(queries, keys)) in SEQUENCES.iter().enumerate() {
                let (o, l) = Case::new(dtype, sizes, s, &[(queries, keys)]).run(&ctx);
                assert_same_bits(&format!("out of {s}"), &rows(&out, at, queries, 4 * 32), &o);
                assert_same_bits(&format!("lse of {s}"), &rows(&lse, at, queries, 4), &l);
                at += queries;
            }
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new(dtype, (32, 40, 8), 0, &SEQUENCES);
        for isa in isas() {
            let runs: Vec<(Buf, Buf)> = thread_counts(isa).iter().map(|c| case.run(c)).collect();
            for (out, lse) in &runs[1..] {
                assert_same_bits("out", &runs[0].0, out);
                assert_same_bits("lse", &runs[0].1, lse);
            }
        }
    }
}

#[test]
#[should_panic(expected = "sequence 0: block -7 of 6")]
fn a_block_beyond_the_cache_is_refused() {
    let mut case = Case::new(DType::F32, (2, 8, 4), 0, &[(1, 64)]);
    case.lengths[0] = 65;
    case.run(&ctx());
}

#[test]
#[should_panic(expected = "attention with a scale of 0")]
fn a_scale_that_is_not_above_zero_is_refused() {
    Case { scale: 0.0, ..Case::new(DType::F32, (2, 8, 4), 0, &[(1, 64)]) }.run(&ctx());
}
