//! Memory of activations, reused: a step allocates the same sizes again and again, and memory that comes anew costs a
//! fault for each page or a write of zeros, before anything of use is written. So a device keeps what it has once had,
//! and cuts from it what is asked for next ([`Arena`]).
//!
//! What it holds is what was in use at once at some time since the last [`Memory::release`], and the holes between.

mod arena;

use arena::Arena;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
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

/// Bytes from the system, which begin as zeros, or from a device's [`Memory`], which are whatever they were left at:
/// always initialised.
pub(crate) struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
    /// Bytes before `ptr` that were taken for its alignment; None of a block that has to go back to its memory.
    shift: Option<usize>,
}

// SAFETY: a block owns its memory, as a Vec does.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    /// No memory.
    pub(crate) const EMPTY: Self = Self { ptr: NonNull::<AlignedByte>::dangling().cast(), bytes: 0, shift: None };

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
        Self { ptr, bytes, shift: Some(shift) }
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
    /// Of a system with larger pages the advice is an error, or of the whole page that the end is in.
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
        if let Some(shift) = self.shift {
            // SAFETY: allocated by `zeros` with the same layout, `shift` bytes before.
            unsafe { dealloc(self.ptr.as_ptr().sub(shift), Self::layout(self.bytes)) }
        }
    }
}

/// What the blocks of one device are cut from.
#[derive(Default)]
pub(crate) struct Memory {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    arena: Arena,
    used: usize,
    /// Largest `used` since the last release.
    peak: usize,
}

/// Memory of a device's activations, in bytes; buffers below a page are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// What buffers have.
    pub now: usize,
    /// The most that they had at once since memory was last released.
    pub peak: usize,
    /// What is held for them, holes included.
    pub held: usize,
}

impl Memory {
    /// `bytes` bytes of whatever content. With debug assertions they read as NaN and as -1, so that a test
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

    /// Hands all that is not in use back to the system, and forgets the peak.
    pub(crate) fn release(&self) {
        let mut s = self.lock();
        s.arena.release();
        s.peak = s.used;
    }

    pub(crate) fn in_use(&self) -> InUse {
        let s = self.lock();
        InUse { now: s.used, peak: s.peak, held: s.arena.extent() }
    }

    /// What can panic under the lock, a size that no address space has, comes before anything is changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn take(&mut self, bytes: usize) -> Block {
        let ptr = self.arena.take(bytes);
        self.used += bytes;
        self.peak = self.peak.max(self.used);
        Block { ptr, bytes, shift: None }
    }

    fn give(&mut self, block: Block) {
        self.used -= block.bytes;
        self.arena.give(block.ptr, block.bytes);
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.in_use().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_for_what_fits_it() {
        let m = Memory::default();
        let a = m.take(9000);
        let at = a.ptr();
        m.give(a);
        assert_eq!(m.in_use(), InUse { now: 0, peak: 9000, held: 9216 });
        // Two of half the size lie side by side where it was.
        let [b, c] = [m.take(4500), m.take(4500)];
        // SAFETY: within the block that was there.
        assert_eq!((b.ptr(), c.ptr()), (at, unsafe { at.add(4608) }));
        assert_eq!(m.in_use(), InUse { now: 9000, peak: 9000, held: 9216 });
        let d = m.take(8000);
        assert_eq!(m.in_use(), InUse { now: 17_000, peak: 17_000, held: 9216 + 8192 });
        [b, c, d].into_iter().for_each(|b| m.give(b));
        assert_eq!(m.in_use(), InUse { now: 0, peak: 17_000, held: 9216 + 8192 });
        m.release();
        assert_eq!(m.in_use(), InUse::default());
    }

    /// A step like the one before needs no more than that one held.
    #[test]
    fn steps_that_repeat_hold_no_more() {
        let m = Memory::default();
        let mut held = 0;
        for step in 0..4 {
            let mut blocks: Vec<Block> = Vec::new();
            for i in 0..2000usize {
                // Sizes and order without a pattern that would suit it.
                let r = i.wrapping_mul(2_654_435_761) >> 7;
                if blocks.len() > 12 || (r.is_multiple_of(3) && !blocks.is_empty()) {
                    m.give(blocks.swap_remove(r % blocks.len()));
                } else {
                    blocks.push(m.take(LEAST + r % 37 * 1000));
                }
            }
            blocks.drain(..).for_each(|b| m.give(b));
            let now = m.in_use();
            held = if step == 0 { now.held } else { held };
            assert_eq!((now.now, now.held), (0, held));
            assert!(held <= now.peak + now.peak / 2, "{now:?}");
        }
    }

    #[test]
    fn small_blocks_do_not_wait() {
        let m = Memory::default();
        for bytes in [0, 1, LEAST - 1] {
            let b = m.take(bytes);
            assert_eq!(b.bytes, bytes);
            m.give(b);
        }
        assert_eq!(m.in_use(), InUse::default());
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
