//! Checkpoints as Hugging Face lays them out: `config.json` beside `model.safetensors` or shards with an index. The
//! table of [`crate::Layout`] names every tensor; nothing here knows a name that it does not, but for the forms that
//! other writers use (experts fused into one tensor, MTP's copies of embedding and head).
//!
//! Files are read by position in bounded pieces rather than mapped: a file that another process cuts short is then an
//! error and not a signal, and no unsafe code is needed.

mod arena;
mod checkpoint;
mod convert;
mod error;
mod load;
mod save;
mod shard;
mod source;
#[cfg(test)]
mod tests;

pub use arena::read_arena;
pub use checkpoint::Checkpoint;
pub use convert::{ConvertObserver, ConvertOptions, Converted, Target, convert};
pub use error::IoError;
pub use save::{Manifest, SaveOptions, save_checkpoint, write_arena, write_extra, write_model};
