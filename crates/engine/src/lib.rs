//! Inference on token ids over the paged latent cache: continuous batching with a scheduler and a block pool that are
//! pure functions of counts. Knows no text and prints nothing.
//!
//! Read in this order: `pool` (who holds which block), `scheduler` (which sequences advance), `batch` (one forward pass
//! out of them), `engine` (the loop), `logits` (the same numbers without a cache), `plan` (what all of it takes on a GPU).

mod batch;
mod cache;
mod engine;
mod error;
mod logits;
pub mod plan;
pub mod pool;
mod request;
pub mod scheduler;
#[cfg(test)]
mod tests;

pub use cache::block_bytes;
pub use engine::{CacheOptions, Engine, Usage};
pub use error::EngineError;
pub use logits::logits_uncached;
pub use request::{Event, Finish, Request};
