//! The dense formulas in f64, straight from the choice: no order of rows appears in them except in `plan`.

/// (offsets, row_of_slot, slot_of_row) by sorting slots by expert, stably.
pub fn plan(indices: &[i32], experts: usize) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    let mut slots: Vec<usize> = (0..indices.len()).collect();
    slots.sort_by_key(|&s| indices[s]);
    let mut row_of_slot = vec![0; slots.len()];
    for (row, &slot) in slots.iter().enumerate() {
        row_of_slot[slot] = row as i32;
    }
    let below = |e: usize| indices.iter().filter(|&&i| (i as usize) < e).count() as i32;
    ((0..=experts).map(below).collect(), row_of_slot, slots.iter().map(|&s| s as i32).collect())
}

/// `out[slot]` = `x[slot / K]`, in slot order.
pub fn spread(x: &[f64], dim: usize, top_k: usize) -> Vec<f64> {
    x.chunks(dim).flat_map(|row| row.repeat(top_k)).collect()
}

/// `dx[n]` = sum over k of `d[n * K + k]`, d in slot order.
pub fn gather(d: &[f64], dim: usize, top_k: usize) -> Vec<f64> {
    let mut dx = vec![0.0; d.len() / top_k];
    for (slot, row) in d.chunks(dim).enumerate() {
        for (i, v) in row.iter().enumerate() {
            dx[slot / top_k * dim + i] += v;
        }
    }
    dx
}

/// `y[n]` = `base[n]` + sum over k of `weights[n, k]` * `rows[n * K + k]` + `extra[n]`, rows in slot order.
pub fn combine(rows: &[f64], weights: &[f64], base: &[f64], extra: &[f64], dim: usize, top_k: usize) -> Vec<f64> {
    let weighted: Vec<f64> = rows.iter().enumerate().map(|(i, v)| v * weights[i / dim]).collect();
    let sums = gather(&weighted, dim, top_k);
    sums.iter().zip(base).zip(extra).map(|((s, b), e)| b + s + e).collect()
}
