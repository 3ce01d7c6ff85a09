//! stub
/// x
pub fn documents(_seed: u64, _bytes: usize) -> Vec<String> {
    (0..300)
        .map(|i| format!("the {i} thing about {} and {} is that it is {}", i * 7, i * i, "not so".repeat(i % 5)))
        .collect()
}
