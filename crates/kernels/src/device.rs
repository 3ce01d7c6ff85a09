//! The device that ops run on and the context that every op and stage takes. Nothing of a step is global: two
//! models live in one process, and the forward of one batch may interleave with the backward of another.

use crate::buffer::Pod;
use crate::cuda::Pending;
use crate::cuda::{Cuda, Event, GpuError};
use crate::memory::{InUse, Memory};
use crate::ops::rope::Turns;
use crate::{AlignedVec, Buf, DType, Isa, Level, Profile, View};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Why a device cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeviceError {
    /// A thread count of zero, or of more than any machine needs.
    #[error("--threads {found}: expected at least 1, at most {MAX_THREADS} (this machine has {cores} cores)")]
    ThreadCount {
        /// How many were asked for.
        found: usize,
        /// Cores of this machine.
        cores: usize,
    },
    /// The operating system refused threads.
    #[error("could not start {wanted} threads: {why}")]
    Threads {
        /// How many were asked for.
        wanted: usize,
        /// What the system said.
        why: String,
    },
    /// `HADAL_ISA` names no level of vector instructions.
    #[error("HADAL_ISA={0}: expected portable, avx2, avx512, avx512bf16 or amx")]
    UnknownIsa(String),
    /// `HADAL_ISA` names a level that this CPU lacks; the second is the widest it has.
    #[error("HADAL_ISA={0}: this CPU has no more than {1}")]
    MissingIsa(&'static str, &'static str),
    /// `HADAL_ISA` names AMX, which this CPU has and the kernel keeps from this process; the second is the widest that is
    /// left.
    #[error("HADAL_ISA={0}: this CPU has AMX, but the kernel refuses its use; expected no more than {1}")]
    RefusedIsa(&'static str, &'static str),
    /// A GPU cannot be had.
    #[error("--device {asked}: {why}")]
    Gpu {
        /// What was asked for: cuda or cuda:N.
        asked: String,
        /// Why not.
        why: GpuError,
    },
    /// `--device` names none.
    #[error("--device {0}: expected cpu, cuda or cuda:N")]
    Unknown(String),
}

/// Most workers. Starting many thousands takes minutes, and no kernel has work for them.
const MAX_THREADS: usize = 1024;

/// A device; cheap to clone.
#[derive(Clone, Debug)]
pub enum Device {
    /// The host's cores.
    Cpu(Arc<Cpu>),
    /// An NVIDIA GPU.
    Cuda(Arc<Cuda>),
}

/// The host's cores as a pool of `threads` workers.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    threads: usize,
    isa: Isa,
    memory: Arc<Memory>,
    pub(crate) profile: OnceLock<Profile>,
    pub(crate) turns: Turns,
}

/// The host's cores as far as it depends on them what operations take for themselves beside their arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workers {
    /// The vector instructions that they use.
    pub level: Level,
    /// How many there are.
    pub threads: usize,
}

impl Device {
    /// A CPU device with `threads` workers (None takes all cores), on the fastest vector instructions there are or
    /// those that the environment variable `HADAL_ISA` names.
    pub fn cpu(threads: Option<usize>) -> Result<Self, DeviceError> {
        Self::cpu_with(threads, Isa::from_env()?)
    }

    /// As [`Device::cpu`], on the vector instructions given.
    pub fn cpu_with(threads: Option<usize>, isa: Isa) -> Result<Self, DeviceError> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = threads.unwrap_or(cores.min(MAX_THREADS));
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(DeviceError::ThreadCount { found: threads, cores });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("hadal-{i}"))
            .build()
            .map_err(|e| DeviceError::Threads { wanted: threads, why: e.to_string() })?;
        let (memory, profile, turns) = (Arc::default(), OnceLock::new(), Turns::default());
        Ok(Self::Cpu(Arc::new(Cpu { pool, threads, isa, memory, profile, turns })))
    }

    /// GPU `ordinal`, with `threads` of the host's workers (None takes all cores) for what the host does.
    pub fn cuda(ordinal: usize, threads: Option<usize>) -> Result<Self, DeviceError> {
        Self::gpu(ordinal, &format!("cuda:{ordinal}"), threads)
    }

    fn gpu(ordinal: usize, asked: &str, threads: Option<usize>) -> Result<Self, DeviceError> {
        let host = Self::cpu(threads)?.host().clone();
        let opened = Cuda::open(ordinal, host);
        opened.map(Self::Cuda).map_err(|why| DeviceError::Gpu { asked: asked.into(), why })
    }

    /// The device that `name` (cpu, cuda or cuda:N) means.
    pub fn named(name: &str, threads: Option<usize>) -> Result<Self, DeviceError> {
        match name.split_once(':') {
            None if name == "cpu" => Self::cpu(threads),
            None if name == "cuda" => Self::gpu(0, name, threads),
            Some(("cuda", n)) if n.parse::<usize>().is_ok_and(|i| i.to_string() == n) => {
                Self::cuda(n.parse().unwrap_or_default(), threads)
            }
            _ => Err(DeviceError::Unknown(name.into())),
        }
    }

    /// The host's cores: the device itself, or those beside a GPU.
    pub fn host(&self) -> &Arc<Cpu> {
        match self {
            Self::Cpu(cpu) => cpu,
            Self::Cuda(cuda) => cuda.host(),
        }
    }

    /// The GPU, if it is one.
    pub fn as_cuda(&self) -> Option<&Arc<Cuda>> {
        match self {
            Self::Cpu(_) => None,
            Self::Cuda(cuda) => Some(cuda),
        }
    }

    /// Hands host memory that waits to be used again back to the system: when what needed it is over.
    pub fn release(&self) {
        match self {
            Self::Cpu(cpu) => cpu.memory.release(),
            // An arena keeps its pieces: recorded steps name addresses in them.
            Self::Cuda(_) => {}
        }
    }

    /// Context of step 0, micro-batch 0.
    pub fn ctx(&self) -> Ctx {
        Ctx { device: self.clone(), step: 0, micro_batch: 0 }
    }
}

impl Cpu {
    /// Number of workers.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The vector instructions that ops are to use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// What says how much scratch ops take.
    pub fn workers(&self) -> Workers {
        Workers { level: self.isa.level(), threads: self.threads }
    }

    /// Memory that buffers of [`Ctx::empty`] have.
    pub fn memory(&self) -> InUse {
        self.memory.in_use()
    }

    /// `len` elements of whatever value, for an operation's own sums: see [`Ctx::empty`].
    pub fn empty<T: Pod>(&self, len: usize) -> AlignedVec<T> {
        AlignedVec::of(&self.memory, len)
    }

    /// Runs `f` on one of these workers, with them as its rayon pool: for libraries that bring their own parallel loops, and
    /// for many operations one after the other. It must not wait for another caller of this device, who may need this worker.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    /// Runs `f`, whose calls of [`Cpu::for_each`] find the workers awake: they sleep soon after a call that is not part of
    /// another.
    pub fn together<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if self.threads == 1 { f() } else { self.pool.install(f) }
    }

    /// Runs `f(0) .. f(n - 1)` on the workers, in any order and on any worker. How work is cut into tasks must depend
    /// on shapes alone, never on the number of workers, unless no bit depends on the cut: that is what keeps results
    /// equal for every thread count. With one thread the caller does all of it.
    pub fn for_each(&self, n: usize, f: impl Fn(usize) + Sync) {
        use rayon::prelude::*;
        match n {
            0 => {}
            1 => f(0),
            // No worker has to be woken for what the caller can do as well.
            _ if self.threads == 1 => (0..n).for_each(f),
            _ => self.pool.install(|| (0..n).into_par_iter().with_max_len(1).for_each(&f)),
        }
    }

    /// Cuts `out` into pieces of `len` elements (the last may be shorter) and runs `f(i, piece)` on the workers.
    pub fn chunks_mut<T: Send>(&self, out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        use rayon::prelude::*;
        assert!(len > 0, "pieces of no elements");
        if out.len() <= len {
            if !out.is_empty() {
                f(0, out);
            }
            return;
        }
        self.pool.install(|| out.par_chunks_mut(len).with_max_len(1).enumerate().for_each(|(i, c)| f(i, c)));
    }

    /// As [`Cpu::chunks_mut`] over two slices cut alike: piece i of `a` with piece i of `b`.
    pub fn chunks2_mut<T: Send, U: Send>(
        &self,
        (a, la): (&mut [T], usize),
        (b, lb): (&mut [U], usize),
        f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        use rayon::prelude::*;
        assert!(la > 0 && lb > 0, "pieces of no elements");
        assert_eq!(a.len().div_ceil(la), b.len().div_ceil(lb), "slices cut into different numbers of pieces");
        self.pool.install(|| {
            a.par_chunks_mut(la)
                .zip(b.par_chunks_mut(lb))
                .with_max_len(1)
                .enumerate()
                .for_each(|(i, (x, y))| f(i, x, y));
        });
    }
}

/// What a stage or op needs beside its tensors: where to run, and which step and micro-batch this is.
#[derive(Clone, Debug)]
pub struct Ctx {
    /// Where ops run.
    pub device: Device,
    /// Optimiser step.
    pub step: u64,
    /// Micro-batch within the step.
    pub micro_batch: u32,
}

impl Ctx {
    /// The host's cores.
    pub fn host(&self) -> &Arc<Cpu> {
        self.device.host()
    }

    /// The same, on the host's cores: for what is read from files and written to them.
    pub fn on_host(&self) -> Self {
        Self { device: Device::Cpu(self.host().clone()), ..self.clone() }
    }

    /// `len` zeros of `dtype` on the device, in memory of their own: for what is kept or added to.
    pub fn zeros(&self, dtype: DType, len: usize) -> Buf {
        match &self.device {
            Device::Cpu(_) => Buf::host_zeros(dtype, len),
            Device::Cuda(cuda) => cuda.zeros(dtype, len),
        }
    }

    /// `len` elements of `dtype` of whatever value, in memory that the device uses again: for what is written whole
    /// before it is read. With debug assertions they are NaN or -1.
    pub fn empty(&self, dtype: DType, len: usize) -> Buf {
        match &self.device {
            Device::Cpu(cpu) => Buf::of(&cpu.memory, dtype, len),
            Device::Cuda(cuda) => cuda.empty(dtype, len),
        }
    }

    /// Uploads f32 values.
    pub fn from_f32(&self, values: &[f32]) -> Buf {
        let mut b = self.room(DType::F32, values.len());
        b.view_mut().write(values);
        b
    }

    /// Uploads i32 values.
    pub fn from_i32(&self, values: &[i32]) -> Buf {
        let mut b = self.room(DType::I32, values.len());
        b.view_mut().write_i32(values);
        b
    }

    /// `len` times an f32.
    pub fn filled(&self, len: usize, value: f32) -> Buf {
        let mut b = self.room(DType::F32, len);
        match &self.device {
            Device::Cpu(_) => b.view_mut().f32().fill(value),
            Device::Cuda(cuda) => cuda.fill_words(b.view_mut(), value.to_bits()),
        }
        b
    }

    /// A copy of a view of this device.
    pub fn copy_of(&self, view: View<'_>) -> Buf {
        match &self.device {
            Device::Cpu(_) => Buf::copy_of(view),
            Device::Cuda(cuda) => {
                let mut b = self.room(view.dtype(), view.len());
                cuda.copy(view, b.view_mut());
                b
            }
        }
    }

    /// A mark behind all that the device was given so far.
    pub fn mark(&self) -> Mark {
        match &self.device {
            Device::Cpu(_) => Mark::Host(Instant::now()),
            Device::Cuda(cuda) => Mark::Cuda(Arc::new(cuda.mark()), cuda.clone()),
        }
    }

    /// As [`Ctx::empty`], for what is written at once.
    fn room(&self, dtype: DType, len: usize) -> Buf {
        match &self.device {
            Device::Cpu(_) => self.empty(dtype, len),
            Device::Cuda(cuda) => cuda.uninit(dtype, len),
        }
    }

    /// A copy of a buffer in host memory on this device.
    pub fn upload(&self, buf: &Buf) -> Buf {
        let mut out = self.room(buf.dtype(), buf.len());
        match buf {
            Buf::F32(v) => out.view_mut().write(v),
            Buf::Bf16(v) => out.view_mut().write(v),
            Buf::I32(v) => out.view_mut().write_i32(v),
            Buf::Cuda(_) => panic!("expected a buffer in host memory"),
        }
        out
    }

    /// The buffer itself, or where it lies in host memory and this device is a GPU, a copy there.
    pub fn here(&self, buf: Buf) -> Buf {
        match &self.device {
            Device::Cuda(_) if buf.view().is_host() => self.upload(&buf),
            _ => buf,
        }
    }

    /// What a buffer of this device holds once all before is done, to be read later: on a CPU a copy, on a GPU a copy
    /// that nobody waits for yet.
    pub fn download(&self, view: View<'_>) -> Download {
        match &self.device {
            Device::Cpu(_) => Download::Host(Buf::copy_of(view)),
            Device::Cuda(cuda) => Download::Cuda(cuda.download(view)),
        }
    }
}

/// A time on a device's clock.
#[derive(Clone)]
pub enum Mark {
    /// When the host came by.
    Host(Instant),
    /// When a GPU had done all before it.
    Cuda(Arc<Event>, Arc<Cuda>),
}

impl Mark {
    /// Whether the device has come by.
    pub fn has_passed(&self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Cuda(event, _) => event.has_passed(),
        }
    }

    /// Seconds from `before` to here, both of one device and passed.
    pub fn since(&self, before: &Self) -> f64 {
        match (self, before) {
            (Self::Host(now), Self::Host(before)) => now.duration_since(*before).as_secs_f64(),
            (Self::Cuda(now, cuda), Self::Cuda(before, _)) => cuda.between(before, now),
            _ => panic!("marks of two devices"),
        }
    }
}

/// A copy of a buffer for the host, which may still be under way.
pub enum Download {
    /// In host memory.
    Host(Buf),
    /// On its way from a GPU.
    Cuda(Pending),
}

impl Download {
    /// The elements of an f32 buffer; waits until they are there.
    pub fn f32(&self) -> Vec<f32> {
        match self {
            Self::Host(b) => b.view().f32().to_vec(),
            Self::Cuda(p) => p.f32(),
        }
    }

    /// The elements of an i32 buffer; waits until they are there.
    pub fn i32(&self) -> Vec<i32> {
        match self {
            Self::Host(b) => b.view().i32().to_vec(),
            Self::Cuda(p) => p.i32(),
        }
    }

    /// Whether reading waits for nothing.
    pub fn is_ready(&self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Cuda(p) => p.is_ready(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_reads_as_nan_in_debug_builds() {
        let ctx = Device::cpu(Some(1)).unwrap().ctx();
        let unset = |x: &[f32]| !cfg!(debug_assertions) || x.iter().all(|x| x.is_nan());
        let at = |b: &Buf| b.view().f32().as_ptr();
        let mut a = ctx.empty(DType::F32, 5000);
        let first = at(&a);
        assert!(unset(a.view().f32()));
        a.view_mut().f32().fill(1.0);
        let copy = a.clone();
        assert!(at(&copy) != first && copy.view().f32() == a.view().f32());
        drop(a);
        let again = ctx.empty(DType::F32, 4999);
        assert_eq!((at(&again), again.len()), (first, 4999));
        assert!(unset(again.view().f32()));
        assert!(!cfg!(debug_assertions) || ctx.empty(DType::I32, 3).view().i32().iter().all(|&x| x == -1));
        // Another device shares nothing, and zeros are never what was used before.
        drop(again);
        let other = Device::cpu(Some(1)).unwrap().ctx();
        assert_ne!(at(&other.empty(DType::F32, 5000)), first);
        assert!(ctx.zeros(DType::F32, 5000).view().f32().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn thread_counts_have_bounds() {
        for found in [0, MAX_THREADS + 1, usize::MAX] {
            let message = Device::cpu(Some(found)).unwrap_err().to_string();
            let expected = format!("--threads {found}: expected at least 1, at most 1024 (this machine has ");
            assert!(message.starts_with(&expected) && message.ends_with(" cores)"), "{message}");
        }
        assert_eq!(Device::cpu(Some(3)).unwrap().host().threads(), 3);
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:01", "cuda:-1", "cpu:0"] {
            let message = Device::named(name, None).unwrap_err().to_string();
            assert_eq!(message, format!("--device {name}: expected cpu, cuda or cuda:N"));
        }
    }
}
