//! Attention of bf16 on AMX's tiles: a task is one head of one sequence (forward: or a part of its queries).
//!
//! All that is multiplied lies in tiles, each a kilobyte of its own: 16 rows of 16 cells, pairs of bf16. Keys and values
//! are laid out so once for a task and stay in its core's second-level cache; head dims are filled up with zeros to
//! multiples of 32, sequences to groups of 32 tokens. Scores are `[keys][queries]` as on panels: what a query has of its
//! own is then a lane, and a block of 32 keys by 32 queries is four tiles. While the tile unit computes one block of
//! scores, the vector units turn the block before into weights, a little after every product.

mod backward;
mod forward;
mod gradients;
mod pack;
mod weights;

use super::{Problem, Shape};
use crate::isa::{Level, TILE_COLUMNS, Tiles, prefetch};
use crate::{AlignedVec, Cpu, DType, bf16};
use std::cell::Cell;

pub use backward::backward;
pub use forward::forward;

/// A tile: 16 rows of 16 words.
type Tile = [u32; TILE_WORDS];
const TILE_WORDS: usize = TILE_COLUMNS * TILE_COLUMNS;
/// Bytes from one of its rows to the next.
const TILE_ROW: usize = 4 * TILE_COLUMNS;

/// Tokens of a group: two tiles of them.
const GROUP: usize = 32;

/// Whether these functions compute such a call.
pub fn takes(cpu: &Cpu, dtype: DType) -> bool {
    dtype == DType::Bf16 && cpu.isa().level() == Level::Amx
}

/// Sizes in tiles.
#[derive(Clone, Copy)]
struct Sizes {
    /// Steps of 32 elements that hold a head's P + R, and W.
    d: usize,
    w: usize,
}

impl Sizes {
    fn new(s: &Shape) -> Self {
        Self { d: (s.nope + s.rope).div_ceil(GROUP), w: s.v.div_ceil(GROUP) }
    }
}

/// Where keys, queries and their number begin for one sequence.
#[derive(Clone, Copy)]
struct Sequence {
    q: usize,
    q_len: usize,
    k: usize,
    k_len: usize,
}

impl Sequence {
    fn new(x: &Problem<'_>, s: usize) -> Self {
        let (q, k) = (x.cu_q[s] as usize, x.cu_k[s] as usize);
        Self { q, q_len: x.cu_q[s + 1] as usize - q, k, k_len: x.cu_k[s + 1] as usize - k }
    }

    /// How many keys query i of the sequence sees; not positive where it sees none.
    fn visible(&self, i: usize) -> i64 {
        self.k_len as i64 - self.q_len as i64 + 1 + i as i64
    }

    /// Groups of keys that queries before `end` see anything of.
    fn groups(&self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.visible(end - 1).max(0) as usize).div_ceil(GROUP) }
    }
}

/// Reads a tile.
#[inline(always)]
unsafe fn load<T: Tiles, const R: u8>(tile: &Tile) {
    // SAFETY: a tile is what is read; its registers are the caller's.
    unsafe { T::load::<R>(tile.as_ptr().cast(), TILE_ROW) }
}

/// Reads a tile that passes by.
#[inline(always)]
unsafe fn load_once<T: Tiles, const R: u8>(tile: &Tile) {
    // SAFETY: as above.
    unsafe { T::load_once::<R>(tile.as_ptr().cast(), TILE_ROW) }
}

/// Writes a tile.
#[inline(always)]
unsafe fn store<T: Tiles, const R: u8>(tile: &mut Tile) {
    // SAFETY: as above.
    unsafe { T::store::<R>(tile.as_mut_ptr().cast(), TILE_ROW) }
}

/// One step of a block of two tiles by two: registers 0 to 3 += rows 4 and 5 times columns 6 and 7, which the two
/// functions read. After each of the four products something is done beside them: a core sees only so many instructions
/// ahead, among which there must always be the next products.
macro_rules! step {
    ($t:ty, $a:ident $rows:expr, $b:ident $columns:expr, $beside:expr) => {{
        let (a, b): ([&Tile; 2], [&Tile; 2]) = ($rows, $columns);
        $a::<$t, 4>(a[0]);
        $b::<$t, 6>(b[0]);
        <$t>::dot::<0, 4, 6>();
        $beside;
        $b::<$t, 7>(b[1]);
        <$t>::dot::<1, 4, 7>();
        $beside;
        $a::<$t, 5>(a[1]);
        <$t>::dot::<2, 5, 6>();
        $beside;
        <$t>::dot::<3, 5, 7>();
        $beside;
    }};
}
use step;

/// Sums start at zero.
#[inline(always)]
unsafe fn zero<T: Tiles>() {
    // SAFETY: registers are the caller's.
    unsafe {
        T::zero::<0>();
        T::zero::<1>();
        T::zero::<2>();
        T::zero::<3>();
    }
}

/// Sums go on from what tiles hold: two rows of two.
#[inline(always)]
unsafe fn resume<T: Tiles>(top: &[Tile; 2], bottom: &[Tile; 2]) {
    // SAFETY: registers are the caller's.
    unsafe {
        load::<T, 0>(&top[0]);
        load::<T, 1>(&top[1]);
        load::<T, 2>(&bottom[0]);
        load::<T, 3>(&bottom[1]);
    }
}

/// Sums are kept in tiles.
#[inline(always)]
unsafe fn keep<T: Tiles>(top: &mut [Tile; 2], bottom: &mut [Tile; 2]) {
    // SAFETY: registers are the caller's.
    unsafe {
        store::<T, 0>(&mut top[0]);
        store::<T, 1>(&mut top[1]);
        store::<T, 2>(&mut bottom[0]);
        store::<T, 3>(&mut bottom[1]);
    }
}

/// Two neighbouring tiles.
#[inline(always)]
fn two(tiles: &[Tile], at: usize) -> &[Tile; 2] {
    tiles[at..at + 2].first_chunk().expect("two were taken")
}

/// As [`two`], to write.
#[inline(always)]
fn two_mut(tiles: &mut [Tile], at: usize) -> &mut [Tile; 2] {
    tiles[at..at + 2].first_chunk_mut().expect("two were taken")
}

/// Four tiles from `at` on, as two rows of two.
#[inline(always)]
fn square(tiles: &mut [Tile], at: usize) -> (&mut [Tile; 2], &mut [Tile; 2]) {
    let (top, bottom) = tiles[at..at + 4].split_at_mut(2);
    (top.first_chunk_mut().expect("two of four"), bottom.first_chunk_mut().expect("two of four"))
}

/// Rows of the tokens that come next, asked for a few at a time beside products: rows of one head lie far apart, so that
/// the hardware does not see them coming.
struct Ahead<'a> {
    rows: std::vec::IntoIter<&'a [bf16]>,
    at_once: usize,
}

impl<'a> Ahead<'a> {
    /// To be spread over so many steps.
    fn new(rows: Vec<&'a [bf16]>, steps: usize) -> Self {
        let at_once = rows.len().div_ceil(steps.max(1));
        Self { rows: rows.into_iter(), at_once }
    }

    /// A step more.
    #[inline(always)]
    fn step(&mut self) {
        self.rows.by_ref().take(self.at_once).for_each(prefetch);
    }
}

/// Scratch above this many words is freed after use instead of kept with its thread.
const KEEP: usize = 1 << 22;

/// Hands `f` tiles of unspecified content.
fn with_tiles<R>(count: usize, f: impl FnOnce(&mut [Tile]) -> R) -> R {
    thread_local!(static SCRATCH: Cell<Option<AlignedVec<u32>>> = const { Cell::new(None) });
    let words = count * TILE_WORDS;
    #[cfg(test)]
    super::scratch::TAKEN.set(super::scratch::TAKEN.get().max(words * size_of::<u32>()));
    let mut held = SCRATCH.take().filter(|held| held.len() >= words).unwrap_or_else(|| AlignedVec::zeros(words));
    let r = f(&mut held.as_chunks_mut::<TILE_WORDS>().0[..count]);
    if held.len() <= KEEP {
        SCRATCH.set(Some(held));
    }
    r
}

/// Cuts the next tiles off.
fn cut<'a>(rest: &mut &'a mut [Tile], count: usize) -> &'a mut [Tile] {
    rest.split_off_mut(..count).expect("scratch was sized for its parts")
}
