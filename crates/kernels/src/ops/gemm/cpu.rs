//! The product on the host's cores: a list of products is cut into output tiles, and the tiles are the tasks (`strips`).
//! What several tasks share of the columns is packed before.
//!
//! Lanes run over C's columns, so that what is stored is contiguous. Tiles and pieces of k follow the shape and the
//! level; the bits of an element depend on neither, since every sum is one chain over k.

mod output;
mod plan;

use super::strips::{Scratch, Tile};
use super::{few, few_tiles, tiles};
use crate::buffer::{Disjoint, Pod};
use crate::isa::Level;
use crate::panel::{self, group_width};
use crate::{AlignedVec, Cpu, ViewMut};
pub(super) use output::{Output, Segment};
pub use plan::Product;
use plan::{Columns, Share, cut, shares};
pub(super) use plan::{Piece, ROWS, SPAN, Task, apart, balanced_parts, countable, equal_parts, shared_bytes};
use std::cell::RefCell;

/// Computes all products. Their outputs follow one another in `out`, in the order of the list.
pub fn run(cpu: &Cpu, products: &[Product<'_>], out: ViewMut<'_>, accumulate: bool) {
    let mut end = 0;
    for p in products.iter().filter(|p| p.m > 0 && p.n > 0) {
        assert!(p.ldc >= p.n && p.c >= end, "outputs overlap: {p:?} begins before {end}");
        // Checked, because what tasks may write rests on it.
        let rows = (p.m - 1).checked_mul(p.ldc).and_then(|rows| rows.checked_add(p.n));
        let after = rows.and_then(|rows| rows.checked_add(p.c));
        end = after.unwrap_or_else(|| panic!("an output that ends nowhere: {p:?}"));
    }
    assert!(end <= out.len(), "outputs end at {end} of {}", out.len());
    let out = Output::new(out);
    if cpu.isa().level() == Level::Amx && products.first().is_some_and(Product::is_bf16) {
        assert!(products.iter().all(Product::is_bf16), "products of several types in one list");
        few_tiles::run(cpu, products, &out, accumulate);
        return tiles::run(cpu, products, &out, accumulate);
    }
    few::run(cpu, products, &out, accumulate);
    let isa = cpu.isa();
    let mut rounds: Vec<Vec<Columns>> = Vec::new();
    let words = cut(isa.level(), cpu.threads(), products, accumulate, |round, columns| {
        if !few::takes(isa.level(), &products[columns.product]) {
            rounds.resize_with(round + 1, Vec::new);
            rounds[round].push(columns);
        }
    });
    let mut shared = cpu.empty::<u32>(words);
    let mut compute = || {
        for columns in &rounds {
            pack(cpu, products, columns, &mut shared);
            let tasks: Vec<_> = columns.iter().flat_map(|c| c.tasks(products)).collect();
            cpu.for_each(tasks.len(), |i| {
                let of = |i: usize| (&products[tasks[i].product], &tasks[i]);
                let (now, next) = (of(i), (i + 1 < tasks.len()).then(|| of(i + 1)));
                SCRATCH.with_borrow_mut(|s| Tile::new(isa, now, next, &shared, &out, accumulate).run(s));
            });
        }
    };
    // Waking workers takes as long as many thousands of multiply-adds: once, or not at all.
    if rounds.iter().flatten().map(|c| c.rows).sum::<usize>() > 1 { cpu.together(compute) } else { compute() }
}

/// Packs what several tasks share.
fn pack(cpu: &Cpu, products: &[Product<'_>], columns: &[Columns], shared: &mut [u32]) {
    let isa = cpu.isa();
    let (shares, room) = (shares(isa.level(), products, columns), Disjoint::new(shared));
    cpu.for_each(shares.len(), |i| {
        let Share { product: p, part, apart, to } = &shares[i];
        // SAFETY: the places of shares follow one another.
        let to = unsafe { room.part(to.start, to.len()) };
        panel::lanes(isa, p.b, *part, p.cell(isa.level()), (group_width(isa.level()), *apart), to);
    });
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::empty());
}

pub(super) fn reserve<T: Pod>(v: &mut AlignedVec<T>, len: usize) {
    if v.len() < len {
        *v = AlignedVec::zeros(len);
    }
}
