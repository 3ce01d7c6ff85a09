//! How cells are made of elements.

use crate::isa::{Isa, interleave};
use crate::panel::pair;
use crate::{Elem, bf16};

/// A kind of cells, and of the elements that they are made of.
pub trait Source {
    type T: Elem;
    /// Steps of k in a cell.
    const DEPTH: usize;
    /// The cells of one outer index, from its elements at consecutive k, of which there may be one too few for the last.
    fn of_row(from: &[Self::T], cells: &mut [u32]);
    /// One cell for each outer index, from the elements at its steps of k; `next` is empty where there is no second.
    fn of_steps(first: &[Self::T], next: &[Self::T], cells: &mut [u32]);
    /// As `of_steps`, of both steps and a number of outer indices that is known.
    #[inline(always)]
    fn of_whole_steps<const N: usize>(_: Isa, first: &[Self::T; N], next: &[Self::T; N], cells: &mut [u32; N]) {
        Self::of_steps(first, next, cells);
    }
}

/// One f32.
pub struct Single;
/// One bf16, widened.
pub struct Widened;
/// Two bf16.
pub struct Pair;
/// Two of what is still f32, rounded here.
pub struct RoundedPair;

impl Source for Single {
    type T = f32;
    const DEPTH: usize = 1;
    #[inline(always)]
    fn of_row(from: &[f32], cells: &mut [u32]) {
        cells.iter_mut().zip(from).for_each(|(c, x)| *c = x.to_bits());
    }
    #[inline(always)]
    fn of_steps(first: &[f32], _: &[f32], cells: &mut [u32]) {
        Self::of_row(first, cells);
    }
}

impl Source for Widened {
    type T = bf16;
    const DEPTH: usize = 1;
    #[inline(always)]
    fn of_row(from: &[bf16], cells: &mut [u32]) {
        cells.iter_mut().zip(from).for_each(|(c, x)| *c = x.f32().to_bits());
    }
    #[inline(always)]
    fn of_steps(first: &[bf16], _: &[bf16], cells: &mut [u32]) {
        Self::of_row(first, cells);
    }
    #[inline(always)]
    fn of_whole_steps<const N: usize>(isa: Isa, first: &[bf16; N], _: &[bf16; N], cells: &mut [u32; N]) {
        interleave(isa, None, first, cells);
    }
}

impl Source for Pair {
    type T = bf16;
    const DEPTH: usize = 2;
    #[inline(always)]
    fn of_row(from: &[bf16], cells: &mut [u32]) {
        let (pairs, odd) = from.as_chunks::<2>();
        cells.iter_mut().zip(pairs).for_each(|(c, x)| *c = pair(x[0], x[1]));
        if let [last] = odd {
            cells[pairs.len()] = pair(*last, bf16::ZERO);
        }
    }
    #[inline(always)]
    fn of_steps(first: &[bf16], next: &[bf16], cells: &mut [u32]) {
        if next.is_empty() {
            cells.iter_mut().zip(first).for_each(|(c, x)| *c = pair(*x, bf16::ZERO));
        } else {
            cells.iter_mut().zip(first.iter().zip(next)).for_each(|(c, (x, y))| *c = pair(*x, *y));
        }
    }
    #[inline(always)]
    fn of_whole_steps<const N: usize>(isa: Isa, first: &[bf16; N], next: &[bf16; N], cells: &mut [u32; N]) {
        interleave(isa, Some(first), next, cells);
    }
}

#[inline(always)]
fn rounded(low: f32, high: f32) -> u32 {
    pair(Elem::round(low), Elem::round(high))
}

impl Source for RoundedPair {
    type T = f32;
    const DEPTH: usize = 2;
    #[inline(always)]
    fn of_row(from: &[f32], cells: &mut [u32]) {
        let (pairs, odd) = from.as_chunks::<2>();
        cells.iter_mut().zip(pairs).for_each(|(c, x)| *c = rounded(x[0], x[1]));
        if let [last] = odd {
            cells[pairs.len()] = rounded(*last, 0.0);
        }
    }
    #[inline(always)]
    fn of_steps(first: &[f32], next: &[f32], cells: &mut [u32]) {
        if next.is_empty() {
            cells.iter_mut().zip(first).for_each(|(c, x)| *c = rounded(*x, 0.0));
        } else {
            cells.iter_mut().zip(first.iter().zip(next)).for_each(|(c, (x, y))| *c = rounded(*x, *y));
        }
    }
}
