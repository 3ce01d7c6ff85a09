//! The whole lines of a row of BF16, in vectors of words, which ask for the next row meanwhile: gates and ups are short
//! streams, which what the CPU fetches on its own does not follow from row to row. In instructions by name: what
//! the compiler makes of plain loops over e^x clamps and selects where an instruction saturates by itself. What is behind
//! the last whole line is [`super::cpu`]'s, as are rows of f32 and the portable level.

use crate::isa::{Cache, Isa, Job, LINE, Lanes, Level, ask};
use crate::math::rough_sigmoid_of;
use crate::{DType, Elem};

/// A line is asked for so many bytes before its turn, at least where rows are short and at most where they are long.
const AHEAD: [usize; 2] = [4 << 10, 8 << 10];

/// The distance at which lines of rows `row` bytes long are asked for: whole rows, if one is not too far.
fn ahead(row: usize) -> usize {
    let [least, most] = AHEAD;
    (row * (least / row.max(1)).max(1)).min(most)
}

/// How many elements of a row this file computes: whole lines.
fn whole<T: Elem>(isa: Isa, width: usize) -> usize {
    const ELEMENTS: usize = LINE / 2;
    if T::DTYPE == DType::Bf16 && isa.level() >= Level::Avx2 { width / ELEMENTS * ELEMENTS } else { 0 }
}

/// y of the first elements of a row x, gates and ups; says of how many.
pub fn forward<T: Elem>(isa: Isa, x: &[T], y: &mut [T]) -> usize {
    let whole = whole::<T>(isa, y.len());
    if whole > 0 {
        let (gate, up) = x.split_at(y.len());
        let (gate, up) = (bytemuck::cast_slice(&gate[..whole]), bytemuck::cast_slice(&up[..whole]));
        let y = bytemuck::cast_slice_mut(&mut y[..whole]);
        isa.run(Forward { gate, up, y, ahead: ahead(size_of_val(x)) });
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

impl Job for Forward<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { gate, up, y, ahead } = self;
        assert!(gate.len() == y.len() && up.len() == y.len());
        let (gate, up, to) = (gate.as_ptr(), up.as_ptr(), y.as_mut_ptr());
        for line in (0..y.len() / LINE).map(|i| i * LINE) {
            ask(Cache::Second, gate.wrapping_add(line + ahead));
            ask(Cache::Second, up.wrapping_add(line + ahead));
            for at in (line..line + LINE).step_by(4 * V::N) {
                // SAFETY: the caller is compiled for the level; `at` is within a whole line of all three.
                unsafe {
                    let g = V::load(gate.add(at).cast()).halves();
                    let u = V::load(up.add(at).cast()).halves();
                    let (low, high) = (output(g[0], u[0]).1, output(g[1], u[1]).1);
                    low.paired(high).store(to.add(at).cast());
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
unsafe fn output<V: Lanes>(g: V, u: V) -> ([V; 2], V) {
    // SAFETY: the caller's promise.
    unsafe {
        let s = rough_sigmoid_of(g);
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
        // `paired` takes a NaN's lower half for zero.
        let weight = if weight.is_nan() { f32::NAN } else { weight };
        isa.run(Backward { slices, aheads, weight, dot: &mut dot });
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

impl Job for Backward<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let len = self.slices[0].len();
        assert!(self.slices.iter().all(|s| s.len() == len));
        let [dy, gate, up] = self.slices.map(<[u8]>::as_mut_ptr);
        // SAFETY: the caller is compiled for the level, here and below; `at` is within a whole line of all three.
        let (weight, mut sums) = unsafe { (V::splat(self.weight), [V::splat(0.0); 2]) };
        for line in (0..len / LINE).map(|i| i * LINE) {
            ask(Cache::Second, dy.wrapping_add(line + self.aheads[0]));
            ask(Cache::Second, gate.wrapping_add(line + self.aheads[1]));
            ask(Cache::Second, up.wrapping_add(line + self.aheads[1]));
            for at in (line..line + LINE).step_by(4 * V::N) {
                // SAFETY: see above.
                unsafe {
                    let (dy, gate, up) = (dy.add(at).cast(), gate.add(at).cast(), up.add(at).cast());
                    let (d, g, u) = (V::load(dy).halves(), V::load(gate).halves(), V::load(up).halves());
                    let (low, high) = (output(g[0], u[0]), output(g[1], u[1]));
                    // y as the forward rounded it.
                    let y = low.1.paired(high.1).halves();
                    let low = gradient([d[0], u[0], y[0], weight], low.0, &mut sums[0]);
                    let high = gradient([d[1], u[1], y[1], weight], high.0, &mut sums[1]);
                    low[0].paired(high[0]).store(dy);
                    low[1].paired(high[1]).store(gate);
                    low[2].paired(high[2]).store(up);
                }
            }
        }
        let mut lanes = [[0.0f32; 16]; 2];
        for (lanes, sums) in lanes.iter_mut().zip(sums) {
            // SAFETY: see above.
            unsafe { sums.store(lanes.as_mut_ptr()) }
        }
        *self.dot = lanes.as_flattened().iter().sum();
    }
}

/// weight * y, the gradients of gate and up, of which `sum` takes in dy * y.
///
/// # Safety
/// The caller is compiled for the level.
#[inline(always)]
unsafe fn gradient<V: Lanes>([d, u, y, weight]: [V; 4], [s, silu]: [V; 2], sum: &mut V) -> [V; 3] {
    // SAFETY: the caller's promise.
    unsafe {
        *sum = d.mul_add(y, *sum);
        let weighted = d.mul(weight);
        // The derivative of silu, s + g s (1 - s).
        let slope = silu.mul_add(V::splat(1.0).sub(s), s);
        [weight.mul(y), weighted.mul(u).mul(slope), weighted.mul(silu)]
    }
}
