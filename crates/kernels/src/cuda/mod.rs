//! NVIDIA GPUs. The driver and NVRTC are loaded at run time; kernels are CUDA C++ in this binary, compiled for the GPU
//! found at their first use and kept on disk. A device has one stream: whatever it is given runs in order, so that
//! memory may be used again as soon as the host lets go of it, and nothing here waits unless it says so.
//!
//! A step that is to be captured as a graph must not wait, read device memory on the host or take new memory from the
//! driver; [`Cuda::waits`] counts what did.

mod blas;
mod compile;
#[cfg(test)]
mod compiled;
mod driver;
mod error;
#[cfg(test)]
mod fault;
mod graph;
mod launch;
mod memory;
mod pinned;
mod recent;
#[cfg(test)]
mod small_shapes;
mod tensor_map;
#[cfg(test)]
mod tests;

pub(crate) use blas::{Operand, Product};
pub use error::{GpuError, is_failure};
pub use graph::Graph;
pub(crate) use launch::{Arg, Grid, Kernel, Source, Value, args, source};
pub use memory::{CudaBuf, CudaView, CudaViewMut, MemoryUse};
pub use pinned::Pending;
pub(crate) use tensor_map::{Swizzle, TensorMap};

use crate::sizes::Named;
use crate::{Buf, Cpu, DType, Profile, View, ViewMut};
use cudarc::driver::sys;
pub use driver::Event;
use driver::{Stream, check};
use launch::Kernels;
use memory::Arena;
use pinned::Pinned;
use recent::Recent;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What every kernel's source begins with.
pub(crate) const PRELUDE: &str = include_str!("prelude.cuh");
/// Products by mma.sync.
pub(crate) const MMA: &str = include_str!("mma.cuh");
/// Hopper's own instructions.
pub(crate) const SM90: &str = include_str!("sm90.cuh");

/// One GPU as hadal uses it: its primary context, a stream, an arena of its memory, compiled kernels.
pub struct Cuda {
    /// Itself, for buffers.
    this: std::sync::Weak<Self>,
    host: Arc<Cpu>,
    ordinal: usize,
    name: String,
    arch: (u32, u32),
    sms: u32,
    total: usize,
    context: sys::CUcontext,
    /// It only counts what a GPU's memory would hold.
    dry: bool,
    stream: Stream,
    arena: Arc<Mutex<Arena>>,
    pinned: Arc<Pinned>,
    kernels: Kernels,
    blas: blas::Blas,
    constants: Mutex<HashMap<Vec<u32>, CudaBuf>>,
    /// See [`Cuda::counters`].
    counters: Mutex<HashMap<usize, CudaBuf>>,
    invariant: AtomicBool,
    /// Kernels for older GPUs are to be used.
    plain: AtomicBool,
    /// A graph is being recorded.
    recording: AtomicBool,
    counts: Counts,
    /// See [`Cuda::advise`].
    less: OnceLock<&'static str>,
    recent: Mutex<Recent>,
    pub(crate) profile: OnceLock<Profile>,
}

/// What a device is.
struct Found {
    ordinal: usize,
    name: String,
    arch: (u32, u32),
    sms: u32,
    total: usize,
    context: sys::CUcontext,
    dry: bool,
}

/// What made the host wait for the device, and what it was sent, since the device was opened.
#[derive(Debug, Default)]
struct Counts {
    waits: AtomicU64,
    blocking_copies: AtomicU64,
    downloaded: AtomicU64,
    replays: AtomicU64,
}

// SAFETY: the context and the stream are handles of the driver, which may be used from any thread that has made the
// context current, as `bind` does before every call; all other state is behind locks or atomic.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({}: {})", self.ordinal, self.name)
    }
}

impl Cuda {
    /// Opens GPU `ordinal`, with the host's cores beside it.
    pub fn open(ordinal: usize, host: Arc<Cpu>) -> Result<Arc<Self>, GpuError> {
        let device = driver::device(ordinal)?;
        let context = driver::primary_context(device)?;
        let name = driver::name(device)?;
        let arch = driver::arch(device)?;
        if arch.0 < 8 {
            return Err(GpuError::OldGpu { name, major: arch.0, minor: arch.1 });
        }
        compile::present()?;
        let stream = Stream::new()?;
        let sms = driver::attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let total = driver::total_memory(device)?;
        let found = Found { ordinal, name, arch, sms, total, context, dry: false };
        Ok(Self::of(found, stream, Arena::default(), host))
    }

    /// A GPU that is not there: operations do nothing but take memory and give it back, of which there is no end. What
    /// a step holds is so counted by the step itself. Like the GPU `like`, or an H200.
    pub fn dry(like: Option<&Cuda>, host: Arc<Cpu>) -> Arc<Self> {
        let (arch, sms, total) = like.map_or((Self::HOPPER, Self::SMS, usize::MAX), |g| (g.arch, g.sms, g.total));
        let name = like.map_or("NVIDIA H200", |g| &g.name).to_string();
        Self::dry_as(name, arch, sms, total, host)
    }

    /// As [`Cuda::dry`], of these properties.
    fn dry_as(name: String, arch: (u32, u32), sms: u32, total: usize, host: Arc<Cpu>) -> Arc<Self> {
        let context = std::ptr::null_mut();
        let found = Found { ordinal: 0, name, arch, sms, total, context, dry: true };
        let cuda = Self::of(found, Stream::none(), Arena::endless(), host);
        // One piece without end.
        cuda.reserve(1 << 46);
        cuda
    }

    /// What a dry GPU is like by default.
    const HOPPER: (u32, u32) = (9, 0);
    const SMS: u32 = 132;

    fn of(found: Found, stream: Stream, arena: Arena, host: Arc<Cpu>) -> Arc<Self> {
        let Found { ordinal, name, arch, sms, total, context, dry } = found;
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            host,
            ordinal,
            name,
            arch,
            sms,
            total,
            context,
            dry,
            stream,
            arena: Arc::new(Mutex::new(arena)),
            pinned: Arc::default(),
            kernels: Kernels::default(),
            blas: blas::Blas::default(),
            constants: Mutex::default(),
            counters: Mutex::default(),
            invariant: AtomicBool::new(false),
            plain: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            counts: Counts::default(),
            less: OnceLock::new(),
            recent: Mutex::default(),
            profile: OnceLock::new(),
        })
    }

    /// How many GPUs there are; 0 without a driver, an error where there is one that does not work.
    pub fn count() -> Result<usize, GpuError> {
        match driver::count() {
            Err(GpuError::NoDriver) => Ok(0),
            counted => counted,
        }
    }

    /// The host's cores beside it.
    pub fn host(&self) -> &Arc<Cpu> {
        &self.host
    }

    /// The GPU's name, as its driver says it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which of the machine's GPUs it is.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Compute capability.
    pub fn arch(&self) -> (u32, u32) {
        self.arch
    }

    /// Streaming multiprocessors.
    pub fn sms(&self) -> u32 {
        self.sms
    }

    /// Bytes of its memory.
    pub fn total_memory(&self) -> usize {
        self.total
    }

    /// Bytes that the driver could still give.
    pub fn free_memory(&self) -> usize {
        if self.dry {
            return usize::MAX;
        }
        self.bind();
        driver::memory_info().map_or(self.total, |(free, _)| free)
    }

    /// As [`Cuda::free_memory`], with what the driver gave already and nothing is in: what a run has left when it is over.
    pub fn available_memory(&self) -> usize {
        let held = self.memory();
        self.free_memory().saturating_add(held.taken - held.used)
    }

    /// Hopper, the one architecture with wgmma.
    pub(crate) fn has_wgmma(&self) -> bool {
        self.arch.0 == 9 && !self.plain.load(Ordering::Relaxed)
    }

    /// Takes the kernels for older GPUs from now on: on Hopper, where they are tested.
    pub fn set_plain(&self) {
        self.plain.store(true, Ordering::Relaxed);
    }

    /// Whether matrix products must give a row the same bits whatever the other rows are.
    pub fn invariant(&self) -> bool {
        self.invariant.load(Ordering::Relaxed)
    }

    /// Turns batch invariance of matrix products on or off; inference has it on.
    pub fn set_invariant(&self, on: bool) {
        self.invariant.store(on, Ordering::Relaxed);
    }

    /// Times that the host waited for the device, and copies that made it wait.
    pub fn waits(&self) -> (u64, u64) {
        (self.counts.waits.load(Ordering::Relaxed), self.counts.blocking_copies.load(Ordering::Relaxed))
    }

    /// Bytes that were copied to the host, those of replayed steps left out.
    pub fn downloaded(&self) -> u64 {
        self.counts.downloaded.load(Ordering::Relaxed)
    }

    /// Times that a graph was replayed.
    pub fn replays(&self) -> u64 {
        self.counts.replays.load(Ordering::Relaxed)
    }

    /// What a user should know about this device, if anything.
    pub fn notice(&self) -> Option<String> {
        let all: Vec<String> = [self.kernels.notice(), self.blas.notice()].into_iter().flatten().collect();
        (!all.is_empty()).then(|| all.join("\n"))
    }

    /// Whether steps may be recorded: not while somebody wants the time of every operation, or a wait behind each.
    pub fn may_record(&self) -> bool {
        self.profile.get().is_none() && !self.dry && !launch::sync_each()
    }

    /// Panics while a graph is recorded, whose replays would not do what is asked for (a contract breach).
    fn not_recorded(&self, what: &str) {
        assert!(!self.recording.load(Ordering::Relaxed), "{what} in the midst of a step that is being recorded");
    }

    /// Makes the device's context the calling thread's.
    fn bind(&self) {
        if self.dry {
            return;
        }
        // SAFETY: the context was retained when the device was opened and is never released.
        self.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) });
    }

    /// Ends what is going on, with a message for the user, if the driver reports an error.
    fn check(&self, what: &str, result: sys::CUresult) {
        if let Err(e) = check(result) {
            self.fail(&format!("{what}: {e}"));
        }
    }

    /// Ends what is going on with a message that names what the device was given last: whatever reports an error, that
    /// may be what caused it.
    fn fail(&self, what: &str) -> ! {
        let recent = self.recent().describe(launch::sync_each());
        error::fail(format!("GPU {} ({}): {what}{recent}", self.ordinal, self.name))
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An op begins, with arguments of these sizes, which ends at [`Cuda::op_ends`]: for the message of an error.
    pub(crate) fn op_begins(&self, op: &'static str, sizes: &[Named]) {
        self.recent().begin(op, sizes);
    }

    /// The op that began last is over.
    pub(crate) fn op_ends(&self) {
        self.recent().end();
    }

    /// Waits until the device has done all that it was given.
    pub fn synchronize(&self) {
        self.not_recorded("waiting for the device");
        if self.dry {
            return;
        }
        self.bind();
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the stream lives as long as the device.
        self.check("waiting for the device", unsafe { sys::cuStreamSynchronize(self.stream.raw()) });
    }

    /// Takes one piece of `bytes` from the driver for all that is to come, so that a run knows at its start whether its
    /// memory is there.
    pub fn reserve(&self, bytes: usize) {
        self.bind();
        let taken = memory::lock(&self.arena).reserve(bytes);
        if let Err(e) = taken {
            self.no_memory(bytes, &e);
        }
    }

    /// What of its memory is held.
    pub fn memory(&self) -> MemoryUse {
        memory::lock(&self.arena).counts()
    }

    /// Ends what is going on for want of memory, or for what failed before.
    fn no_memory(&self, bytes: usize, e: &driver::DriverError) -> ! {
        if e.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.fail(&format!("taking {bytes} bytes of memory: {e}"));
        }
        error::fail(self.shortage(bytes, driver::memory_info().unwrap_or((0, self.total)), &e.to_string()))
    }

    /// What the user is told when `bytes` are not to be had.
    fn shortage(&self, bytes: usize, (free, total): (usize, usize), why: &str) -> String {
        let used = self.memory().used;
        let gib = |b: usize| b as f64 / (1u64 << 30) as f64;
        format!(
            "GPU {} ({}): {:.2} GiB wanted, {:.2} GiB in use by this process, {:.2} of {:.2} GiB free ({why}); {}",
            self.ordinal,
            self.name,
            gib(bytes),
            gib(used),
            gib(free),
            gib(total),
            self.less.get().unwrap_or(&Self::LESS_IN_TRAINING)
        )
    }

    /// What takes less memory, unless [`Cuda::advise`] has said something else.
    const LESS_IN_TRAINING: &str = "a smaller batch, a shorter sequence or recompute = \"all\" needs less: `hadal inspect \
                                    --device cuda` predicts how much";

    /// Sets what the user is told, once memory runs out, that would take less of it; the first word holds.
    pub fn advise(&self, less: &'static str) {
        let _ = self.less.set(less);
    }

    /// `len` elements of whatever value; with debug assertions NaN or -1. The memory is the device's again when the
    /// buffer is dropped: what was launched before then may still use it, what is launched later comes later.
    pub(crate) fn empty(&self, dtype: DType, len: usize) -> Buf {
        let buf = self.allocate(dtype, len);
        if cfg!(debug_assertions) {
            self.fill(buf.ptr(), 0xff, len * dtype.size());
        }
        Buf::Cuda(buf)
    }

    /// As [`Cuda::empty`], for what is overwritten at once.
    pub(crate) fn uninit(&self, dtype: DType, len: usize) -> Buf {
        Buf::Cuda(self.allocate(dtype, len))
    }

    /// `len` zeros.
    pub(crate) fn zeros(&self, dtype: DType, len: usize) -> Buf {
        let buf = self.allocate(dtype, len);
        self.fill(buf.ptr(), 0, len * dtype.size());
        Buf::Cuda(buf)
    }

    fn allocate(&self, dtype: DType, len: usize) -> CudaBuf {
        self.bind();
        let Some(bytes) = len.checked_mul(dtype.size()) else {
            error::fail(format!("a buffer of {len} elements does not fit the address space"))
        };
        let ptr = memory::lock(&self.arena).take(bytes);
        match ptr {
            Ok(ptr) => CudaBuf::new(self, ptr, len, dtype),
            Err(e) => self.no_memory(bytes, &e),
        }
    }

    fn fill(&self, ptr: u64, byte: u8, bytes: usize) {
        if bytes > 0 && !self.dry {
            self.bind();
            // SAFETY: callers pass memory of a live buffer of at least so many bytes.
            self.check("filling memory", unsafe { sys::cuMemsetD8Async(ptr, byte, bytes, self.stream.raw()) });
        }
    }

    /// Makes every element of four bytes this word.
    pub(crate) fn fill_words(&self, mut v: ViewMut<'_>, word: u32) {
        assert_eq!(v.dtype().size(), 4, "words in {v:?}");
        if !v.is_empty() && !self.dry {
            self.bind();
            // SAFETY: the view holds so many words.
            let result = unsafe { sys::cuMemsetD32Async(v.ptr(), word, v.len(), self.stream.raw()) };
            self.check("filling memory", result);
        }
    }

    /// Makes every byte zero.
    pub(crate) fn zero(&self, mut v: ViewMut<'_>) {
        self.fill(v.ptr(), 0, v.len() * v.dtype().size());
    }

    /// Copies elements of one dtype within the device.
    pub fn copy(&self, from: View<'_>, mut to: ViewMut<'_>) {
        assert!(from.len() == to.len() && from.dtype() == to.dtype(), "a copy of {from:?} to {to:?}");
        let bytes = from.len() * from.dtype().size();
        if bytes > 0 && !self.dry {
            self.bind();
            // SAFETY: both views hold so many bytes and cannot overlap, as one is borrowed to write.
            let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.ptr(), from.ptr(), bytes, self.stream.raw()) };
            self.check("copying memory", result);
        }
    }

    /// A device copy of words that never change, uploaded once for each content: tables that launches read.
    pub(crate) fn constant(&self, words: &[u32]) -> u64 {
        let mut constants = self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buf) = constants.get(words) {
            return buf.ptr();
        }
        let buf = self.allocate(DType::I32, words.len());
        self.upload_bytes(bytemuck::cast_slice(words), buf.ptr());
        let ptr = buf.ptr();
        constants.insert(words.to_vec(), buf);
        ptr
    }

    /// `n` words that are zero between launches: a kernel that takes them finds zeros and leaves zeros. Launches of this
    /// stream follow one another, so that kernels share them; another `Cuda` of the same GPU has its own. The first call
    /// with an `n` uploads, and so cannot be within a recording.
    pub(crate) fn counters(&self, n: usize) -> u64 {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let words = counters.entry(n).or_insert_with(|| {
            let buf = self.allocate(DType::I32, n);
            self.upload_bytes(bytemuck::cast_slice(&vec![0u32; n]), buf.ptr());
            buf
        });
        words.ptr()
    }

    /// Words in device memory, without waiting.
    pub(crate) fn upload(&self, words: &[u32]) -> Buf {
        let buf = self.allocate(DType::I32, words.len());
        self.upload_bytes(bytemuck::cast_slice(words), buf.ptr());
        Buf::Cuda(buf)
    }

    /// Seconds that the device takes for what `f` gives it; waits for the end.
    pub fn time(&self, f: impl FnOnce()) -> f64 {
        let begin = self.mark();
        f();
        let end = self.mark();
        self.wait_for(&end);
        self.between(&begin, &end)
    }

    /// A mark behind all that the device was given so far.
    pub(crate) fn mark(&self) -> Event {
        let event = self.event();
        self.record(&event);
        event
    }

    /// A mark that can be placed in the stream.
    pub(crate) fn event(&self) -> Event {
        if self.dry {
            return Event::none();
        }
        self.bind();
        Event::new().unwrap_or_else(|e| self.fail(&format!("making an event: {e}")))
    }

    /// Places a mark behind all that the device was given.
    pub(crate) fn record(&self, event: &Event) {
        if self.dry {
            return;
        }
        self.bind();
        // SAFETY: both handles are alive.
        self.check("placing an event", unsafe { sys::cuEventRecord(event.raw(), self.stream.raw()) });
    }

    /// Waits for a mark.
    pub(crate) fn wait_for(&self, event: &Event) {
        if self.dry {
            return;
        }
        self.bind();
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the event is alive.
        self.check("waiting for the device", unsafe { sys::cuEventSynchronize(event.raw()) });
    }

    /// Seconds between two marks that have passed.
    pub(crate) fn between(&self, begin: &Event, end: &Event) -> f64 {
        let mut ms = 0.0f32;
        if self.dry {
            return 0.0;
        }
        // SAFETY: both events are alive and were recorded; the output is a local.
        self.check("reading events", unsafe { sys::cuEventElapsedTime_v2(&mut ms, begin.raw(), end.raw()) });
        f64::from(ms) * 1e-3
    }
}
