//! Logits that are wanted by themselves: those of given ids, and the largest.

use super::ROWS;
use super::logits::{Slice, position};
use crate::Cpu;

/// Logits that are looked at together.
const LANES: usize = 16;

/// Writes z of the given ids that lie in this slice.
pub fn pick(cpu: &Cpu, logits: &Slice<'_>, scale: f32, given: &[i32], picked: &mut [f32]) {
    let each = given.len() / logits.n;
    if each == 0 {
        return;
    }
    cpu.chunks_mut(picked, ROWS * each, |block, picked| {
        for (i, picked) in picked.chunks_mut(each).enumerate() {
            let r = block * ROWS + i;
            for (z, &id) in picked.iter_mut().zip(&given[r * each..]) {
                if let Some(j) = position(id, &logits.ids) {
                    *z = logits.row(r)[j] * scale;
                }
            }
        }
    });
}

/// Merges this slice into the K largest of each row.
pub fn merge_top(cpu: &Cpu, logits: &Slice<'_>, scale: f32, top_ids: &mut [i32], top_z: &mut [f32]) {
    let k = top_z.len() / logits.n;
    if k == 0 {
        return;
    }
    cpu.chunks2_mut((top_ids, ROWS * k), (top_z, ROWS * k), |block, top_ids, top_z| {
        for (i, (ids, z)) in top_ids.chunks_mut(k).zip(top_z.chunks_mut(k)).enumerate() {
            merge_row(logits.row(block * ROWS + i), scale, logits.ids.start, ids, z);
        }
    });
}

/// `ids` and `top` hold the largest of the `first` logits before, in descending order. Ids come in ascending order, so
/// that among equals the one already there stays ahead. A NaN ranks last.
fn merge_row(x: &[f32], scale: f32, first: usize, ids: &mut [i32], top: &mut [f32]) {
    let k = top.len();
    for (c, chunk) in x.chunks(LANES).enumerate() {
        let start = first + c * LANES;
        // Nearly all chunks hold nothing new: one vector comparison passes over them.
        if start >= k && !chunk.iter().fold(false, |any, &x| any | (x * scale > top[k - 1])) {
            continue;
        }
        for (l, &x) in chunk.iter().enumerate() {
            let (id, z) = (start + l, (x * scale).max(f32::NEG_INFINITY));
            if id >= k && z <= top[k - 1] {
                continue;
            }
            let mut at = id.min(k - 1);
            while at > 0 && top[at - 1] < z {
                (top[at], ids[at]) = (top[at - 1], ids[at - 1]);
                at -= 1;
            }
            (top[at], ids[at]) = (z, id as i32);
        }
    }
}
