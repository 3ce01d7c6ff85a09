//! Storing on the CPU. The cache is cut into the rows to be written, in slot order, so that tasks hold disjoint rows
//! and two tokens for one slot are found.

use super::Store;
use crate::{Cpu, Elem};

/// Tokens per task.
const TOKENS: usize = 64;

/// See [`super::store`].
pub fn store<T: Elem>(cpu: &Cpu, a: Store<'_>) {
    let (latent, rope, width) = (a.latent, a.rope, a.latent + a.rope);
    let (c_kv, k_pe) = (T::of(a.c_kv), T::of(a.k_pe));
    let mut rows = rows_of(T::of_mut(a.cache), width, a.slots.i32());
    cpu.chunks_mut(&mut rows, TOKENS, |_, rows| {
        for (n, row) in rows {
            row[..latent].copy_from_slice(&c_kv[*n * latent..][..latent]);
            row[latent..].copy_from_slice(&k_pe[*n * a.k_pe_stride..][..rope]);
        }
    });
}

/// Every token that is stored, with its row of the cache.
fn rows_of<'a, T>(mut cache: &'a mut [T], width: usize, slots: &[i32]) -> Vec<(usize, &'a mut [T])> {
    let held = cache.len() / width;
    let mut order: Vec<(i32, usize)> = slots.iter().copied().zip(0..).filter(|(slot, _)| *slot != -1).collect();
    order.sort_unstable();
    let mut rows = Vec::with_capacity(order.len());
    let mut next = 0;
    for (slot, n) in order {
        assert!(slot >= 0 && (slot as usize) < held, "token {n} goes to slot {slot} of {held}");
        let slot = slot as usize;
        assert!(slot >= next, "two tokens go to slot {slot}");
        let (row, rest) = cache[(slot - next) * width..].split_at_mut(width);
        rows.push((n, row));
        (cache, next) = (rest, slot + 1);
    }
    rows
}
