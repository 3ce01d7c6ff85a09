//! The built binary, run as a user runs it: what it prints, what it leaves on disk, how it refuses.

mod bad_arguments;
mod bad_data;
mod bad_models;
mod convert;
mod determinism;
mod inference;
mod pretrain;
mod support;
