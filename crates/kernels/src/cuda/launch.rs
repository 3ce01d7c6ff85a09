//! Kernels by name, and launching them.

use super::driver::check;
use super::{Cuda, TensorMap, compile};
use crate::DType;
use cudarc::driver::sys;
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// CUDA C++ of one file, and what it stands on.
pub(crate) struct Source {
    /// For messages and names of files.
    pub name: &'static str,
    /// What comes before it, in order.
    pub heads: &'static [&'static str],
    /// The file.
    pub text: &'static str,
}

impl Source {
    /// The file's name without its end.
    pub fn stem(&self) -> &'static str {
        self.name.trim_end_matches(".cu")
    }

    /// All that the compiler gets. Macros are lines of it, not options: those would reach the compiler's own templates,
    /// whose parameters have such names too.
    pub fn whole(&self, defines: &str) -> String {
        format!("{}{defines}#line 1 \"{}\"\n{}", self.heads.concat(), self.name, self.text)
    }
}

/// The source of a file beside the calling one: after the prelude, and after the helpers for mma.sync or for Hopper if
/// `mma` or `sm90` says so.
macro_rules! source {
    ($file:literal $(, $head:path)?) => {
        $crate::cuda::Source { name: $file, heads: &[$crate::cuda::PRELUDE $(, $head)?], text: include_str!($file) }
    };
    (mma, $file:literal) => {
        $crate::cuda::source!($file, $crate::cuda::MMA)
    };
    (sm90, $file:literal) => {
        $crate::cuda::source!($file, $crate::cuda::SM90)
    };
}
pub(crate) use source;

/// What a source's macro stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Value {
    /// A number.
    Int(i64),
    /// `float`, `bf16` or `int`.
    Type(DType),
}

impl Value {
    fn text(self) -> String {
        match self {
            Self::Int(i) => i.to_string(),
            Self::Type(DType::F32) => "float".into(),
            Self::Type(DType::Bf16) => "bf16".into(),
            Self::Type(DType::I32) => "int".into(),
        }
    }
}

/// Macros as lines of a source.
fn lines(defines: &[(&'static str, Value)]) -> String {
    defines.iter().map(|(name, value)| format!("#define {name} {}\n", value.text())).collect()
}

/// A function on one device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
}

// SAFETY: a handle of the driver; functions live as long as their module, which is never unloaded.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// How many threads, with what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    blocks: [u32; 3],
    threads: u32,
    shared: u32,
    cluster: u32,
    early: bool,
}

impl Grid {
    /// Blocks in three dimensions, threads in one.
    pub fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self { blocks, threads, shared: 0, cluster: 1, early: false }
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// Blocks of a cluster, along the first dimension.
    #[allow(dead_code, reason = "kernels of one block a cluster are the common case")]
    pub fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }

    /// The kernel may begin before the launch before it has ended, as it waits itself (`wait_for_previous` in
    /// `sm90.cuh`) before it touches memory that others write or read. A copy or a filling of memory before it ends
    /// first. From compute capability 9.0.
    pub fn early(self) -> Self {
        Self { early: true, ..self }
    }
}

/// An argument of a kernel, as its bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Arg([u64; 16]);

macro_rules! arg {
    ($($T:ty),*) => {$(
        impl From<$T> for Arg {
            fn from(x: $T) -> Self {
                let mut words = [0u64; 16];
                bytemuck::bytes_of_mut(&mut words)[..size_of::<$T>()].copy_from_slice(&x.to_ne_bytes());
                Self(words)
            }
        }
    )*};
}
arg!(u64, i64, u32, i32, f32);

impl From<TensorMap> for Arg {
    fn from(map: TensorMap) -> Self {
        Self(map.0)
    }
}

/// The arguments of a launch, in the kernel's order and types.
macro_rules! args {
    ($($x:expr),* $(,)?) => { [$($crate::cuda::Arg::from($x)),*] };
}
pub(crate) use args;

type Key = (&'static str, &'static str, Vec<(&'static str, Value)>);

/// What a device has loaded.
#[derive(Default)]
pub(super) struct Kernels {
    loaded: Mutex<HashMap<Key, Kernel>>,
    notice: OnceLock<String>,
    #[cfg(test)]
    wanted: Mutex<Wanted>,
}

/// A source's name and its macros as lines; the source, and functions of the two.
#[cfg(test)]
pub(super) type Module = ((&'static str, String), (&'static Source, Vec<&'static str>));

/// What was asked of a device that is not there.
#[cfg(test)]
pub(super) type Wanted = std::collections::BTreeMap<(&'static str, String), (&'static Source, Vec<&'static str>)>;

/// Modules of the process: a device that is opened twice loads a kernel once.
type Modules = Mutex<HashMap<(usize, &'static str, String), usize>>;
static MODULES: OnceLock<Modules> = OnceLock::new();

/// Bytes of shared memory that functions may have: a function's attribute, so the process's and not a device's.
static LARGE: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernels {
    /// Why compiled kernels are not kept, if they are not.
    pub fn notice(&self) -> Option<String> {
        self.notice.get().cloned()
    }
}

/// Wait after every launch, so that an error shows where it happens.
pub(super) fn sync_each() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var_os("HADAL_CUDA_SYNC").is_some_and(|v| v == "1"))
}

impl Cuda {
    /// The function `name` of a source whose macros have these values; compiled at its first use.
    pub(crate) fn kernel(
        &self,
        source: &'static Source,
        name: &'static str,
        defines: &[(&'static str, Value)],
    ) -> Kernel {
        let key = (source.name, name, defines.to_vec());
        if let Some(kernel) = lock(&self.kernels.loaded).get(&key) {
            return *kernel;
        }
        if self.dry {
            #[cfg(test)]
            self.want(source, name, defines);
            return Kernel { function: std::ptr::null_mut(), name };
        }
        self.bind();
        let module = self.module(source, defines) as sys::CUmodule;
        let mut function = std::ptr::null_mut();
        let symbol = CString::new(name).unwrap_or_else(|_| panic!("a kernel's name holds a zero: {name:?}"));
        // SAFETY: the module is loaded and never unloaded; the name ends in zero.
        let found = unsafe { sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
        if let Err(e) = check(found) {
            panic!("{} has no kernel {name}: {e}", source.name);
        }
        let kernel = Kernel { function, name };
        lock(&self.kernels.loaded).insert(key, kernel);
        kernel
    }

    #[cfg(test)]
    fn want(&self, source: &'static Source, name: &'static str, defines: &[(&'static str, Value)]) {
        let mut wanted = lock(&self.kernels.wanted);
        let (_, names) = wanted.entry((source.name, lines(defines))).or_insert((source, Vec::new()));
        if !names.contains(&name) {
            names.push(name);
        }
    }

    /// What was asked of a device that is not there.
    #[cfg(test)]
    pub(super) fn wanted(&self) -> Wanted {
        std::mem::take(&mut lock(&self.kernels.wanted))
    }

    fn module(&self, source: &'static Source, defines: &[(&'static str, Value)]) -> usize {
        // wgmma and setmaxnreg belong to the architecture-specific target.
        let options = compile::options(self.arch, self.has_wgmma());
        let defines = lines(defines);
        let key = (self.ordinal, source.name, defines.clone());
        let mut modules = lock(MODULES.get_or_init(Mutex::default));
        if let Some(&module) = modules.get(&key) {
            return module;
        }
        let name = source.stem();
        let (code, unkept) = compile::cubin(name, &source.whole(&defines), &options);
        if let Some(why) = unkept {
            let _ = self.kernels.notice.set(format!("compiled kernels are not kept for the next run: {why}"));
        }
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin in memory that outlives the call; the driver checks it.
        let loaded = unsafe { sys::cuModuleLoadData(&mut module, code.as_ptr().cast()) };
        if check(loaded).is_err() {
            self.check(&format!("loading the kernels of {name}"), loaded);
        }
        modules.insert(key, module as usize);
        module as usize
    }

    /// Gives the device one launch. The arguments must be those of the kernel, in type and order, and point to memory
    /// that the kernel may use as it does: what the ops' asserts are for.
    pub(crate) fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        if grid.blocks.contains(&0) {
            return;
        }
        self.recent().kernel(kernel.name, grid.blocks);
        if self.dry {
            return;
        }
        self.bind();
        self.allow_shared(kernel, grid.shared);
        let mut pointers: Vec<*mut std::ffi::c_void> =
            args.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
        // SAFETY: structures of numbers and handles, for which zeros are valid.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut given = 0;
        if grid.cluster > 1 {
            attributes[given].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
            attributes[given].value.clusterDim = size;
            given += 1;
        }
        if grid.early {
            attributes[given].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[given].value.programmaticStreamSerializationAllowed = 1;
            given += 1;
        }
        let [x, y, z] = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: self.stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: given as u32,
        };
        // SAFETY: every argument is at least as large as the kernel's parameter and lives through the call, which
        // copies it; what the kernel does with memory is the contract above.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, kernel.function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        if check(result).is_err() {
            self.check(&format!("launching {} on {grid:?}", kernel.name), result);
        }
        self.launched();
    }

    /// Behind every launch: the wait that somebody may have asked for. A recording launches nothing to wait for.
    pub(super) fn launched(&self) {
        if sync_each() && !self.recording.load(Ordering::Relaxed) {
            self.synchronize();
        }
    }

    /// More shared memory than every kernel may have needs to be asked for, once.
    fn allow_shared(&self, kernel: &Kernel, bytes: u32) {
        const EVERY: u32 = 48 << 10;
        if bytes <= EVERY {
            return;
        }
        let mut large = lock(&LARGE);
        let allowed = large.entry(kernel.function as usize).or_insert(EVERY);
        if *allowed < bytes {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(kernel.function, which, bytes as i32) };
            self.check(&format!("allowing {} {bytes} bytes of shared memory", kernel.name), result);
            *allowed = bytes;
        }
    }
}
