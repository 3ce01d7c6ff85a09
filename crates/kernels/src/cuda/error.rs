//! What can go wrong with a GPU, and how an operation that returns nothing says so.

use super::driver::DriverError;
use std::cell::Cell;

/// Why a GPU cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GpuError {
    /// The driver's library is missing.
    #[error("no NVIDIA driver: libcuda is not on this system's library path; install the driver of your GPU")]
    NoDriver,
    /// The driver is older than what we call.
    #[error("the NVIDIA driver supports CUDA {}.{}; expected 12.8 or newer: update the driver", found / 1000, found % 1000 / 10)]
    OldDriver {
        /// 1000 * major + 10 * minor.
        found: i32,
    },
    /// There is no such GPU.
    #[error("this machine has {found} GPUs, numbered from 0")]
    NoGpu {
        /// What was asked for.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// Before Ampere.
    #[error("{name} has compute capability {major}.{minor}; expected 8.0 (Ampere) or newer")]
    OldGpu {
        /// The GPU.
        name: String,
        /// Its compute capability.
        major: u32,
        /// Its compute capability.
        minor: u32,
    },
    /// NVRTC's library is missing.
    #[error(
        "NVRTC, which compiles hadal's kernels, is missing: libnvrtc.so is not on this system's library path; \
         install it (packages cuda-nvrtc or nvidia-cuda-nvrtc) and name its folder in LD_LIBRARY_PATH"
    )]
    NoCompiler,
    /// The driver refused.
    #[error("{doing}: {why}")]
    Driver {
        /// What was tried.
        doing: &'static str,
        /// What it said.
        why: DriverError,
    },
}

thread_local! {
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Ends what is going on with a line for the user. Operations return nothing (their contracts leave nothing to fail on
/// a CPU); a device that fails in the midst of a step fails everything after, so that only who runs the step can do
/// something: end it and say why. That is a panic whose message is not a fault of ours, see [`is_failure`].
#[track_caller]
pub(crate) fn fail(message: String) -> ! {
    FAILED.set(true);
    panic!("{message}")
}

/// Whether the panic under way on this thread is a failure of the device or of what it needs: its message is for the
/// user.
pub fn is_failure() -> bool {
    FAILED.get()
}
