//! Documents: from text files, or from our generator.

pub mod builtin;
mod text;

pub use text::read_text;
