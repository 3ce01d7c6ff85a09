//! The few calls of the CUDA driver that are not about work: devices, handles, errors.

use super::GpuError;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::ffi::CStr;

/// The oldest driver whose calls we know: CUDA 12.8.
const OLDEST: i32 = 12_080;

/// A call that the driver refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} ({})", text(*.0, false), text(*.0, true))]
pub struct DriverError(pub(crate) CUresult);

/// The driver's text for an error, or its name.
fn text(e: CUresult, name: bool) -> String {
    let mut at = std::ptr::null();
    // SAFETY: the driver fills in a pointer to a static string, or leaves null.
    let found = unsafe { if name { sys::cuGetErrorName(e, &mut at) } else { sys::cuGetErrorString(e, &mut at) } };
    if found != CUresult::CUDA_SUCCESS || at.is_null() {
        return format!("error {}", e as i32);
    }
    // SAFETY: a static string that ends in zero.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

pub(super) fn check(result: CUresult) -> Result<(), DriverError> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(DriverError(result)) }
}

fn doing(doing: &'static str) -> impl FnOnce(DriverError) -> GpuError {
    move |why| GpuError::Driver { doing, why }
}

/// Loads and starts the driver; how many GPUs it has.
pub(super) fn count() -> Result<usize, GpuError> {
    // SAFETY: loads the driver's library, whose start-up code is the vendor's.
    if !unsafe { sys::is_culib_present() } {
        return Err(GpuError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDriverGetVersion(&mut version) }).map_err(doing("asking the driver's version"))?;
    if version < OLDEST {
        return Err(GpuError::OldDriver { found: version });
    }
    // SAFETY: takes no pointer.
    match check(unsafe { sys::cuInit(0) }) {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        result => result.map_err(doing("starting the driver"))?,
    }
    let mut n = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceGetCount(&mut n) }).map_err(doing("counting GPUs"))?;
    Ok(n as usize)
}

pub(super) fn device(ordinal: usize) -> Result<sys::CUdevice, GpuError> {
    let found = count()?;
    if ordinal >= found {
        return Err(GpuError::NoGpu { ordinal, found });
    }
    let mut device = 0;
    // SAFETY: writes one handle.
    check(unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) }).map_err(doing("opening a GPU"))?;
    Ok(device)
}

/// The device's primary context, retained for the life of the process and made current.
pub(super) fn primary_context(device: sys::CUdevice) -> Result<sys::CUcontext, GpuError> {
    let mut context = std::ptr::null_mut();
    // SAFETY: writes one handle of an existing device; then that handle is used.
    unsafe {
        check(sys::cuDevicePrimaryCtxRetain(&mut context, device)).map_err(doing("opening a GPU's context"))?;
        check(sys::cuCtxSetCurrent(context)).map_err(doing("using a GPU's context"))?;
    }
    Ok(context)
}

pub(super) fn name(device: sys::CUdevice) -> Result<String, GpuError> {
    let mut name = [0u8; 256];
    // SAFETY: the driver writes at most the length that it is given, zero included.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) };
    check(result).map_err(doing("asking a GPU's name"))?;
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

pub(super) fn attribute(device: sys::CUdevice, which: Attribute) -> Result<i32, GpuError> {
    let mut value = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) }).map_err(doing("asking about a GPU"))?;
    Ok(value)
}

/// Compute capability.
pub(super) fn arch(device: sys::CUdevice) -> Result<(u32, u32), GpuError> {
    let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((major as u32, minor as u32))
}

pub(super) fn total_memory(device: sys::CUdevice) -> Result<usize, GpuError> {
    let mut bytes = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut bytes, device) }).map_err(doing("asking a GPU's memory"))?;
    Ok(bytes)
}

/// (free, total) bytes of the current context's device.
pub(super) fn memory_info() -> Result<(usize, usize), DriverError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes two numbers.
    check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
    Ok((free, total))
}

/// A stream of the context that was current when it was made.
pub(super) struct Stream(sys::CUstream);

impl Stream {
    pub fn new() -> Result<Self, GpuError> {
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle.
        check(unsafe { sys::cuStreamCreate(&mut raw, flags) }).map_err(doing("making a stream"))?;
        Ok(Self(raw))
    }

    /// Of a device that is not there.
    pub fn none() -> Self {
        Self(std::ptr::null_mut())
    }

    pub fn raw(&self) -> sys::CUstream {
        self.0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by `new`, destroyed once. Work in it is completed by the driver before its resources go.
            unsafe { sys::cuStreamDestroy_v2(self.0) };
        }
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub struct Event(sys::CUevent);

// SAFETY: the driver's calls on events may come from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new() -> Result<Self, DriverError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one handle.
        check(unsafe { sys::cuEventCreate(&mut raw, sys::CUevent_flags::CU_EVENT_DEFAULT as u32) })?;
        Ok(Self(raw))
    }

    /// Of a device that is not there: it has passed.
    pub(super) fn none() -> Self {
        Self(std::ptr::null_mut())
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.0
    }

    /// Whether all before the mark is done.
    pub fn has_passed(&self) -> bool {
        // SAFETY: the event is alive. An error counts as not passed, and shows where somebody waits.
        self.0.is_null() || unsafe { sys::cuEventQuery(self.0) == CUresult::CUDA_SUCCESS }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by `new`, destroyed once; the driver lets a pending event go when it has passed.
            unsafe { sys::cuEventDestroy_v2(self.0) };
        }
    }
}
