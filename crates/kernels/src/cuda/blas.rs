//! Dense products by cuBLASLt, which is loaded at run time; where it is missing, or has nothing for a product, the caller
//! has kernels of its own. An algorithm is the library's first proposal for a shape, never a matter of timing, so that
//! the same GPU with the same library gives the same bits. Scratch comes from the device's arena for each call.

use super::{Cuda, graph};
use crate::DType;
use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Most scratch that an algorithm may want.
const SCRATCH: u64 = 32 << 20;

/// A product that the library refused.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cuBLASLt: {doing} for {product}: {status:?}")]
pub(crate) struct BlasError {
    doing: &'static str,
    product: Product,
    status: Status,
}

/// A row-major operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub dtype: DType,
    /// Elements from one row to the next.
    pub ld: usize,
    /// Stored transposed.
    pub transposed: bool,
    /// Largest power of two, up to 256, that the address is a multiple of.
    pub align: u32,
}

impl Operand {
    /// An operand at an address.
    pub fn new(ptr: u64, dtype: DType, ld: usize, transposed: bool) -> Self {
        Self { dtype, ld, transposed, align: 1 << ptr.trailing_zeros().min(8) }
    }
}

/// `C[m, n]` (+)= op(A)`[m, k]` op(B)`[k, n]`: what an algorithm is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Operand,
    pub b: Operand,
    /// Never transposed.
    pub c: Operand,
    pub accumulate: bool,
}

impl std::fmt::Display for Product {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { m, n, k, a, b, c, .. } = self;
        let t = |o: &Operand| if o.transposed { "^T" } else { "" };
        let adds = if self.accumulate { "+=" } else { "=" };
        write!(f, "C [{m}, {n}] {adds} A{} B{}, k {k}, ", t(a), t(b))?;
        write!(f, "{:?} x {:?} -> {:?}, rows of {}, {}, {}", a.dtype, b.dtype, c.dtype, a.ld, b.ld, c.ld)
    }
}

/// The library on one device.
#[derive(Default)]
pub(super) struct Blas {
    handle: OnceLock<Option<Handle>>,
    notice: OnceLock<String>,
    plans: Mutex<HashMap<Product, Option<Arc<Plan>>>>,
}

impl Blas {
    /// Why the library is not used, if it is not.
    pub fn notice(&self) -> Option<String> {
        self.notice.get().cloned()
    }
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library allows its handle on any thread, also on several at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// For the current context; an error says why there is none.
    fn new() -> std::result::Result<Self, String> {
        // SAFETY: loads the library, whose start-up code is the vendor's.
        if !unsafe { sys::is_culib_present() } {
            return Err(
                "cuBLASLt is missing: libcublasLt.so is not on this system's library path; it comes with the CUDA \
                        toolkit or as the package nvidia-cublas, and its folder is named in LD_LIBRARY_PATH"
                    .into(),
            );
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let made = check(unsafe { sys::cublasLtCreate(&mut raw) });
        made.map(|()| Self(raw)).map_err(|status| format!("cuBLASLt does not start ({status:?})"))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _alone = graph::nobody_records();
        // SAFETY: made by `Cuda::blas_handle`, destroyed once.
        unsafe { sys::cublasLtDestroy(self.0) };
    }
}

macro_rules! descriptor {
    ($(#[$doc:meta])* $name:ident, $raw:ty, $destroy:ident) => {
        $(#[$doc])*
        struct $name($raw);

        // SAFETY: only read once it is made; the library may read it on any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by `new`, destroyed once.
                unsafe { sys::$destroy(self.0) };
            }
        }
    };
}
descriptor!(
    /// What is computed.
    Description,
    sys::cublasLtMatmulDesc_t,
    cublasLtMatmulDescDestroy
);
descriptor!(
    /// A matrix, column-major.
    Layout,
    sys::cublasLtMatrixLayout_t,
    cublasLtMatrixLayoutDestroy
);
descriptor!(
    /// What an algorithm may use.
    Preference,
    sys::cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceDestroy
);

type Result<T> = std::result::Result<T, Status>;

fn check(status: Status) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(status) }
}

impl Description {
    /// f32 sums, scaled by f32 numbers of the host; TF32 is another type of computation and is not asked for.
    fn new(transposed: [bool; 2]) -> Result<Self> {
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check(unsafe { sys::cublasLtMatmulDescCreate(&mut raw, compute, scale) })?;
        let made = Self(raw);
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let attributes = [Attribute::CUBLASLT_MATMUL_DESC_TRANSA, Attribute::CUBLASLT_MATMUL_DESC_TRANSB];
        for (which, t) in attributes.into_iter().zip(transposed) {
            // The numbers of CUBLAS_OP_N and CUBLAS_OP_T.
            let op = i32::from(t);
            // SAFETY: reads four bytes of a local.
            let set = unsafe {
                sys::cublasLtMatmulDescSetAttribute(made.0, which, std::ptr::from_ref(&op).cast(), size_of_val(&op))
            };
            check(set)?;
        }
        Ok(made)
    }
}

impl Layout {
    fn new(o: Operand, rows: usize, cols: usize) -> Result<Self> {
        let dtype = match o.dtype {
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::I32 => return Err(Status::CUBLAS_STATUS_NOT_SUPPORTED),
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle. What is row-major here is the transposed matrix column-major there.
        check(unsafe { sys::cublasLtMatrixLayoutCreate(&mut raw, dtype, cols as u64, rows as u64, o.ld as i64) })?;
        Ok(Self(raw))
    }
}

impl Preference {
    fn new(p: &Product) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check(unsafe { sys::cublasLtMatmulPreferenceCreate(&mut raw) })?;
        let made = Self(raw);
        let set = |which, value: &[u8]| {
            // SAFETY: reads as many bytes as the slice has.
            check(unsafe {
                sys::cublasLtMatmulPreferenceSetAttribute(made.0, which, value.as_ptr().cast(), value.len())
            })
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &SCRATCH.to_ne_bytes())?;
        // A and B change places, as C is computed transposed.
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &p.b.align.to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &p.a.align.to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &p.c.align.to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &p.c.align.to_ne_bytes())?;
        Ok(made)
    }
}

/// All that a product's call needs but addresses.
struct Plan {
    description: Description,
    a: Layout,
    b: Layout,
    c: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    scratch: usize,
}

impl Plan {
    /// None if the library has nothing for this product.
    fn new(handle: &Handle, p: &Product) -> Result<Option<Self>> {
        let stored = |o: Operand, rows, cols| if o.transposed { (o, cols, rows) } else { (o, rows, cols) };
        let layout = |(o, rows, cols)| Layout::new(o, rows, cols);
        let description = Description::new([p.b.transposed, p.a.transposed])?;
        let (a, b, c) = (layout(stored(p.b, p.k, p.n))?, layout(stored(p.a, p.m, p.k))?, layout((p.c, p.m, p.n))?);
        let preference = Preference::new(p)?;
        // SAFETY: a structure of numbers, for which zeros are valid.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: all handles are alive; at most one result is written.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle.0,
                description.0,
                a.0,
                b.0,
                c.0,
                c.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            )
        };
        if status == Status::CUBLAS_STATUS_NOT_SUPPORTED || status == Status::CUBLAS_STATUS_INVALID_VALUE {
            return Ok(None);
        }
        check(status)?;
        let usable = count > 0 && found.state == Status::CUBLAS_STATUS_SUCCESS;
        let (algorithm, scratch) = (found.algo, found.workspaceSize);
        Ok(usable.then_some(Self { description, a, b, c, algorithm, scratch }))
    }
}

impl Cuda {
    /// The library's handle; None where it is missing.
    fn blas_handle(&self) -> Option<&Handle> {
        let made = self.blas.handle.get_or_init(|| {
            let made = Handle::new();
            if let Err(why) = &made {
                let _ = self.blas.notice.set(format!("{why}: hadal's own kernels do its products, which takes longer"));
            }
            made.ok()
        });
        made.as_ref()
    }

    /// Whether cuBLASLt is there.
    pub fn has_blas(&self) -> bool {
        self.bind();
        self.blas_handle().is_some()
    }

    fn plan(&self, handle: &Handle, p: &Product) -> std::result::Result<Option<Arc<Plan>>, BlasError> {
        let mut plans = self.blas.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(p) {
            return Ok(plan.clone());
        }
        let made = Plan::new(handle, p).map_err(|status| BlasError { doing: "planning", product: *p, status })?;
        let plan = made.map(Arc::new);
        plans.insert(*p, plan.clone());
        Ok(plan)
    }

    /// The product of the matrices at these addresses by cuBLASLt. False if it was not done: the library is missing or
    /// has nothing for it.
    pub(crate) fn multiply(&self, p: &Product, a: u64, b: u64, c: u64) -> std::result::Result<bool, BlasError> {
        if self.dry {
            self.recent().library();
            // The most that an algorithm may take.
            drop(self.uninit(DType::F32, SCRATCH as usize / 4));
            return Ok(true);
        }
        self.bind();
        let Some(handle) = self.blas_handle() else { return Ok(false) };
        let Some(plan) = self.plan(handle, p)? else { return Ok(false) };
        let scratch = (plan.scratch > 0).then(|| self.uninit(DType::F32, plan.scratch.div_ceil(4)));
        let at = scratch.as_ref().map_or(0, |s| s.view().ptr());
        self.recent().library();
        let (one, beta) = (1.0f32, if p.accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: the handles are alive; the addresses are those of the caller's buffers, whose sizes its contract
        // asserts; the scratch lives until what is launched here comes before whatever uses its memory next.
        let status = unsafe {
            sys::cublasLtMatmul(
                handle.0,
                plan.description.0,
                std::ptr::from_ref(&one).cast(),
                b as *const _,
                plan.a.0,
                a as *const _,
                plan.b.0,
                std::ptr::from_ref(&beta).cast(),
                c as *const _,
                plan.c.0,
                c as *mut _,
                plan.c.0,
                &plan.algorithm,
                at as *mut _,
                plan.scratch,
                self.stream.raw().cast(),
            )
        };
        check(status).map_err(|status| BlasError { doing: "launching", product: *p, status })?;
        self.launched();
        Ok(true)
    }

    /// Ends what is going on with the library's message.
    pub(crate) fn blas_failed(&self, e: &BlasError) -> ! {
        self.fail(&e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operand_knows_its_alignment() {
        for (ptr, align) in [(1 << 20, 256), (512, 256), (0x100, 256), (0x130, 16), (6, 2), (7, 1), (0, 256)] {
            assert_eq!(Operand::new(ptr, DType::Bf16, 8, false).align, align, "{ptr:#x}");
        }
    }

    #[test]
    fn an_error_names_the_product() {
        let operand = |dtype, ld, transposed| Operand::new(256, dtype, ld, transposed);
        let product = Product {
            m: 2,
            n: 3,
            k: 4,
            a: operand(DType::Bf16, 4, false),
            b: operand(DType::Bf16, 5, true),
            c: operand(DType::F32, 6, false),
            accumulate: true,
        };
        let e = BlasError { doing: "launching", product, status: Status::CUBLAS_STATUS_EXECUTION_FAILED };
        let expected = "cuBLASLt: launching for C [2, 3] += A B^T, k 4, Bf16 x Bf16 -> F32, rows of 4, 5, 6: \
                        CUBLAS_STATUS_EXECUTION_FAILED";
        assert_eq!(e.to_string(), expected);
    }
}
