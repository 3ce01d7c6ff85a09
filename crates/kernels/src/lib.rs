//! The closed set of operations that a DeepSeek model needs, each a plain function with an argument struct, a scalar
//! reference, a CPU path, a CUDA path, and one `match` on the device. No tensor library, no tape: the model calls these by hand.
//!
//! Shape legend used by every op: `N` tokens of a packed batch, `S` sequences, `D` hidden size, `H` heads,
//! `P` qk_nope_head_dim, `R` qk_rope_head_dim, `W` v_head_dim, `C` kv_lora_rank, `E` experts, `K` experts per token,
//! `F` expert width, `V` vocabulary. All matrices are row-major.

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "what AVX-512 and AMX alone use is compiled everywhere and called on x86-64")
)]

mod buffer;
pub mod cuda;
mod device;
mod isa;
mod math;
mod memory;
pub mod ops;
mod panel;
pub mod peak;
mod profile;
mod sizes;
#[cfg(test)]
mod testing;

pub use buffer::{AlignedVec, Buf, DType, Elem, Pod, View, ViewMut, Weight};
pub use device::{Cpu, Ctx, Device, DeviceError, Download, Mark, Workers};
pub use hadal_numerics::bf16;
pub use isa::{Isa, Level};
pub use memory::InUse;
pub use profile::{Op, Profile, Spent};
