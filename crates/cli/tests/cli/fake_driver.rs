//! A CUDA driver that says what the test `fake_driver_*` in `device.rs` wants, and computes nothing; built by that test as
//! a library of the driver's name. `FAKE_CUDA` is `VERSION GPUS MAJOR MINOR START`, START being what cuInit answers.

use std::ffi::{c_char, c_int, c_void};

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

/// 75 and 76 ask for the compute capability.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(to: *mut c_int, which: c_int, _device: c_int) -> c_int {
    give(to, if which == 75 { wanted(2) } else { wanted(3) })
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(_error: c_int, to: *mut *const c_char) -> c_int {
    give(to, c"FAKE_ERROR".as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(_error: c_int, to: *mut *const c_char) -> c_int {
    give(to, c"an error that is not real".as_ptr())
}
