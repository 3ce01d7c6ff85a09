//! The same seed gives the same bits whatever the number of threads.

use crate::support::{Place, metrics, number, succeeds, timeless};

#[test]
fn threads_change_nothing_but_time() {
    for dtype in ["bf16", "fp32"] {
        let place = Place::new();
        let weights = |run: &str| std::fs::read(place.path(run).join("latest/model.safetensors")).unwrap();
        for threads in ["1", "2", "5"] {
            succeeds(&place.pretrain(threads, &["--dtype", dtype, "--seed", "7", "--threads", threads]));
            assert_eq!(timeless(&place.path(threads)), timeless(&place.path("1")), "{dtype}, {threads} threads");
            assert!(weights(threads) == weights("1"), "{dtype}, {threads} threads: other weights");
        }
        succeeds(&place.pretrain("other", &["--dtype", dtype, "--seed", "8"]));
        assert_ne!(metrics(&place.path("other"))[0]["loss"], metrics(&place.path("1"))[0]["loss"]);
        assert!(weights("other") != weights("1"), "{dtype}: a seed without effect");
    }
}

#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() {
    let place = Place::new();
    for micro in ["4", "2", "1"] {
        succeeds(&place.pretrain(micro, &["--dtype", "fp32", "--micro-batch", micro]));
        let (found, expected) = (metrics(&place.path(micro)), metrics(&place.path("4")));
        for (a, b) in found.iter().zip(&expected) {
            // Sums in another order: a few f32 roundings, which three steps do not blow up.
            for key in ["loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm", "valid_loss"] {
                let Some(b) = b.get(key).and_then(|b| b.as_f64()) else { continue };
                assert!((number(a, key) - b).abs() <= 1e-4 * b, "micro-batch {micro}, {key}: {a} against {b}");
            }
            assert_eq!(a["max_violation"], b["max_violation"]);
        }
    }
}
