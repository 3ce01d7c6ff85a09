//! Reading an operand that k runs across: at each step of k the elements of all outer indices lie together.

use super::source::Source;
use crate::isa::{Cache, Isa, LINE, ask};
use crate::panel::{Operand, Part};

/// The elements at one step of k of the part, of `count` of its outer indices from `first` on; none beyond the end of k.
#[inline(always)]
pub fn elements<'a, T>(src: &'a [T], op: &Operand<'_>, p: &Part, k: usize, first: usize, count: usize) -> &'a [T] {
    if k < p.kc { &src[op.row(p.k0 + k) + p.first + first..][..count] } else { &[] }
}

/// Cells that are packed of all lanes or rows before the next: few enough that what is read stays in the first-level cache,
/// and so many that what is written lies together.
pub const TOGETHER: usize = 8;

/// The elements of the cells that are packed together.
pub struct Together<'a, S: Source> {
    /// At both steps of k of each cell those of all outer indices; at the second none where a cell has one.
    steps: [[&'a [S::T]; 2]; TOGETHER],
    /// Outer indices.
    count: usize,
    /// Cells that are packed, zeros where k has ended.
    cells: usize,
    /// Whether k goes through all of them, so that nothing has to be looked at one by one.
    whole: bool,
    /// Where the steps of the next cells begin. Those behind the last lie anywhere.
    next: [*const S::T; 2 * TOGETHER],
}

impl<'a, S: Source> Together<'a, S> {
    /// Those from cell `c0` on.
    #[inline(always)]
    pub fn new(src: &'a [S::T], op: &Operand<'_>, p: &Part, c0: usize) -> Self {
        let steps = std::array::from_fn(|c| {
            let k = (c0 + c) * S::DEPTH;
            let next = if S::DEPTH > 1 { elements(src, op, p, k + 1, 0, p.count) } else { &[] };
            [elements(src, op, p, k, 0, p.count), next]
        });
        let next = std::array::from_fn(|i| {
            let k = p.k0 + (c0 + TOGETHER) * S::DEPTH + i;
            let is_there = op.tokens.is_none_or(|tokens| k < tokens.len());
            src.as_ptr().wrapping_add(if is_there { op.row(k).wrapping_add(p.first) } else { 0 })
        });
        let whole = (c0 + TOGETHER) * S::DEPTH <= p.kc;
        Self { steps, count: p.count, cells: TOGETHER.min(p.cells - c0), whole, next }
    }

    /// Asks for `N` outer indices from `l` on of the next cells.
    #[inline(always)]
    pub fn ask_for_next<const N: usize>(&self, l: usize) {
        for start in &self.next[..TOGETHER * S::DEPTH] {
            let x = start.wrapping_add(l).cast::<u8>();
            for line in (0..N * size_of::<S::T>()).step_by(LINE) {
                ask(Cache::Second, x.wrapping_add(line));
            }
        }
    }

    /// Writes each cell of `N` outer indices from `l` on, `apart` words from one cell to the next; zeros where there is no such index.
    #[inline(always)]
    pub fn write<const N: usize>(&self, isa: Isa, l: usize, apart: usize, to: &mut [u32]) {
        if self.whole && l + N <= self.count && to.len() >= (TOGETHER - 1) * apart + N {
            for (c, x) in self.steps.iter().enumerate() {
                debug_assert!(x[0].len() == self.count && (S::DEPTH == 1 || x[1].len() == self.count));
                // SAFETY: every step has `count` elements, and `to` as many words as was just found.
                unsafe {
                    let [first, next] =
                        [x[0], if S::DEPTH > 1 { x[1] } else { x[0] }].map(|x| &*x.as_ptr().add(l).cast());
                    S::of_whole_steps::<N>(isa, first, next, &mut *to.as_mut_ptr().add(c * apart).cast());
                }
            }
            return;
        }
        for (c, x) in self.steps.iter().enumerate().take(self.cells) {
            let [first, next] = x.map(|x| x.get(l..).unwrap_or(&[]));
            let to = to[c * apart..].first_chunk_mut().expect("room for whole groups or blocks");
            write_some::<S, N>(isa, first, next, to);
        }
    }
}

/// One cell of up to `N` outer indices, and zeros for those that are not there.
#[inline(always)]
fn write_some<S: Source, const N: usize>(isa: Isa, first: &[S::T], next: &[S::T], to: &mut [u32; N]) {
    // With a cell of one step there is no next.
    let whole = if S::DEPTH > 1 { next.first_chunk() } else { first.first_chunk() };
    match (first.first_chunk(), whole) {
        (Some(first), Some(next)) => S::of_whole_steps::<N>(isa, first, next, to),
        _ => {
            let count = first.len().min(N);
            S::of_steps(&first[..count], &next[..count.min(next.len())], &mut to[..count]);
            to[count..].fill(0);
        }
    }
}
