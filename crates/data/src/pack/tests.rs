use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::thread;

use tempfile::TempDir;

use super::*;
use crate::shards::testing::side;

/// Sources whose tokens count from a million times their number.
fn parts(dir: &Path, sizes: &[u32]) -> Vec<Part> {
    let part = |(i, &n): (usize, &u32)| {
        let tokens: Vec<u32> = (0..n).map(|t| i as u32 * 1_000_000 + t).collect();
        Part { name: format!("s{i}"), tokens: side(dir, &format!("s{i}"), &tokens) }
    };
    sizes.iter().enumerate().map(part).collect()
}

fn loader(sizes: &[u32], weights: &[Option<f64>], seq: usize, seed: u64) -> (TempDir, Loader) {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..sizes.len()).map(|i| format!("s{i}")).collect();
    let named: Vec<(&str, Option<f64>)> = names.iter().map(String::as_str).zip(weights.iter().copied()).collect();
    let loader = Loader::new(parts(dir.path(), sizes), Shares::new(&named).unwrap(), seq, seed).unwrap();
    (dir, loader)
}

#[test]
fn an_epoch_visits_each_window_once() {
    let (_dir, loader) = loader(&[1000], &[None], 8, 3);
    assert_eq!(loader.windows(), 124);
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let order: Vec<u32> = (0..124).map(|i| loader.sample(epoch * 124 + i).unwrap()[0] / 8).collect();
        assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), (0..124).collect());
        orders.push(order);
    }
    assert_ne!(orders[0], orders[1]);
    assert_ne!(orders[1], orders[2]);
    assert_ne!(orders[0], (0..124).collect::<Vec<_>>());
    let sample = loader.sample(5).unwrap();
    assert_eq!(sample, (sample[0]..=sample[0] + 8).collect::<Vec<_>>());
}

#[test]
fn without_weights_an_epoch_visits_each_window_of_every_source_once() {
    let (_dir, loader) = loader(&[100, 900, 33], &[None; 3], 8, 3);
    assert_eq!(loader.windows(), 12 + 112 + 4);
    for epoch in 0..3 {
        let seen: BTreeSet<(usize, u64)> = (0..128).map(|i| loader.place(epoch * 128 + i)).collect();
        assert_eq!(seen.len(), 128);
        assert_eq!(seen.iter().filter(|(source, _)| *source == 1).count(), 112);
    }
    for i in 0..128 {
        let ((source, window), sample) = (loader.place(i), loader.sample(i).unwrap());
        assert_eq!(u64::from(sample[0]), source as u64 * 1_000_000 + window * 8);
    }
}

#[test]
fn weights_are_exact_in_every_block_and_sources_keep_their_epochs() {
    let weights = [Some(1.0), Some(2.5), Some(0.01)];
    let (_dir, loader) = loader(&[1000, 2000, 90], &weights, 8, 3);
    let quotas = [1167, 2917, 12];
    let (mut counts, mut seen) = ([0u64; 3], HashMap::new());
    for block in 0..4u64 {
        let mut here = [0u64; 3];
        for i in 0..BLOCK_SAMPLES {
            let (source, window) = loader.place(block * BLOCK_SAMPLES + i);
            here[source] += 1;
            // In its epoch of its source no window comes twice.
            let windows = [124, 249, 11][source];
            let epoch = counts[source] / windows;
            assert!(seen.insert((source, epoch, window), ()).is_none(), "{source} {epoch} {window}");
            counts[source] += 1;
        }
        assert_eq!(here, quotas, "block {block}");
    }
    // Shares are spread over a block: its quarters differ from each other by little.
    let first = (0..1024).filter(|&i| loader.place(i).0 == 0).count();
    assert!((220..370).contains(&first), "{first}");
    let orders: Vec<Vec<usize>> =
        (0..2).map(|b| (0..64).map(|i| loader.place(b * BLOCK_SAMPLES + i).0).collect()).collect();
    assert_ne!(orders[0], orders[1]);
}

/// Going on at any sample, in any order of asking, on any number of threads gives the same samples.
#[test]
fn samples_are_a_pure_function() {
    for weights in [[None, None], [Some(3.0), Some(1.0)]] {
        let (_dir, first) = loader(&[333, 200], &weights, 10, 1);
        let range = BLOCK_SAMPLES - 100..BLOCK_SAMPLES + 100;
        let expected: Vec<_> = range.clone().map(|i| first.sample(i).unwrap()).collect();
        let (_dir, fresh) = loader(&[333, 200], &weights, 10, 1);
        for i in range.clone().rev() {
            assert_eq!(fresh.sample(i).unwrap(), expected[(i - range.start) as usize]);
        }
        let (_dir, resumed) = loader(&[333, 200], &weights, 10, 1);
        assert_eq!(resumed.sample(BLOCK_SAMPLES + 50).unwrap(), expected[150]);
        thread::scope(|scope| {
            for t in 0..5u64 {
                let (fresh, expected, start) = (&fresh, &expected, range.start);
                scope.spawn(move || {
                    for i in 0..200 {
                        let i = (i * 37 + t * 61) % 200;
                        assert_eq!(fresh.sample(start + i).unwrap(), expected[i as usize]);
                    }
                });
            }
        });
        let (_dir, other) = loader(&[333, 200], &weights, 10, 2);
        assert!((0..33).any(|i| other.place(i) != first.place(i)));
    }
}

#[test]
fn loader_at_the_edges() {
    assert_eq!(loader(&[9], &[None], 8, 0).1.sample(17).unwrap(), (0..9).collect::<Vec<_>>());
    assert_eq!(loader(&[17], &[None], 8, 0).1.windows(), 2);
    assert_eq!(loader(&[16], &[None], 8, 0).1.windows(), 1);
    let dir = tempfile::tempdir().unwrap();
    let shares = |n: usize| Shares::new(&vec![("s", None); n]).unwrap();
    let error =
        |sizes: &[u32]| Loader::new(parts(dir.path(), sizes), shares(sizes.len()), 8, 0).err().unwrap().to_string();
    assert!(error(&[8]).contains("expected at least 9 tokens, found 8"));
    assert!(error(&[80, 8]).contains("source s1: the corpus is shorter than one sequence: expected at least 9"));
}

#[test]
fn weights_that_cannot_be_are_errors() {
    let error = |weights: &[Option<f64>]| {
        let named: Vec<(&str, Option<f64>)> = ["a", "b", "c"].into_iter().zip(weights.iter().copied()).collect();
        Shares::new(&named).unwrap_err().to_string()
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = error(&[Some(1.0), Some(bad)]);
        assert!(error.contains(&format!("source b: expected a finite weight above 0, found {bad}")), "{error}");
    }
    assert!(error(&[Some(1.0), None]).contains("source b: expected a weight, as other sources have one, found none"));
    let small = error(&[Some(1.0), Some(1e-5), Some(1.0)]);
    assert!(
        small.contains("source b: expected a weight that gives it one sample in 4096, found 0.00001 of "),
        "{small}"
    );
    assert!(Shares::new(&[("a", Some(f64::MAX)), ("b", Some(f64::MAX))]).is_ok());
}

#[test]
fn parts_add_up() {
    for (weights, total, expected) in [
        (&[1.0, 1.0, 1.0][..], 10, &[4, 3, 3][..]),
        (&[0.5, 0.25, 0.25], 4096, &[2048, 1024, 1024]),
        (&[1e300, 1e300], 3, &[2, 1]),
        (&[7.0], 5, &[5]),
        (&[1e-9, 1.0], 10, &[0, 10]),
    ] {
        assert_eq!(largest_remainder(weights, total), expected, "{weights:?}");
    }
}

#[test]
fn held_out_text_has_a_part_of_every_source() {
    let dir = tempfile::tempdir().unwrap();
    let all = parts(dir.path(), &[100, 300, 2]);
    let sides: Vec<&Side> = all.iter().map(|p| &p.tokens).collect();
    let first = |n: usize, from: u32| (from..).take(n).collect::<Vec<u32>>();
    let whole = TokenStream::beginnings(&sides, 1000).unwrap().tokens;
    assert_eq!(whole, [first(100, 0), first(300, 1_000_000), first(2, 2_000_000)].concat());
    let some = TokenStream::beginnings(&sides, 41).unwrap().tokens;
    assert_eq!(some, [first(10, 0), first(31, 1_000_000), first(1, 2_000_000)].concat());
    assert_eq!(TokenStream::beginnings(&sides[..1], 17).unwrap().tokens, first(17, 0));
}

#[test]
fn validation_windows_predict_each_token_once() {
    for (len, seq_len) in [(0, 4), (1, 4), (2, 4), (5, 4), (6, 4), (9, 4), (100, 7), (3, 1)] {
        let stream = TokenStream { tokens: (0..len).collect() };
        let windows: Vec<&[u32]> = stream.validation_windows(seq_len).collect();
        let targets: Vec<u32> = windows.iter().flat_map(|w| w[1..].iter().copied()).collect();
        assert_eq!(targets, (1..len.max(1)).collect::<Vec<_>>(), "{len} {seq_len}");
        assert!(windows.iter().all(|w| (2..=seq_len + 1).contains(&w.len())));
    }
}
