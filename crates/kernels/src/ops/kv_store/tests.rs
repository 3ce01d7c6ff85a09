use super::{Store, reference, store};
use crate::testing::{assert_same_bits, buf, buf_on, contexts, ctx, levels, normals};
use crate::{Buf, Ctx, DType};

fn run(ctx: &Ctx, dtype: DType, latent: usize, rope: usize, stride: usize, slots: &[i32], tokens: usize) -> Buf {
    let c_kv = buf_on(ctx, dtype, &normals(1, slots.len() * latent, 1.0));
    let k_pe = buf_on(ctx, dtype, &normals(2, slots.len() * stride, 1.0));
    let mut cache = buf_on(ctx, dtype, &normals(3, tokens * (latent + rope), 1.0));
    let slots = ctx.from_i32(slots);
    let a = Store {
        c_kv: c_kv.view(),
        k_pe: k_pe.view(),
        k_pe_stride: stride,
        latent,
        rope,
        slots: slots.view(),
        cache: cache.view_mut(),
    };
    store(ctx, a);
    cache
}

/// All but every seventh of `n` tokens, scattered over the slots.
fn slots(n: usize, held: usize) -> Vec<i32> {
    (0..n).map(|i| if i % 7 == 3 { -1 } else { (i * 5 % held) as i32 }).collect()
}

#[test]
fn agrees_with_the_reference() {
    for ctx in levels() {
        for dtype in [DType::F32, DType::Bf16] {
            for (latent, rope, stride, n, held) in
                [(512, 64, 576, 66, 128), (5, 3, 3, 127, 128), (4, 0, 0, 3, 64), (4, 2, 2, 0, 64), (4, 2, 9, 1, 64)]
            {
                let slots = slots(n, held);
                let found = run(&ctx, dtype, latent, rope, stride, &slots, held);
                let rounded = |stream, len| -> Vec<f64> {
                    buf(dtype, &normals(stream, len, 1.0)).view().to_f32().into_iter().map(f64::from).collect()
                };
                let mut cache = rounded(3, held * (latent + rope));
                let (c_kv, k_pe) = (rounded(1, n * latent), rounded(2, n * stride));
                reference::store(&c_kv, &k_pe, stride, latent, rope, &slots, &mut cache);
                let expected: Vec<f32> = cache.iter().map(|&x| x as f32).collect();
                assert_same_bits(&format!("{dtype:?} {latent} {rope} {n}"), &found, &buf(dtype, &expected));
            }
        }
    }
}

#[test]
fn thread_count_changes_no_bit() {
    let slots = slots(300, 512);
    let runs: Vec<Buf> = contexts().iter().map(|c| run(c, DType::Bf16, 16, 8, 8, &slots, 512)).collect();
    assert_same_bits("2 threads", &runs[0], &runs[1]);
    assert_same_bits("5 threads", &runs[0], &runs[2]);
}

#[test]
#[should_panic(expected = "token 1 goes to slot 64 of 64")]
fn a_slot_beyond_the_cache_is_refused() {
    run(&ctx(), DType::F32, 4, 2, 2, &[3, 64], 64);
}

#[test]
#[should_panic(expected = "two tokens go to slot 3")]
fn a_slot_given_twice_is_refused() {
    run(&ctx(), DType::F32, 4, 2, 2, &[3, -1, 3], 64);
}
