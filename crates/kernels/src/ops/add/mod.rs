//! Elementwise sums and conversion, in f32, rounded once.

use crate::{Ctx, View, ViewMut};

/// out = a + b (any float dtypes of equal length).
pub fn add(ctx: &Ctx, a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    todo!()
}

/// out += a.
pub fn accumulate(ctx: &Ctx, a: View<'_>, out: ViewMut<'_>) {
    todo!()
}

/// out = a in out's dtype.
pub fn convert(ctx: &Ctx, a: View<'_>, out: ViewMut<'_>) {
    todo!()
}
