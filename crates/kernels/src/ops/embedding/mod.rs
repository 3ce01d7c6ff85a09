//! Token embedding: y[n] = table[ids[n]].

use crate::{Ctx, View, ViewMut, Weight};

/// y[N, D] = table[ids]. ids i32 [N], table [V, D] in y's dtype or f32 (then rounded). An id outside 0..V is a
/// contract breach (callers check their tokens first).
pub fn forward(ctx: &Ctx, ids: View<'_>, table: &Weight<'_>, y: ViewMut<'_>) {
    todo!()
}

/// dtable[V, D] (f32) += sum of dy[n] over the positions n that hold each id, in order of n.
pub fn backward(ctx: &Ctx, ids: View<'_>, dy: View<'_>, dtable: ViewMut<'_>) {
    todo!()
}
