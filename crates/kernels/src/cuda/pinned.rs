//! Host memory that the device reads and writes on its own, and copies through it. Uploads never wait: each takes a
//! piece that no earlier copy still needs. Downloads wait, or are asked for now and read later.

use super::Cuda;
use super::driver::{Event, check};
use crate::{DType, View};
use cudarc::driver::sys;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// A piece of pinned memory.
struct Piece {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: a piece owns its memory.
unsafe impl Send for Piece {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Piece {}

impl Piece {
    fn new(cuda: &Cuda, bytes: usize) -> Self {
        let mut ptr = std::ptr::null_mut();
        // SAFETY: writes one address; callers made a context current.
        if let Err(e) = check(unsafe { sys::cuMemHostAlloc(&mut ptr, bytes, 0) }) {
            cuda.fail(&format!("taking {bytes} bytes of pinned host memory: {e}"));
        }
        Self { ptr: ptr.cast(), bytes }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: taken by `new`, handed back once. Pieces that a copy may still use are kept in `Pinned`.
        unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
    }
}

/// Pieces that wait to be used again, each with the mark behind its last copy.
#[derive(Default)]
pub(super) struct Pinned {
    waiting: Mutex<Vec<(Piece, Option<Event>)>>,
}

/// Sizes are rounded up, so that pieces fit again.
const LEAST: usize = 4096;

impl Pinned {
    fn take(&self, cuda: &Cuda, bytes: usize) -> Piece {
        let bytes = bytes.max(LEAST).next_power_of_two();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |(p, e): &(Piece, Option<Event>)| p.bytes == bytes && e.as_ref().is_none_or(Event::has_passed);
        match waiting.iter().position(free) {
            Some(i) => waiting.swap_remove(i).0,
            None => Piece::new(cuda, bytes),
        }
    }

    fn give(&self, piece: Piece, until: Option<Event>) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((piece, until));
    }
}

/// A copy from the device that was asked for and may not be there yet.
pub struct Pending {
    piece: Option<Piece>,
    bytes: usize,
    dtype: DType,
    passed: Event,
    cuda: Arc<Cuda>,
}

impl Pending {
    /// Whether the copy is there, so that reading it waits for nothing.
    pub fn is_ready(&self) -> bool {
        self.passed.has_passed()
    }

    fn bytes(&self) -> &[u8] {
        if !self.is_ready() {
            self.cuda.wait_for(&self.passed);
        }
        let Some(piece) = &self.piece else { return &[] };
        // SAFETY: the piece has so many bytes, all written by the copy, which is over.
        unsafe { std::slice::from_raw_parts(piece.ptr, self.bytes) }
    }

    fn elements<T: bytemuck::Pod>(&self) -> Vec<T> {
        let mut out = vec![T::zeroed(); self.bytes / size_of::<T>()];
        // A device that is not there has nothing to say.
        if self.piece.is_some() {
            bytemuck::cast_slice_mut(&mut out).copy_from_slice(self.bytes());
        }
        out
    }

    /// The elements as f32, once they are there; panics on another dtype than f32 (a contract breach).
    pub fn f32(&self) -> Vec<f32> {
        assert_eq!(self.dtype, DType::F32, "expected a copy of an f32 buffer");
        self.elements()
    }

    /// The elements as i32, once they are there; panics on another dtype than i32 (a contract breach).
    pub fn i32(&self) -> Vec<i32> {
        assert_eq!(self.dtype, DType::I32, "expected a copy of an i32 buffer");
        self.elements()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(piece) = self.piece.take() else { return };
        if self.is_ready() {
            self.cuda.pinned.give(piece, None);
        } else {
            // Nobody will read it, and the copy may come yet, or never where the device has failed: the piece is let go of
            // for good, as nothing here may fail.
            std::mem::forget(piece);
        }
    }
}

impl Cuda {
    /// Bytes to a device address, through pinned memory, without waiting.
    pub(super) fn upload_bytes(&self, bytes: &[u8], to: u64) {
        if bytes.is_empty() || self.dry {
            return;
        }
        self.not_recorded("copying to the device");
        self.bind();
        // Large uploads (weights of a checkpoint) go in pieces that are used again.
        const PIECE: usize = 32 << 20;
        for (i, part) in bytes.chunks(PIECE).enumerate() {
            let piece = self.pinned.take(self, part.len());
            // SAFETY: the piece is at least as large, nobody else has it, and the destination was taken for all bytes.
            let result = unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), piece.ptr, part.len());
                let to = to + (i * PIECE) as u64;
                sys::cuMemcpyHtoDAsync_v2(to, piece.ptr.cast(), part.len(), self.stream.raw())
            };
            self.check("copying to the device", result);
            let event = self.event();
            self.record(&event);
            self.pinned.give(piece, Some(event));
        }
    }

    /// Bytes from the host to an address of a live buffer.
    pub(crate) fn write(&self, to: u64, bytes: &[u8]) {
        self.upload_bytes(bytes, to);
    }

    /// Bytes at an address of a live buffer; waits.
    pub(crate) fn read(&self, ptr: u64, out: &mut [u8]) {
        if out.is_empty() || self.dry {
            return;
        }
        self.bind();
        self.counts.blocking_copies.fetch_add(1, Ordering::Relaxed);
        self.counts.downloaded.fetch_add(out.len() as u64, Ordering::Relaxed);
        // SAFETY: the buffer takes so many bytes and lives until the copy is over, which the next call waits for.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), ptr, out.len(), self.stream.raw()) };
        self.check("copying from the device", result);
        self.synchronize();
    }

    /// Asks for a copy of what a view holds once all before it is done; it is read later.
    pub fn download(self: &Arc<Self>, view: View<'_>) -> Pending {
        self.not_recorded("copying from the device");
        self.bind();
        let bytes = view.len() * view.dtype().size();
        self.counts.downloaded.fetch_add(bytes as u64, Ordering::Relaxed);
        let piece = (bytes > 0 && !self.dry).then(|| self.pinned.take(self, bytes));
        if let Some(piece) = &piece {
            // SAFETY: the piece is at least as large, nobody else has it, and the result keeps it until the copy is over.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(piece.ptr.cast(), view.ptr(), bytes, self.stream.raw()) };
            self.check("copying from the device", result);
        }
        let passed = self.event();
        self.record(&passed);
        Pending { piece, bytes, dtype: view.dtype(), passed, cuda: self.clone() }
    }
}
