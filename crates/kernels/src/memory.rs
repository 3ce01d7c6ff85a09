//! Memory of activations, reused: a step allocates the same sizes again and again, and a page that the system hands out
//! anew costs a fault and a write of zeros. What is freed waits here for the next buffer of about its size.
//!
//! It never raises the peak: blocks that wait and blocks that are in use together are at most what was in use at once
//! at some time since the last [`Memory::release`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

/// Alignment of every block: that of every tensor in an arena.
pub(crate) const ALIGN: usize = 256;
/// From here on a block takes what it needs for its alignment with it.
const LARGE: usize = 1 << 17;
/// From here on a block asks for huge pages: it may hold one.
#[cfg(target_os = "linux")]
const HUGE: usize = 1 << 21;
/// The alignment that every allocation has.
const EASY: usize = 16;
/// Smaller blocks go to the system at once, whose free lists serve them well.
const LEAST: usize = 4096;
/// A block may serve a request that is smaller than it by this part of the request: sizes repeat, but rows that come
/// from other ranks vary a little.
const WASTE: usize = 32;

/// Bytes from the system. They are zeroed when they come and whatever they were left at when they come back from
/// [`Memory`]: always initialised.
pub(crate) struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
    /// Bytes before `ptr` that were taken for its alignment.
    shift: usize,
}

// SAFETY: a block owns its memory, as a Vec does.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// No memory.
    pub(crate) const EMPTY: Self = Self { ptr: NonNull::<AlignedByte>::dangling().cast(), bytes: 0, shift: 0 };

    /// `bytes` zeros.
    pub(crate) fn zeros(bytes: usize) -> Self {
        if bytes == 0 {
            return Self::EMPTY;
        }
        let layout = Self::layout(bytes);
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(raw) = NonNull::new(raw) else { handle_alloc_error(layout) };
        advise(raw, layout.size());
        let shift = raw.as_ptr().addr().next_multiple_of(ALIGN) - raw.as_ptr().addr();
        // SAFETY: the layout is aligned as wanted, so that there is no shift, or has room for one.
        let ptr = unsafe { raw.add(shift) };
        Self { ptr, bytes, shift }
    }

    /// The first byte, aligned to [`ALIGN`].
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// All bits set, of every byte: NaN as a float of any width, -1 as an integer.
    fn poison(&mut self) {
        // SAFETY: the block owns so many bytes.
        unsafe { self.ptr.as_ptr().write_bytes(0xff, self.bytes) }
    }

    /// Large blocks are aligned here. Of an allocator that aligns, glibc's above all, they would come with zeros written
    /// by hand to every page instead of pages that read as zero, and a hole that one has left would not fit the next.
    fn layout(bytes: usize) -> Layout {
        let (size, align) = if bytes < LARGE { (Some(bytes), ALIGN) } else { (bytes.checked_add(ALIGN - EASY), EASY) };
        let layout = size.and_then(|size| Layout::from_size_align(size, align).ok());
        layout.expect("a buffer's size fits the address space")
    }
}

/// Asks for huge pages below a large block, before anything touches it: a walk through 4 KiB pages ends a prefetch and
/// looks up a translation for each. Where the system gives them unasked or not at all, nothing changes.
#[cfg(target_os = "linux")]
fn advise(raw: NonNull<u8>, bytes: usize) {
    use rustix::mm::{Advice, madvise};
    /// Of a system with larger pages the advice is an error, and none is taken.
    const PAGE: usize = 4096;
    if bytes < HUGE {
        return;
    }
    // Pages that it shares with its neighbours included, so that advised blocks side by side are one range to the system.
    let before = raw.addr().get() % PAGE;
    let len = (before + bytes).next_multiple_of(PAGE);
    // SAFETY: advice changes no bytes, and the pages hold the block.
    let _ = unsafe { madvise(raw.as_ptr().wrapping_sub(before).cast(), len, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_raw: NonNull<u8>, _bytes: usize) {}

/// Gives the dangling pointer of an empty block its alignment.
#[repr(align(256))]
struct AlignedByte;

impl Drop for Block {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `zeros` with the same layout, `shift` bytes before.
            unsafe { dealloc(self.ptr.as_ptr().sub(self.shift), Self::layout(self.bytes)) }
        }
    }
}

/// Blocks of one device that wait to be used again.
#[derive(Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By size.
    waiting: BTreeMap<usize, Vec<Block>>,
    waiting_bytes: usize,
    used: usize,
    /// Largest `used` since the last release.
    peak: usize,
}

impl Memory {
    /// At least `bytes` bytes of whatever content. With debug assertions they read as NaN and as -1, so that a test
    /// sees an element that an operation was to write and did not.
    pub(crate) fn take(&self, bytes: usize) -> Block {
        let mut block = if bytes < LEAST { Block::zeros(bytes) } else { self.lock().take(bytes) };
        if cfg!(debug_assertions) {
            block.poison();
        }
        block
    }

    /// Takes a block of [`Memory::take`] back.
    pub(crate) fn give(&self, block: Block) {
        if block.bytes >= LEAST {
            self.lock().give(block);
        }
    }

    /// Hands all that waits back to the system, and forgets the peak.
    pub(crate) fn release(&self) {
        let mut s = self.lock();
        s.waiting.clear();
        s.waiting_bytes = 0;
        s.peak = s.used;
    }

    #[cfg(test)]
    pub(crate) fn peak(&self) -> usize {
        self.lock().peak
    }

    /// What can panic under the lock, a size that no address space has, leaves counts behind that are too large, no block.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn take(&mut self, bytes: usize) -> Block {
        let fitting = self.waiting.range(bytes..=bytes + bytes / WASTE).next().map(|(&size, _)| size);
        if let Some(block) = fitting.and_then(|size| self.remove(size)) {
            self.use_more(block.bytes);
            return block;
        }
        self.use_more(bytes);
        while self.used + self.waiting_bytes > self.peak && self.waiting_bytes > 0 {
            self.drop_one(self.used + self.waiting_bytes - self.peak);
        }
        Block::zeros(bytes)
    }

    fn use_more(&mut self, bytes: usize) {
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }

    fn give(&mut self, block: Block) {
        self.used -= block.bytes;
        self.waiting_bytes += block.bytes;
        self.waiting.entry(block.bytes).or_default().push(block);
    }

    /// Hands back the smallest block that covers the excess, or else the largest.
    fn drop_one(&mut self, excess: usize) {
        let covers = self.waiting.range(excess..).next().or_else(|| self.waiting.last_key_value());
        if let Some(size) = covers.map(|(&size, _)| size) {
            drop(self.remove(size));
        }
    }

    fn remove(&mut self, size: usize) -> Option<Block> {
        let blocks = self.waiting.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.waiting.remove(&size);
        }
        self.waiting_bytes -= block.as_ref().map_or(0, |b| b.bytes);
        block
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let s = self.lock();
        write!(f, "Memory({} used, {} waiting, peak {})", s.used, s.waiting_bytes, s.peak)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(m: &Memory) -> (usize, usize, usize) {
        let s = m.lock();
        let sum: usize = s.waiting.values().flatten().map(|b| b.bytes).sum();
        assert_eq!(sum, s.waiting_bytes);
        (s.used, s.waiting_bytes, s.peak)
    }

    #[test]
    fn a_block_comes_back_for_about_its_size() {
        let m = Memory::default();
        let a = m.take(9000);
        let at = a.ptr();
        m.give(a);
        assert_eq!(counts(&m), (0, 9000, 9000));
        let b = m.take(8800);
        assert_eq!((b.ptr(), b.bytes), (at, 9000));
        assert_eq!(counts(&m), (9000, 0, 9000));
        m.give(b);
        // Too large: another block, for which this one has to go.
        let c = m.take(8000);
        assert_eq!((c.bytes, counts(&m)), (8000, (8000, 0, 9000)));
        m.give(c);
        // Too small.
        let d = m.take(8001);
        assert_eq!((d.bytes, counts(&m)), (8001, (8001, 0, 9000)));
    }

    #[test]
    fn what_waits_never_adds_to_the_peak() {
        let m = Memory::default();
        let mut held: Vec<Block> = Vec::new();
        let mut most = 0;
        for i in 0..2000usize {
            // Sizes and order without a pattern that would suit it.
            let r = i.wrapping_mul(2_654_435_761) >> 7;
            if held.len() > 12 || (r.is_multiple_of(3) && !held.is_empty()) {
                m.give(held.swap_remove(r % held.len()));
            } else {
                held.push(m.take(LEAST + r % 37 * 1000));
            }
            let used = held.iter().map(|b| b.bytes).sum::<usize>();
            most = most.max(used);
            let (counted, waiting, peak) = counts(&m);
            assert_eq!((counted, peak), (used, most));
            assert!(used + waiting <= most);
        }
        held.drain(..).for_each(|b| m.give(b));
        m.release();
        assert_eq!(counts(&m), (0, 0, 0));
    }

    #[test]
    fn small_blocks_do_not_wait() {
        let m = Memory::default();
        for bytes in [0, 1, LEAST - 1] {
            let b = m.take(bytes);
            assert_eq!(b.bytes, bytes);
            m.give(b);
        }
        assert_eq!(counts(&m), (0, 0, 0));
    }

    #[test]
    fn blocks_are_aligned_and_zeroed() {
        for bytes in [0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 77] {
            let b = Block::zeros(bytes);
            assert_eq!(b.ptr().as_ptr().addr() % ALIGN, 0, "{bytes}");
            // SAFETY: a block has so many initialised bytes.
            let all = unsafe { std::slice::from_raw_parts(b.ptr().as_ptr(), bytes) };
            assert!(all.iter().all(|&x| x == 0), "{bytes}");
        }
    }
}
