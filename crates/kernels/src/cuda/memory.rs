//! A device's memory: taken from the driver in large pieces, handed out in smaller ones, best fit first. Requests of a
//! training step repeat exactly, so that every step gets the same addresses, which a captured graph relies on.

use super::driver::{DriverError, check};
use super::{Cuda, error, graph};
use crate::DType;
use cudarc::driver::sys;
use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every buffer begins and ends at a multiple: enough for wide loads and for the alignment of tensor maps.
const ALIGN: usize = 512;
/// Least that is taken from the driver at once.
const PIECE: usize = 64 << 20;

/// Addresses, the end excluded.
pub(super) type Range = (u64, u64);

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// In use.
    pub used: usize,
    /// The most that was in use at once.
    pub peak: usize,
    /// From the beginning of the arena to the furthest end of a buffer: `peak` and the holes between buffers.
    pub reached: usize,
    /// Taken from the driver.
    pub taken: usize,
}

/// Memory of one device.
#[derive(Debug, Default)]
pub(super) struct Arena {
    /// What the driver gave: address to bytes.
    pieces: BTreeMap<u64, usize>,
    /// What is free: address to bytes, neighbours merged.
    free: BTreeMap<u64, usize>,
    /// The same by (bytes, address).
    by_size: BTreeSet<(usize, u64)>,
    /// What is in use: address to bytes.
    live: BTreeMap<u64, usize>,
    /// What was taken since a recording began, while one goes on.
    recorded: Option<Vec<Range>>,
    used: usize,
    peak: usize,
    /// How far into the pieces buffers have reached.
    reached: usize,
    /// Where the next piece lies, if there is no driver behind: addresses that nobody reads.
    endless: Option<u64>,
}

/// An arena's state is whole whenever its lock is free.
pub(super) fn lock(arena: &Mutex<Arena>) -> MutexGuard<'_, Arena> {
    arena.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Arena {
    /// One of addresses alone, as high as a driver's.
    pub fn endless() -> Self {
        let mut arena = Self::default();
        arena.endless = Some(1 << 47);
        arena
    }

    /// Takes at least `bytes` from the driver in one piece.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), DriverError> {
        let bytes = bytes.max(PIECE).next_multiple_of(ALIGN);
        let mut ptr = 0;
        match &mut self.endless {
            Some(next) => (ptr, *next) = (*next, *next + bytes as u64),
            // SAFETY: writes one address; the caller made the device's context current.
            None => check(unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes) })?,
        }
        self.pieces.insert(ptr, bytes);
        self.insert(ptr, bytes);
        Ok(())
    }

    /// The address of `bytes` of whatever content.
    pub fn take(&mut self, bytes: usize) -> Result<u64, DriverError> {
        let bytes = rounded(bytes);
        // A hole rather than the end of a piece, however small that is: so that what a run takes does not depend on how
        // large its piece is, as long as it is large enough.
        let fitting = |a: &Self| {
            let mut fitting = a.by_size.range((bytes, 0)..).copied();
            let first = fitting.next()?;
            let hole = |&(size, at): &(usize, u64)| !a.ends_piece(at, size);
            Some(if hole(&first) { first } else { fitting.find(hole).unwrap_or(first) })
        };
        let (size, at) = match fitting(self) {
            Some(found) => found,
            None => {
                self.reserve(bytes)?;
                // A piece at least as large as the request has just been put in.
                fitting(self).ok_or(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY))?
            }
        };
        self.remove(at, size);
        if size > bytes {
            self.insert(at + bytes as u64, size - bytes);
        }
        self.live.insert(at, bytes);
        if let Some(recorded) = &mut self.recorded {
            recorded.push((at, at + bytes as u64));
        }
        self.used += bytes;
        self.peak = self.peak.max(self.used);
        self.reached = self.reached.max(self.reach(at + bytes as u64));
        Ok(at)
    }

    /// Takes memory of [`Arena::take`] back.
    fn give(&mut self, mut at: u64, bytes: usize) {
        let mut bytes = rounded(bytes);
        self.used -= bytes;
        self.live.remove(&at);
        if let Some((&before, &size)) = self.free.range(..at).next_back()
            && before + size as u64 == at
            && !self.pieces.contains_key(&at)
        {
            self.remove(before, size);
            (at, bytes) = (before, bytes + size);
        }
        let end = at + bytes as u64;
        if let Some(&size) = self.free.get(&end)
            && !self.pieces.contains_key(&end)
        {
            self.remove(end, size);
            bytes += size;
        }
        self.insert(at, bytes);
    }

    /// Whether a free range is the end of what the driver gave in one piece.
    fn ends_piece(&self, at: u64, bytes: usize) -> bool {
        self.pieces.range(..=at).next_back().is_some_and(|(&piece, &size)| piece + size as u64 == at + bytes as u64)
    }

    fn insert(&mut self, at: u64, bytes: usize) {
        self.free.insert(at, bytes);
        self.by_size.insert((bytes, at));
    }

    fn remove(&mut self, at: u64, bytes: usize) {
        self.free.remove(&at);
        self.by_size.remove(&(bytes, at));
    }

    /// Notes what is taken from now on.
    pub fn begin_recording(&mut self) {
        self.recorded = Some(Vec::new());
    }

    /// What was taken since, in order, neighbours and overlaps merged; and what of it is in use now.
    pub fn end_recording(&mut self) -> (Vec<Range>, Vec<Range>) {
        let mut all = self.recorded.take().unwrap_or_default();
        all.sort_unstable();
        all.dedup_by(|next, kept| {
            let joins = next.0 <= kept.1;
            kept.1 = if joins { kept.1.max(next.1) } else { kept.1 };
            joins
        });
        let kept = self.in_use(&all);
        (all, kept)
    }

    /// What is in use and lies within these ranges or reaches into them.
    pub fn in_use(&self, ranges: &[Range]) -> Vec<Range> {
        let reaches = |&(begin, end): &Range| {
            let before = self.live.range(..begin).next_back().filter(move |&(&at, &size)| at + size as u64 > begin);
            before.into_iter().chain(self.live.range(begin..end)).map(|(&at, &size)| (at, at + size as u64))
        };
        ranges.iter().flat_map(reaches).collect()
    }

    /// See [`MemoryUse`].
    pub fn counts(&self) -> MemoryUse {
        let taken = self.pieces.values().sum();
        MemoryUse { used: self.used, peak: self.peak, reached: self.reached, taken }
    }

    /// Bytes from the beginning of the first piece to `end`, what lies between pieces left out.
    fn reach(&self, end: u64) -> usize {
        self.pieces.iter().map(|(&at, &size)| size.min(end.saturating_sub(at) as usize)).sum()
    }

    fn free_piece(&self, at: u64) {
        if self.endless.is_none() {
            // SAFETY: taken by `reserve`, handed back once; the driver waits for work that may use it.
            unsafe { sys::cuMemFree_v2(at) };
        }
    }
}

/// Bytes that a request takes; an empty buffer has an address of its own too.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Freeing waits for the whole device, which would break a recording that another thread makes.
        let _alone = (self.endless.is_none() && !self.pieces.is_empty()).then(graph::nobody_records);
        self.pieces.keys().for_each(|&at| self.free_piece(at));
    }
}

/// Elements in device memory.
pub struct CudaBuf {
    ptr: u64,
    len: usize,
    dtype: DType,
    home: Arc<Mutex<Arena>>,
    /// The device, to copy from and to; a buffer never outlives its context, which is never released.
    device: std::sync::Weak<Cuda>,
}

impl CudaBuf {
    pub(super) fn new(cuda: &Cuda, ptr: u64, len: usize, dtype: DType) -> Self {
        Self { ptr, len, dtype, home: cuda.arena.clone(), device: cuda.this.clone() }
    }

    /// The device that it is on.
    pub(crate) fn device(&self) -> Arc<Cuda> {
        self.device.upgrade().unwrap_or_else(|| error::fail("a buffer was used after its device was closed".into()))
    }

    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn view(&self) -> CudaView<'_> {
        CudaView { ptr: self.ptr, len: self.len, dtype: self.dtype, device: &self.device, life: PhantomData }
    }

    pub(crate) fn view_mut(&mut self) -> CudaViewMut<'_> {
        CudaViewMut { ptr: self.ptr, len: self.len, dtype: self.dtype, device: &self.device, life: PhantomData }
    }
}

impl Drop for CudaBuf {
    fn drop(&mut self) {
        lock(&self.home).give(self.ptr, self.len * self.dtype.size());
    }
}

impl Clone for CudaBuf {
    fn clone(&self) -> Self {
        let cuda = self.device();
        let mut out = cuda.allocate(self.dtype, self.len);
        cuda.copy(crate::View::Cuda(self.view()), crate::ViewMut::Cuda(out.view_mut()));
        out
    }
}

/// Borrowed device memory to read.
#[derive(Clone, Copy)]
pub struct CudaView<'a> {
    pub(super) ptr: u64,
    pub(super) len: usize,
    pub(super) dtype: DType,
    device: &'a std::sync::Weak<Cuda>,
    life: PhantomData<&'a [u8]>,
}

/// Borrowed device memory to write.
pub struct CudaViewMut<'a> {
    pub(super) ptr: u64,
    pub(super) len: usize,
    pub(super) dtype: DType,
    device: &'a std::sync::Weak<Cuda>,
    life: PhantomData<&'a mut [u8]>,
}

impl<'a> CudaView<'a> {
    pub(crate) fn ptr(self) -> u64 {
        self.ptr
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }

    pub(crate) fn dtype(self) -> DType {
        self.dtype
    }

    pub(crate) fn slice(self, r: std::ops::Range<usize>) -> Self {
        assert!(r.start <= r.end && r.end <= self.len, "elements {r:?} of {}", self.len);
        Self { ptr: self.ptr + (r.start * self.dtype.size()) as u64, len: r.len(), ..self }
    }

    /// The same bytes as elements of another type.
    pub(crate) fn cast(self, dtype: DType) -> Self {
        Self { len: self.len * self.dtype.size() / dtype.size(), dtype, ..self }
    }

    pub(crate) fn device(self) -> Arc<Cuda> {
        self.device.upgrade().unwrap_or_else(|| error::fail("a buffer was used after its device was closed".into()))
    }
}

impl<'a> CudaViewMut<'a> {
    pub(crate) fn as_view(&self) -> CudaView<'_> {
        CudaView { ptr: self.ptr, len: self.len, dtype: self.dtype, device: self.device, life: PhantomData }
    }

    pub(crate) fn reborrow(&mut self) -> CudaViewMut<'_> {
        CudaViewMut { ptr: self.ptr, len: self.len, dtype: self.dtype, device: self.device, life: PhantomData }
    }

    pub(crate) fn slice(self, r: std::ops::Range<usize>) -> Self {
        let part = self.as_view().slice(r);
        let (ptr, len) = (part.ptr, part.len);
        Self { ptr, len, ..self }
    }
}

impl std::fmt::Debug for CudaView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({:?}, {})", self.dtype, self.len)
    }
}

impl std::fmt::Debug for CudaViewMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_view().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An arena over addresses that nobody reads.
    fn arena() -> Arena {
        let mut a = Arena::endless();
        a.insert(1 << 20, 1 << 16);
        a.pieces.insert(1 << 20, 1 << 16);
        a
    }

    #[test]
    fn what_repeats_gets_the_same_addresses() {
        let mut a = arena();
        let round = |a: &mut Arena| -> Vec<u64> {
            let sizes = [100, 5000, 512, 513, 20_000];
            let taken: Vec<u64> = sizes.iter().map(|&s| a.take(s).unwrap()).collect();
            for i in [3, 0, 4, 1, 2] {
                a.give(taken[i], sizes[i]);
            }
            taken
        };
        let first = round(&mut a);
        assert!(first.iter().all(|at| at % ALIGN as u64 == 0));
        assert_eq!(first, round(&mut a));
        assert_eq!((a.used, a.free.len(), a.by_size.len()), (0, 1, 1));
        assert_eq!(a.peak, 512 + 5120 + 512 + 1024 + 20_480);
    }

    #[test]
    fn a_recording_knows_what_it_took() {
        let mut a = arena();
        let before = a.take(1000).unwrap();
        a.begin_recording();
        let (x, y) = (a.take(512).unwrap(), a.take(512).unwrap());
        a.give(x, 512);
        let kept = a.take(300).unwrap();
        a.give(y, 512);
        a.give(kept, 300);
        let (ranges, held) = a.end_recording();
        assert_eq!((ranges.clone(), held), (vec![(x, x + 1024)], vec![]));
        assert!(a.in_use(&ranges).is_empty());
        a.give(before, 1000);
        // Best fit: the whole is one free range again, and the first bytes of it are no part of the recording.
        let outside = a.take(1000).unwrap();
        assert!(a.in_use(&ranges).is_empty());
        let inside = a.take(1).unwrap();
        assert_eq!(a.in_use(&ranges), [(inside, inside + 512)]);
        a.give(inside, 1);
        a.give(outside, 1000);
    }

    #[test]
    fn neighbours_of_different_pieces_stay_apart() {
        let mut a = arena();
        a.insert((1 << 20) + (1 << 16), 1 << 16);
        a.pieces.insert((1 << 20) + (1 << 16), 1 << 16);
        let (x, y) = (a.take(1 << 16).unwrap(), a.take(1 << 16).unwrap());
        a.give(x, 1 << 16);
        a.give(y, 1 << 16);
        assert_eq!(a.free.len(), 2);
    }
}
