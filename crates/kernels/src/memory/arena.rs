//! Address space that blocks are cut from, one behind the other, and holes where blocks were. A block goes into the
//! smallest hole that holds it, or behind the last block; holes side by side are one, and one at the end is none. So a step
//! that asks for the same sizes in the same order as the step before gets the same places.
//!
//! A span of it is reserved for more than any machine has, and opened as blocks reach further; what was never reached is
//! not memory. Where a system reserves nothing, a span is as large as the block that it was made for.

use super::{ALIGN, Block};
use std::collections::BTreeMap;
use std::ptr::NonNull;

/// Spans of address space in the order in which they were made.
#[derive(Default)]
pub(super) struct Arena {
    spans: Vec<Span>,
}

/// Blocks and holes, and behind them what no block has reached.
struct Span {
    room: Room,
    /// Where the last block ends.
    end: usize,
    /// The farthest that this has been.
    reached: usize,
    /// Length of each hole by its begin; none is empty, and none touches another or the end.
    holes: BTreeMap<usize, usize>,
}

impl Arena {
    /// The place of `bytes` bytes, not none, that are initialised: zeros, or what a block left there.
    pub(super) fn take(&mut self, bytes: usize) -> NonNull<u8> {
        let bytes = bytes.checked_next_multiple_of(ALIGN).expect("a buffer's size fits the address space");
        let holes = self.spans.iter().enumerate().filter_map(|(i, span)| Some((span.hole(bytes)?, i)));
        if let Some(((_, at), i)) = holes.min() {
            return self.spans[i].fill(at, bytes);
        }
        let fits = self.spans.iter_mut().filter(|span| span.left() >= bytes).min_by_key(|span| span.left());
        fits.and_then(|span| span.extend(bytes)).unwrap_or_else(|| {
            self.spans.push(Span { room: Room::new(bytes), end: 0, reached: 0, holes: BTreeMap::new() });
            let span = self.spans.last_mut().and_then(|span| span.extend(bytes));
            span.expect("a span has room for the block that it was made for")
        })
    }

    /// Takes the place of a block of so many bytes back.
    pub(super) fn give(&mut self, at: NonNull<u8>, bytes: usize) {
        let span = self.spans.iter_mut().find(|span| span.room.contains(at));
        span.expect("a block lies in a span").free(at, bytes.next_multiple_of(ALIGN));
    }

    /// Hands pages without blocks back to the system.
    pub(super) fn release(&mut self) {
        self.spans.retain(|span| span.end > 0);
        self.spans.iter_mut().for_each(Span::release);
    }

    /// Bytes that blocks have reached, holes included.
    pub(super) fn extent(&self) -> usize {
        self.spans.iter().map(|span| span.reached).sum()
    }
}

impl Span {
    /// Length and begin of the smallest hole for so many bytes, the first of those.
    fn hole(&self, bytes: usize) -> Option<(usize, usize)> {
        self.holes.iter().filter(|&(_, &len)| len >= bytes).map(|(&at, &len)| (len, at)).min()
    }

    /// The first bytes of a hole.
    fn fill(&mut self, at: usize, bytes: usize) -> NonNull<u8> {
        let len = self.holes.remove(&at).expect("a hole begins there");
        if len > bytes {
            self.holes.insert(at + bytes, len - bytes);
        }
        self.room.at(at)
    }

    /// Bytes behind the last block that are none's.
    fn left(&self) -> usize {
        self.room.len - self.end
    }

    /// Bytes behind the last block, if there is room.
    fn extend(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let at = self.end;
        let end = at.checked_add(bytes).filter(|&end| end <= self.room.len)?;
        self.room.open(end);
        (self.end, self.reached) = (end, self.reached.max(end));
        Some(self.room.at(at))
    }

    fn free(&mut self, at: NonNull<u8>, mut bytes: usize) {
        let mut at = at.addr().get() - self.room.base.addr().get();
        bytes += self.holes.remove(&(at + bytes)).unwrap_or(0);
        if let Some((&before, &len)) = self.holes.range(..at).next_back().filter(|&(b, len)| b + len == at) {
            self.holes.remove(&before);
            (at, bytes) = (before, len + bytes);
        }
        if at + bytes == self.end {
            self.end = at;
        } else {
            self.holes.insert(at, bytes);
        }
    }

    fn release(&mut self) {
        self.holes.iter().for_each(|(&at, &len)| self.room.forget(at, len));
        self.room.forget(self.end, self.reached - self.end);
        self.reached = self.end;
    }
}

/// The address space of a span: initialised memory as far as it is open.
struct Room {
    base: NonNull<u8>,
    len: usize,
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "held for its memory"))]
    of: Of,
}

enum Of {
    /// The system's allocator; all of it is open.
    Allocator(#[expect(dead_code, reason = "held for its memory")] Block),
    /// A mapping of `bytes` from `start` on, of which so many behind the base are open.
    #[cfg(target_os = "linux")]
    Mapping { start: NonNull<u8>, bytes: usize, open: usize },
}

// SAFETY: a room owns its memory, as a Vec does.
unsafe impl Send for Room {}

impl Room {
    fn new(bytes: usize) -> Self {
        #[cfg(target_os = "linux")]
        if let Some(room) = pages::reserve(bytes) {
            return room;
        }
        let block = Block::zeros(bytes);
        Self { base: block.ptr(), len: bytes, of: Of::Allocator(block) }
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: blocks lie within the room.
        unsafe { self.base.add(offset) }
    }

    fn contains(&self, at: NonNull<u8>) -> bool {
        (self.base.addr().get()..self.base.addr().get() + self.len).contains(&at.addr().get())
    }

    /// Lets blocks reach `end`.
    fn open(&mut self, end: usize) {
        #[cfg(target_os = "linux")]
        pages::open(self, end);
        #[cfg(not(target_os = "linux"))]
        let _ = end;
    }

    /// Hands whole pages of a part back; they read as zeros from then on.
    fn forget(&self, at: usize, len: usize) {
        #[cfg(target_os = "linux")]
        pages::forget(self, at, len);
        #[cfg(not(target_os = "linux"))]
        let _ = (at, len);
    }
}

#[cfg(target_os = "linux")]
mod pages {
    use super::{Of, Room};
    use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};
    use rustix::process::{Resource, getrlimit};
    use std::alloc::{Layout, handle_alloc_error};
    use std::ptr::{NonNull, null_mut};

    /// A span's address space; none to spare where addresses have 32 bits.
    const RESERVED: usize = (1u64 << 36) as usize;
    /// Of a process that may not have any amount of address space, a span takes this part of what it may have.
    const PART: u64 = 64;
    /// Spans begin at, and are opened by, what a huge page holds.
    const HUGE: usize = 1 << 21;
    pub fn reserve(bytes: usize) -> Option<Room> {
        let least = bytes.checked_next_multiple_of(HUGE)?;
        let allowed = getrlimit(Resource::As).current.and_then(|bytes| usize::try_from(bytes / PART).ok());
        let mut len = allowed.map_or(RESERVED, |bytes| bytes / HUGE * HUGE).max(least);
        loop {
            let all = len.checked_add(HUGE)?;
            // SAFETY: a new mapping at an address that the system chooses.
            let mapped = unsafe { mmap_anonymous(null_mut(), all, ProtFlags::empty(), MapFlags::PRIVATE) };
            if let Some(start) = mapped.ok().and_then(|at| NonNull::new(at.cast::<u8>())) {
                // A walk through 4 KiB pages ends a prefetch and looks up a translation for each. Where the system
                // gives huge pages unasked or not at all, nothing changes.
                // SAFETY: advice on the mapping changes no bytes.
                let _ = unsafe { madvise(start.as_ptr().cast(), all, Advice::LinuxHugepage) };
                let shift = start.addr().get().next_multiple_of(HUGE) - start.addr().get();
                // SAFETY: the mapping has room for the shift.
                let base = unsafe { start.add(shift) };
                return Some(Room { base, len, of: Of::Mapping { start, bytes: all, open: 0 } });
            }
            if len == least {
                return None;
            }
            len = least.max(len / 2);
        }
    }

    pub fn open(room: &mut Room, end: usize) {
        let Of::Mapping { open, .. } = &mut room.of else { return };
        if end <= *open {
            return;
        }
        let more = end.next_multiple_of(HUGE) - *open;
        let flags = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: within the mapping, whose pages beyond what is open nobody has.
        if unsafe { mprotect(room.base.add(*open).as_ptr().cast(), more, flags) }.is_err() {
            handle_alloc_error(Layout::from_size_align(more, HUGE).expect("less than the room"));
        }
        *open += more;
    }

    pub fn forget(room: &Room, at: usize, len: usize) {
        // Whole pages: what the system is told of a part of one it takes to be of all of it.
        let page = rustix::param::page_size();
        let (first, end) = (at.next_multiple_of(page), (at + len) / page * page);
        if matches!(room.of, Of::Mapping { .. }) && first < end {
            // SAFETY: pages of an open part in which no block lies.
            let _ = unsafe { madvise(room.base.add(first).as_ptr().cast(), end - first, Advice::LinuxDontNeed) };
        }
    }

    impl Drop for Room {
        fn drop(&mut self) {
            if let Of::Mapping { start, bytes, .. } = self.of {
                // SAFETY: mapped by `reserve`, and no block lies in it any more.
                let _ = unsafe { munmap(start.as_ptr().cast(), bytes) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of sizes and an order without a pattern: none overlaps another, and all of it is one hole in the end.
    #[test]
    fn blocks_never_overlap() {
        let mut arena = Arena::default();
        let mut held: Vec<(NonNull<u8>, usize)> = Vec::new();
        for i in 0..3000usize {
            let r = i.wrapping_mul(2_654_435_761) >> 7;
            if held.len() > 20 || (r.is_multiple_of(3) && !held.is_empty()) {
                let (at, bytes) = held.swap_remove(r % held.len());
                arena.give(at, bytes);
            } else {
                let bytes = 1 + r % 41 * 777;
                let at = arena.take(bytes);
                assert_eq!(at.addr().get() % ALIGN, 0);
                // SAFETY: the block has so many bytes.
                unsafe { at.as_ptr().write_bytes(r as u8, bytes) }
                let apart = |(b, len): &(NonNull<u8>, usize)| {
                    at.addr().get() + bytes <= b.addr().get() || b.addr().get() + len <= at.addr().get()
                };
                assert!(held.iter().all(apart), "turn {i}");
                held.push((at, bytes));
            }
        }
        held.into_iter().for_each(|(at, bytes)| arena.give(at, bytes));
        assert!(arena.spans.iter().all(|s| s.holes.is_empty() && s.end == 0 && s.reached > 0));
        arena.release();
        assert_eq!(arena.extent(), 0);
    }

    /// Where a span is one block's the order is another.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_smallest_hole_is_filled_and_the_end_moves() {
        let mut arena = Arena::default();
        let [a, _b, c, d] = [3, 1, 2, 1].map(|n| arena.take(n * ALIGN));
        let e = arena.take(4 * ALIGN);
        arena.give(a, 3 * ALIGN);
        arena.give(c, 2 * ALIGN);
        assert_eq!(arena.take(ALIGN + 1), c);
        assert_eq!(arena.take(ALIGN), a);
        assert_eq!(arena.extent(), 11 * ALIGN);
        arena.give(e, 4 * ALIGN);
        assert_eq!(arena.take(5 * ALIGN), e);
        assert_eq!(arena.extent(), 12 * ALIGN);
        arena.give(d, ALIGN);
        assert_eq!(arena.take(ALIGN), d);
    }

    /// Pages that went back to the system read as zeros, also behind the last block; others stay.
    #[test]
    fn what_is_released_is_initialised() {
        let mut arena = Arena::default();
        let bytes = 5 << 20;
        let [a, b, c] = [bytes; 3].map(|n| arena.take(n));
        for at in [a, b, c] {
            // SAFETY: the block has so many bytes.
            unsafe { at.as_ptr().write_bytes(7, bytes) }
        }
        arena.give(a, bytes);
        arena.give(c, bytes);
        arena.release();
        // SAFETY: as above.
        let all =
            |at: NonNull<u8>, x: u8| unsafe { std::slice::from_raw_parts(at.as_ptr(), bytes) }.iter().all(|&y| y == x);
        assert!(all(b, 7));
        if cfg!(target_os = "linux") {
            assert_eq!(arena.extent(), 2 * bytes);
            assert_eq!((arena.take(bytes), arena.take(bytes)), (a, c));
            assert!(all(a, 0) && all(c, 0));
        }
    }
}
