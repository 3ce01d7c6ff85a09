//! Descriptors for the bulk tensor copy engine of Hopper and later.

use super::Cuda;
use crate::DType;
use cudarc::driver::sys;

/// How rows of a tile are permuted in shared memory against bank conflicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "the engine's choices, whichever of them kernels make")]
pub(crate) enum Swizzle {
    /// Not at all.
    None,
    /// Within 32 bytes.
    B32,
    /// Within 64 bytes.
    B64,
    /// Within 128 bytes.
    B128,
}

/// A descriptor: 128 bytes, passed to a kernel by value.
#[derive(Clone, Copy)]
pub(crate) struct TensorMap(pub(super) [u64; 16]);

impl Cuda {
    /// A tensor at `ptr` of `dims` (innermost first), `strides` bytes apart along `dims[1..]`, copied in boxes of `tile`.
    /// What lies outside reads as zero and is not written. Address and strides are multiples of 16 bytes.
    pub(crate) fn tensor_map(
        &self,
        ptr: u64,
        dtype: DType,
        dims: &[u64],
        strides: &[u64],
        tile: &[u32],
        swizzle: Swizzle,
    ) -> TensorMap {
        assert!(
            dims.len() == tile.len() && strides.len() + 1 == dims.len(),
            "tensor map {dims:?} {strides:?} {tile:?}"
        );
        if self.dry {
            return TensorMap([0; 16]);
        }
        let dtype = match dtype {
            DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::I32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_INT32,
        };
        let swizzle = match swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let steps = vec![1u32; dims.len()];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays have `dims.len()` elements (strides one fewer), as the call reads them; it writes one map.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                dims.len() as u32,
                ptr as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        self.check(&format!("describing a tensor {dims:?} with strides {strides:?} in tiles {tile:?}"), result);
        TensorMap(map.opaque)
    }
}
