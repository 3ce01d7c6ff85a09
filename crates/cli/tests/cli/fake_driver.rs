//! A CUDA driver that says what the tests in `device.rs` and `device_failure.rs` want; built by them as a library of the
//! driver's name, and of NVRTC's and cuBLASLt's. `FAKE_CUDA` is `VERSION GPUS MAJOR MINOR START`, START being what cuInit
//! answers. It has memory, which is the host's, and copies at once; kernels compute nothing. `FAKE_CUDA_FAILS` is `KIND N`:
//! the Nth launch of a kernel, or the Nth `replay` of a graph, fails as a GPU's work does, which is told by the waits
//! that follow; or the Nth piece of `memory` is not to be had. `FAKE_CUDA_MEMORY` is how many bytes it says it has; where
//! there is `FAKE_CUDA_OTHERS`, others take what is left of it as soon as a piece is taken.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// CUDA_ERROR_ILLEGAL_ADDRESS.
const ILLEGAL_ADDRESS: c_int = 700;
/// CUDA_ERROR_OUT_OF_MEMORY.
const OUT_OF_MEMORY: c_int = 2;
/// CUBLAS_STATUS_NOT_INITIALIZED.
const NOT_INITIALIZED: c_int = 1;

static PIECES: AtomicUsize = AtomicUsize::new(0);
static KERNELS: AtomicUsize = AtomicUsize::new(0);
static REPLAYS: AtomicUsize = AtomicUsize::new(0);
static RECORDING: AtomicBool = AtomicBool::new(false);
static FAILED: AtomicBool = AtomicBool::new(false);

/// Counts one of that kind, and says whether it is the one that fails.
fn fails(kind: &str, count: &AtomicUsize) -> bool {
    let n = count.fetch_add(1, SeqCst) + 1;
    std::env::var("FAKE_CUDA_FAILS").is_ok_and(|which| which == format!("{kind} {n}"))
}

/// Counts a launch of that kind.
fn launched(kind: &str, count: &AtomicUsize) -> c_int {
    if fails(kind, count) {
        FAILED.store(true, SeqCst);
    }
    0
}

/// What a wait says.
fn outcome() -> c_int {
    if FAILED.load(SeqCst) { ILLEGAL_ADDRESS } else { 0 }
}

fn wanted(which: usize) -> c_int {
    let all = std::env::var("FAKE_CUDA").expect("FAKE_CUDA");
    all.split(' ').nth(which).expect("five numbers").parse().expect("numbers")
}

fn give<T>(to: *mut T, value: T) -> c_int {
    // SAFETY: the caller's pointer to one value, as the driver's interface has it.
    unsafe { to.write(value) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(to: *mut c_int) -> c_int {
    give(to, wanted(0))
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: u32) -> c_int {
    wanted(4)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(to: *mut c_int) -> c_int {
    give(to, wanted(1))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(to: *mut c_int, ordinal: c_int) -> c_int {
    give(to, ordinal)
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain_v2(to: *mut *mut c_void, _device: c_int) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(to: *mut *mut c_void, device: c_int) -> c_int {
    cuDevicePrimaryCtxRetain_v2(to, device)
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(_context: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(to: *mut c_char, _len: c_int, _device: c_int) -> c_int {
    for (i, &byte) in b"Fake 1000\0".iter().enumerate() {
        // SAFETY: the caller has room for more than that.
        give(unsafe { to.add(i) }, byte as c_char);
    }
    0
}

/// 75 and 76 ask for the compute capability, 16 for the number of multiprocessors.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(to: *mut c_int, which: c_int, _device: c_int) -> c_int {
    let value = match which {
        75 => wanted(2),
        76 => wanted(3),
        16 => 8,
        _ => return 1,
    };
    give(to, value)
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(_error: c_int, to: *mut *const c_char) -> c_int {
    give(to, c"FAKE_ERROR".as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(_error: c_int, to: *mut *const c_char) -> c_int {
    give(to, c"an error that is not real".as_ptr())
}

// ---- Memory

/// Zeros that nobody frees.
fn memory(bytes: usize) -> *mut u8 {
    let layout = std::alloc::Layout::from_size_align(bytes.max(1), 512).expect("a size that fits");
    // SAFETY: not of size zero.
    unsafe { std::alloc::alloc_zeroed(layout) }
}

fn all_memory() -> usize {
    std::env::var("FAKE_CUDA_MEMORY").map_or(1 << 34, |bytes| bytes.parse().expect("a number"))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(to: *mut usize, _device: c_int) -> c_int {
    give(to, all_memory())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    let others = std::env::var_os("FAKE_CUDA_OTHERS").is_some() && PIECES.load(SeqCst) > 0;
    give(free, if others { 0 } else { all_memory() }) + give(total, all_memory())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> c_int {
    if fails("memory", &PIECES) { OUT_OF_MEMORY } else { give(to, memory(bytes) as u64) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(to: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    give(to, memory(bytes).cast())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(_at: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(_at: *mut c_void) -> c_int {
    0
}

/// Other bytes than zeros are those that stand for nothing yet: numbers that no kernel will overwrite must not be NaN.
#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, _stream: *mut c_void) -> c_int {
    // SAFETY: the caller's memory, of so many bytes.
    unsafe { std::ptr::write_bytes(at as *mut u8, 0, if byte == 0 { bytes } else { 0 }) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD32Async(at: u64, word: u32, words: usize, _stream: *mut c_void) -> c_int {
    // SAFETY: the caller's memory, of so many words.
    unsafe { std::slice::from_raw_parts_mut(at as *mut u32, words) }.fill(word);
    0
}

fn copy(to: *mut u8, from: *const u8, bytes: usize) -> c_int {
    // SAFETY: the caller's memory on both sides.
    unsafe { std::ptr::copy(from, to, bytes) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, _stream: *mut c_void) -> c_int {
    copy(to as *mut u8, from, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, _stream: *mut c_void) -> c_int {
    copy(to, from as *const u8, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _stream: *mut c_void) -> c_int {
    copy(to as *mut u8, from as *const u8, bytes)
}

// ---- Streams, events, kernels, graphs

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(to: *mut *mut c_void, _flags: c_uint) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(_stream: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> c_int {
    outcome()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(to: *mut *mut c_void, _flags: c_uint) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(_event: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(_event: *mut c_void, _stream: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(_event: *mut c_void) -> c_int {
    outcome()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(_event: *mut c_void) -> c_int {
    outcome()
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(to: *mut f32, _begin: *mut c_void, _end: *mut c_void) -> c_int {
    give(to, 1.0)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(to: *mut *mut c_void, _image: *const c_void) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(to: *mut *mut c_void, _module: *mut c_void, _name: *const c_char) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(_function: *mut c_void, _which: c_int, _value: c_int) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx(
    _config: *const c_void,
    _function: *mut c_void,
    _arguments: *mut c_void,
    _extra: *mut c_void,
) -> c_int {
    if RECORDING.load(SeqCst) { 0 } else { launched("kernel", &KERNELS) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(_stream: *mut c_void, _mode: c_int) -> c_int {
    RECORDING.store(true, SeqCst);
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(_stream: *mut c_void, to: *mut *mut c_void) -> c_int {
    RECORDING.store(false, SeqCst);
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(to: *mut *mut c_void, _graph: *mut c_void, _flags: u64) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(_graph: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(_graph: *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(_graph: *mut c_void, _stream: *mut c_void) -> c_int {
    launched("replay", &REPLAYS)
}

// ---- NVRTC, which compiles everything to nothing, and a cuBLASLt that is of no use

#[unsafe(no_mangle)]
extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    give(major, 0) + give(minor, 0)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCreateProgram(
    to: *mut *mut c_void,
    _source: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _texts: *const c_void,
    _names: *const c_void,
) -> c_int {
    give(to, std::ptr::dangling_mut())
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCompileProgram(_program: *mut c_void, _count: c_int, _options: *const c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBINSize(_program: *mut c_void, to: *mut usize) -> c_int {
    give(to, 1)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBIN(_program: *mut c_void, to: *mut u8) -> c_int {
    give(to, 0)
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcDestroyProgram(_program: *mut *mut c_void) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtCreate(_to: *mut *mut c_void) -> c_int {
    NOT_INITIALIZED
}
