//! AdamW on the cores: one pass over memory in fixed blocks, about 30 bytes moved per element, which is what bounds it.

use super::{AdamW, in_order};
use crate::isa::{Cache, Isa, LINE, ask, copy_rows, vectorised};
use crate::ops::add::cpu::convert_piece;
use crate::{Cpu, bf16};

/// Elements of one task: half a megabyte of traffic, far above the cost of handing out a task.
const BLOCK: usize = 16_384;
/// Elements whose copy is rounded at once, while they are in the first-level cache.
const PIECE: usize = 2048;
/// Elements updated at once: a line of each array.
const LANES: usize = LINE / size_of::<f32>();
/// A line is asked for so many bytes before its turn.
const AHEAD: usize = 16 * LINE;

/// The step's constants.
struct Constants {
    clip: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// The schedule's three: lr / (1 - b1^t),
    step_size: f32,
    /// 1 / sqrt(1 - b2^t),
    root_correction: f32,
    eps: f32,
    /// and 1 - lr wd.
    keep: f32,
}

impl Constants {
    fn new(a: &AdamW<'_>) -> Self {
        let schedule = a.schedule.f32();
        Self {
            clip: clip_factor(a.clip, a.norm.f32()[0]),
            one_minus_beta1: one_minus(a.beta1),
            beta2: a.beta2,
            one_minus_beta2: one_minus(a.beta2),
            step_size: schedule[0],
            root_correction: schedule[1],
            eps: a.eps,
            keep: schedule[2],
        }
    }

    /// The new weight; `decay` is [`Constants::keep`] or 1, and a factor of 1 changes no bits.
    #[inline(always)]
    fn update(&self, decay: f32, w: f32, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        let g = g * self.clip;
        *m += self.one_minus_beta1 * (g - *m);
        *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
        w * decay - self.step_size * *m / (v.sqrt() * self.root_correction + self.eps)
    }
}

/// Taken in f64 and rounded once.
pub(super) fn one_minus(beta: f32) -> f32 {
    (1.0 - f64::from(beta)) as f32
}

fn clip_factor(clip: f32, norm: f32) -> f32 {
    if clip.is_infinite() {
        return 1.0;
    }
    let factor = clip / (norm + 1e-6);
    // False for a NaN, which then stays.
    if factor > 1.0 { 1.0 } else { factor }
}

/// What one task updates.
struct Block<'a> {
    decay: bool,
    master: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    compute: Option<&'a mut [bf16]>,
}

/// One update of every element in a segment.
pub fn step(cpu: &Cpu, a: AdamW<'_>) {
    let (constants, all) = (Constants::new(&a), a.master.len());
    let mut blocks = blocks(a);
    cpu.chunks_mut(&mut blocks, 1, |_, block| update_block(cpu.isa(), &constants, all, &mut block[0]));
}

/// Updates a block of an arena of `all` elements. A large copy goes past the caches: nothing reads it before the next step.
fn update_block(isa: Isa, c: &Constants, all: usize, b: &mut Block<'_>) {
    let decay = if b.decay { c.keep } else { 1.0 };
    let mut rounded = [bf16::ZERO; PIECE];
    for start in (0..b.master.len()).step_by(PIECE) {
        let piece = start..b.master.len().min(start + PIECE);
        let (m, v) = (&mut b.m[piece.clone()], &mut b.v[piece.clone()]);
        update(isa, c, decay, &mut b.master[piece.clone()], &b.grad[piece.clone()], m, v);
        if let Some(copy) = &mut b.compute {
            let rounded = &mut rounded[..piece.len()];
            convert_piece(isa, &b.master[piece.clone()], rounded);
            copy_rows(isa, &mut copy[piece.clone()], piece.len(), all, |i| (i == 0).then_some(&*rounded));
        }
    }
}

vectorised! {
    fn update(isa: Isa, c: &Constants, decay: f32, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let (w, w_tail) = w.as_chunks_mut::<LANES>();
        let (g, g_tail) = g.as_chunks::<LANES>();
        let ((m, m_tail), (v, v_tail)) = (m.as_chunks_mut::<LANES>(), v.as_chunks_mut::<LANES>());
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            for at in [w.as_ptr(), g.as_ptr(), m.as_ptr(), v.as_ptr()] {
                ask(Cache::Second, at.cast::<u8>().wrapping_add(AHEAD));
            }
            for i in 0..LANES {
                w[i] = c.update(decay, w[i], g[i], &mut m[i], &mut v[i]);
            }
        }
        for (((w, g), m), v) in w_tail.iter_mut().zip(g_tail).zip(m_tail).zip(v_tail) {
            *w = c.update(decay, *w, *g, m, v);
        }
    }
}

/// Cuts the segments into blocks; borrows are taken from the front of what is left of each slice.
fn blocks(a: AdamW<'_>) -> Vec<Block<'_>> {
    let (mut master, mut grad) = (a.master.f32(), a.grad.f32());
    let (mut m, mut v) = (a.m.f32(), a.v.f32());
    let mut compute = a.compute.map(|c| c.bf16());
    let mut at = 0;
    let mut out = Vec::new();
    for segment in in_order(a.segments, master.len()) {
        let range = &segment.range;
        let mut skip = range.start - at;
        at = range.end;
        let mut left = range.len();
        while left > 0 {
            let n = left.min(BLOCK);
            grad = &grad[skip..];
            out.push(Block {
                decay: segment.decay,
                master: take(&mut master, skip, n),
                grad: &grad[..n],
                m: take(&mut m, skip, n),
                v: take(&mut v, skip, n),
                compute: compute.as_mut().map(|c| take(c, skip, n)),
            });
            grad = &grad[n..];
            skip = 0;
            left -= n;
        }
    }
    out
}

/// Drops `skip` elements of `rest`, then splits off the next `n`.
fn take<'a, T>(rest: &mut &'a mut [T], skip: usize, n: usize) -> &'a mut [T] {
    let (taken, tail) = std::mem::take(rest)[skip..].split_at_mut(n);
    *rest = tail;
    taken
}
