//! The norm in f64, element after element.

use std::ops::Range;

/// sqrt(sum of squares).
pub fn norm(grad: &[f64], tensors: &[Range<usize>]) -> f64 {
    let mut sum = 0.0;
    for t in tensors {
        for g in &grad[t.clone()] {
            sum += g * g;
        }
    }
    sum.sqrt()
}
