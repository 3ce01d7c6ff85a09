//! Scratch of a task, which prefill and decode share.

use std::cell::Cell;

#[cfg(test)]
thread_local! {
    /// Most bytes of scratch that this thread asked for.
    pub static TAKEN: Cell<usize> = const { Cell::new(0) };
}

/// Scratch above this size is freed after use instead of kept with its thread.
const KEEP: usize = 1 << 18;

/// Hands `f` `len` floats of unspecified content. Small scratch stays with its thread: fresh pages cost as much as the
/// arithmetic of a short sequence.
#[inline(always)]
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local!(static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) });
    #[cfg(test)]
    TAKEN.set(TAKEN.get().max(len * size_of::<f32>()));
    let mut v = SCRATCH.take();
    if v.len() < len {
        // Dropped first, so that two generations never coexist.
        drop(std::mem::take(&mut v));
        v = vec![0.0; len];
    }
    let r = f(&mut v[..len]);
    if v.len() <= KEEP {
        SCRATCH.set(v);
    }
    r
}

/// Cuts the next `len` floats off a scratch slice.
#[inline(always)]
pub fn cut<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    rest.split_off_mut(..len).expect("scratch was sized for its parts")
}
