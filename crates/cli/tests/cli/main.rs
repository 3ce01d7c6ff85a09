//! The built binary, run as a user runs it: what it prints, what it leaves on disk, how it refuses.

mod bad_arguments;
mod bad_data;
mod bad_models;
mod bench;
mod convert;
mod data;
mod demo;
mod determinism;
mod device;
#[cfg(target_os = "linux")]
mod device_failure;
mod inference;
mod pretrain;
mod resume;
mod settings;
mod support;
