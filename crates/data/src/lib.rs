//! Text in, token windows out: the tokenizer (loading, training), the corpus (files or our generated one), shards of
//! tokens, and packing into the sequences a trainer asks for by number.
//!
//! This is the only crate that knows text. It knows nothing of models or devices: what leaves it are token ids and
//! byte counts. Everything here is a function of its inputs and a seed, whatever the number of threads.

pub mod corpus;
mod error;
pub mod pack;
pub mod shards;
pub mod tokenizer;

pub use error::DataError;
pub use pack::{Loader, TokenStream};
pub use tokenizer::Tokenizer;
