//! Number formats, counter-based randomness and what "close" means: everything that knows bit patterns. Tests of all
//! crates also find here how they say that they did not run.

pub mod block;
mod compare;
pub mod e4m3;
mod rng;
mod skip;
pub mod ue8m0;

pub use compare::{Closeness, Tolerance, close, cosine};
pub use half::bf16;
pub use rng::{Purpose, Rng};
pub use skip::skipped;
