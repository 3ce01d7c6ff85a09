//! The load counted from the choice itself, without any offset.

/// Tokens that chose each of `experts`.
pub fn load(indices: &[i32], experts: usize) -> Vec<i32> {
    (0..experts as i32).map(|e| indices.iter().filter(|&&i| i == e).count() as i32).collect()
}
