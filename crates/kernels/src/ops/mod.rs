//! The ops. `<op>/mod.rs` is the contract and the dispatch, `reference.rs` a scalar forward and backward in f64 written
//! to be believed and checked by finite differences, `cpu.rs` the path that uses all cores, `tests.rs` both against
//! each other over shared cases. Shapes that do not fit are a contract breach: an assert that prints them.

pub mod adamw;
pub mod add;
pub mod bias_update;
pub mod embedding;
pub mod expert_load;
pub mod gemm;
pub mod gemm_grouped;
pub mod grad_norm;
pub mod head_loss;
pub mod kv_store;
mod launch;
pub mod mla_decode;
pub mod mla_prefill;
pub mod moe_permute;
pub mod rmsnorm;
pub mod rope;
pub mod router;
pub mod rows;
pub mod sample;
pub mod seq_balance;
pub mod swiglu;

/// Runs an expression with `$T` bound to the activation type of a dtype.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::Bf16 => {
                type $T = $crate::bf16;
                $body
            }
            $crate::DType::I32 => panic!("expected a float buffer, found I32"),
        }
    };
}
pub(crate) use by_dtype;
