//! A few hundred additions: less than handing them out would cost.

/// `counts[e]` += `offsets[e + 1]` - `offsets[e]`.
pub fn add(offsets: &[i32], counts: &mut [i32]) {
    counts.iter_mut().zip(offsets.windows(2)).for_each(|(count, w)| *count += w[1] - w[0]);
}
