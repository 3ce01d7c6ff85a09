use std::collections::BTreeSet;
use std::thread;

use super::*;

fn stream(len: u32) -> TokenStream {
    TokenStream { tokens: (0..len).collect(), bytes: u64::from(len) }
}

#[test]
fn split_is_by_document_and_stable() {
    let a = split(1000, 0.05, 7).unwrap();
    assert_eq!(a, split(1000, 0.05, 7).unwrap());
    assert_ne!(a, split(1000, 0.05, 8).unwrap());
    assert!((30..=70).contains(&a.validation.len()), "{}", a.validation.len());
    let both: BTreeSet<usize> = a.train.iter().chain(&a.validation).copied().collect();
    assert_eq!(both, (0..1000).collect());
    assert_eq!(both.len(), a.train.len() + a.validation.len());
    // More documents move none of the old ones to the other side.
    let b = split(1500, 0.05, 7).unwrap();
    assert_eq!(a.validation, b.validation.into_iter().filter(|&i| i < 1000).collect::<Vec<_>>());
}

#[test]
fn both_sides_have_a_document() {
    for seed in 0..50 {
        for fraction in [1e-9, 0.05, 0.95, 1.0 - 1e-9] {
            for count in [2, 3] {
                let s = split(count, fraction, seed).unwrap();
                assert!(!s.train.is_empty() && !s.validation.is_empty());
                assert_eq!(s.train.len() + s.validation.len(), count);
            }
        }
    }
}

#[test]
fn split_errors() {
    let error = |count, fraction| split(count, fraction, 0).unwrap_err().to_string();
    assert!(error(1, 0.05).contains("corpus is too short: expected at least 2 documents"));
    assert!(error(0, 0.05).contains("corpus is empty"));
    for fraction in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(error(9, fraction).contains("held-out fraction"));
    }
}

#[test]
fn stream_ends_each_document_and_ignores_threads() {
    let documents: Vec<String> = (0..50).map(|i| format!("document {i} says {} times hello 你好", i * i)).collect();
    let tokenizer = Tokenizer::train(&documents, 280).unwrap();
    let make = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| TokenStream::new(&tokenizer, &documents)).unwrap()
    };
    let one = make(1);
    assert_eq!(one, make(2));
    assert_eq!(one, make(5));
    let eos = tokenizer.eos().unwrap();
    let parts: Vec<&[u32]> = one.tokens.split(|&t| t == eos).collect();
    assert_eq!(parts.len(), 51);
    assert_eq!(tokenizer.decode(parts[7], false), documents[7]);
    assert!(parts[50].is_empty());
    let lengths = tokenizer.token_byte_lengths();
    assert_eq!(one.bytes, one.tokens.iter().map(|&t| u64::from(lengths[t as usize])).sum::<u64>());
    assert!(matches!(TokenStream::new(&tokenizer, &[] as &[&str]), Err(DataError::EmptyCorpus)));
}

#[test]
fn stream_needs_an_end_token() {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::train(&["abab"], 267).unwrap().save(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert!(TokenStream::new(&tokenizer, &["abab"]).unwrap_err().to_string().contains("eos_token"));
}

#[test]
fn an_epoch_visits_each_window_once() {
    let loader = Loader::new(stream(1000), 8, 3).unwrap();
    assert_eq!(loader.windows(), 124);
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let order: Vec<u32> = (0..124).map(|i| loader.sample(epoch * 124 + i)[0] / 8).collect();
        assert_eq!(order.iter().copied().collect::<BTreeSet<_>>(), (0..124).collect());
        orders.push(order);
    }
    assert_ne!(orders[0], orders[1]);
    assert_ne!(orders[1], orders[2]);
    assert_ne!(orders[0], (0..124).collect::<Vec<_>>());
    let sample = loader.sample(5);
    assert_eq!(sample, (sample[0]..=sample[0] + 8).collect::<Vec<_>>());
}

/// Any order of asking, any number of threads and a new loader give the same samples.
#[test]
fn samples_are_a_pure_function() {
    let make = |seed| Loader::new(stream(333), 10, seed).unwrap();
    let loader = make(1);
    let expected: Vec<_> = (0..200).map(|i| loader.sample(i)).collect();
    let fresh = make(1);
    for i in (0..200).rev() {
        assert_eq!(fresh.sample(i), expected[i as usize]);
    }
    thread::scope(|scope| {
        for t in 0..5u64 {
            let (fresh, expected) = (&fresh, &expected);
            scope.spawn(move || {
                for i in 0..200 {
                    let i = (i * 37 + t * 61) % 200;
                    assert_eq!(fresh.sample(i), expected[i as usize]);
                }
            });
        }
    });
    let other = make(2);
    assert!((0..33).any(|i| other.sample(i) != expected[i as usize]));
}

#[test]
fn loader_at_the_edges() {
    assert_eq!(Loader::new(stream(9), 8, 0).unwrap().sample(17), (0..9).collect::<Vec<_>>());
    assert_eq!(Loader::new(stream(17), 8, 0).unwrap().windows(), 2);
    assert_eq!(Loader::new(stream(16), 8, 0).unwrap().windows(), 1);
    let error = Loader::new(stream(8), 8, 0).err().unwrap().to_string();
    assert!(error.contains("expected at least 9 tokens, found 8"), "{error}");
}

#[test]
fn validation_windows_predict_each_token_once() {
    for (len, seq_len) in [(0, 4), (1, 4), (2, 4), (5, 4), (6, 4), (9, 4), (100, 7), (3, 1)] {
        let stream = stream(len);
        let windows: Vec<&[u32]> = stream.validation_windows(seq_len).collect();
        let targets: Vec<u32> = windows.iter().flat_map(|w| w[1..].iter().copied()).collect();
        assert_eq!(targets, (1..len.max(1)).collect::<Vec<_>>(), "{len} {seq_len}");
        assert!(windows.iter().all(|w| (2..=seq_len + 1).contains(&w.len())));
    }
}
