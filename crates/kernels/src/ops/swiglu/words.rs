//! The whole lines of a row of BF16 on [`Words`], which ask for the next row meanwhile: gates and ups are short streams,
//! which what the CPU fetches on its own does not follow from row to row. What is behind the last whole line is
//! [`super::cpu`]'s, as are rows of f32 and the portable level.

use crate::isa::{Cache, Isa, LINE, LINE_ELEMENTS, WordJob, Words, ahead, ask};
use crate::{DType, Elem};

/// How many elements of a row this file computes.
fn whole<T: Elem>(isa: Isa, width: usize) -> usize {
    if T::DTYPE == DType::Bf16 && isa.has_words() { width / LINE_ELEMENTS * LINE_ELEMENTS } else { 0 }
}

/// y of the first elements of a row x, gates and ups; says of how many.
pub fn forward<T: Elem>(isa: Isa, x: &[T], y: &mut [T]) -> usize {
    let whole = whole::<T>(isa, y.len());
    if whole > 0 {
        let (gate, up) = x.split_at(y.len());
        let (gate, up) = (bytemuck::cast_slice(&gate[..whole]), bytemuck::cast_slice(&up[..whole]));
        let y = bytemuck::cast_slice_mut(&mut y[..whole]);
        isa.run_words(Forward { gate, up, y, ahead: ahead(size_of_val(x)) });
    }
    whole
}

/// Slices are equally long, whole lines.
struct Forward<'a> {
    gate: &'a [u8],
    up: &'a [u8],
    y: &'a mut [u8],
    ahead: usize,
}

impl WordJob for Forward<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let Self { gate, up, y, ahead } = self;
        assert!(gate.len() == y.len() && up.len() == y.len());
        let (gate, up, to) = (gate.as_ptr(), up.as_ptr(), y.as_mut_ptr());
        for line in (0..y.len() / LINE).map(|i| i * LINE) {
            ask(Cache::Second, gate.wrapping_add(line + ahead));
            ask(Cache::Second, up.wrapping_add(line + ahead));
            for at in (line..line + LINE).step_by(4 * W::N) {
                // SAFETY: the caller is compiled for the level; `at` is within a whole line of all three.
                unsafe {
                    let (g, u) = (W::load(gate.add(at)), W::load(up.add(at)));
                    let low = output(W::low(g), W::low(u)).1;
                    let high = output(W::high(g), W::high(u)).1;
                    W::store(W::pack(low, high), to.add(at));
                }
            }
        }
    }
}

/// (sigmoid of g and g times that, g times that times u). One order for both directions, so that both have one y.
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
unsafe fn output<W: Words>(g: W, u: W) -> ([W; 2], W) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = g.sigmoid();
        let silu = g.mul(s);
        ([s, silu], silu.mul(u))
    }
}

/// As [`super::cpu`]'s backward of the first elements of a row; says of how many, and their part of dy . y.
pub fn backward<T: Elem>(isa: Isa, dy: &mut [T], x: &mut [T], weight: f32) -> (usize, f32) {
    let whole = whole::<T>(isa, dy.len());
    let mut dot = 0.0;
    if whole > 0 {
        let aheads = [ahead(size_of_val(dy)), ahead(size_of_val(x))];
        let (gate, up) = x.split_at_mut(dy.len());
        let slices = [&mut dy[..whole], &mut gate[..whole], &mut up[..whole]].map(bytemuck::cast_slice_mut);
        // Words take a NaN's lower half for zero.
        let weight = if weight.is_nan() { f32::NAN } else { weight };
        isa.run_words(Backward { slices, aheads, weight, dot: &mut dot });
    }
    (whole, dot)
}

/// dy, gates, ups: equally long, whole lines.
struct Backward<'a> {
    slices: [&'a mut [u8]; 3],
    /// Of dy, and of gates and ups.
    aheads: [usize; 2],
    weight: f32,
    dot: &'a mut f32,
}

impl WordJob for Backward<'_> {
    #[inline(always)]
    fn run<W: Words>(self) {
        let len = self.slices[0].len();
        assert!(self.slices.iter().all(|s| s.len() == len));
        let [dy, gate, up] = self.slices.map(<[u8]>::as_mut_ptr);
        // SAFETY: the caller is compiled for the level, here and below; `at` is within a whole line of all three.
        let (weight, mut sums) = unsafe { (W::splat(self.weight), [W::splat(0.0); 2]) };
        for line in (0..len / LINE).map(|i| i * LINE) {
            ask(Cache::Second, dy.wrapping_add(line + self.aheads[0]));
            ask(Cache::Second, gate.wrapping_add(line + self.aheads[1]));
            ask(Cache::Second, up.wrapping_add(line + self.aheads[1]));
            for at in (line..line + LINE).step_by(4 * W::N) {
                // SAFETY: see above.
                unsafe {
                    let (dy, gate, up) = (dy.add(at), gate.add(at), up.add(at));
                    let (d, g, u) = (W::load(dy), W::load(gate), W::load(up));
                    let (low, high) = (output(W::low(g), W::low(u)), output(W::high(g), W::high(u)));
                    // y as the forward rounded it.
                    let y = W::pack(low.1, high.1);
                    let low = gradient([W::low(d), W::low(u), W::low(y), weight], low.0, &mut sums[0]);
                    let high = gradient([W::high(d), W::high(u), W::high(y), weight], high.0, &mut sums[1]);
                    W::store(W::pack(low[0], high[0]), dy);
                    W::store(W::pack(low[1], high[1]), gate);
                    W::store(W::pack(low[2], high[2]), up);
                }
            }
        }
        let mut lanes = [[0.0f32; 16]; 2];
        for (lanes, sums) in lanes.iter_mut().zip(sums) {
            // SAFETY: see above.
            unsafe { sums.lanes(lanes) }
        }
        *self.dot = lanes.as_flattened().iter().sum();
    }
}

/// weight * y, the gradients of gate and up, of which `sum` takes in dy * y.
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
unsafe fn gradient<W: Words>([d, u, y, weight]: [W; 4], [s, silu]: [W; 2], sum: &mut W) -> [W; 3] {
    // SAFETY: the caller's promise.
    unsafe {
        *sum = d.mul_add(y, *sum);
        let weighted = d.mul(weight);
        // The derivative of silu, s + g s (1 - s).
        let slope = silu.mul_add(W::splat(1.0).sub(s), s);
        [weight.mul(y), weighted.mul(u).mul(slope), weighted.mul(silu)]
    }
}
