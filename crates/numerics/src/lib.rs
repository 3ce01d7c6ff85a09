//! Number formats, counter-based randomness and what "close" means: everything that knows bit patterns.

mod compare;
mod rng;

pub use compare::{Closeness, Tolerance, close, cosine};
pub use half::bf16;
pub use rng::{Purpose, Rng};
