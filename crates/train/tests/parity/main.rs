//! What was computed elsewhere beside what is computed here: transformers' goldens, and a GPU beside CPUs. One program for
//! both, which is carried to machines with a GPU (`cargo xtask gpu-bundle`).

mod cuda;
mod golden;
#[path = "../support/mod.rs"]
mod support;
