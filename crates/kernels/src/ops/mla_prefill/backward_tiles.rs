//! Sizes and scratch of backward's tasks.

use super::Shape;
use super::panels::{Panels, room};
use super::queries::QUERIES;
use super::scratch::cut;

/// Keys of a tile: whole blocks of rows on every level.
pub const KEYS: usize = 96;

/// Bytes of sums that stay in the second-level cache while queries pass by.
pub const CACHED: usize = 1 << 19;

/// Sizes of a task.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// P + R, room for it, and its cells.
    pub d: usize,
    pub dp: usize,
    pub d_cells: usize,
    /// W, room for it, and its cells.
    pub w: usize,
    pub wp: usize,
    pub w_cells: usize,
    /// Keys of the sequence.
    pub keys: usize,
    /// Cells of a tile's keys.
    pub k_cells: usize,
    /// Queries of a tile, at most.
    pub queries: usize,
}

impl Sizes {
    pub fn new(s: &Shape, p: &Panels, queries: usize, keys: usize) -> Self {
        let (d, w) = (s.nope + s.rope, s.v);
        let [d_cells, w_cells, k_cells] = [d, w, KEYS].map(|k| p.cells(k));
        let (dp, wp) = (room(d), room(w));
        // More where the sums pass through the second-level cache for each tile, fewer where they stay.
        let most = if keys * (dp + wp) * size_of::<f32>() > CACHED { QUERIES } else { QUERIES / 2 };
        Self { d, dp, d_cells, w, wp, w_cells, keys, k_cells, queries: room(queries.max(1)).min(most) }
    }

    /// Sums of the gradients of the sequence's keys and values.
    pub fn sums(&self) -> usize {
        self.keys * (self.dp + self.wp)
    }
}

/// Bytes of what grows with the sequence.
pub fn bytes_of_keys(s: &Shape, keys: usize) -> usize {
    keys * (room(s.nope + s.rope) + room(s.v)) * size_of::<f32>()
}

/// The panels and tiles of a task.
pub struct Tiles<'a> {
    /// Lanes: queries; k: elements.
    pub query: &'a mut [u32],
    pub dout: &'a mut [u32],
    /// Lanes: elements; k: queries.
    pub query_t: &'a mut [u32],
    pub dout_t: &'a mut [u32],
    /// Rows: keys; k: elements.
    pub keys: &'a mut [u32],
    pub values: &'a mut [u32],
    /// Lanes: elements; k: keys.
    pub keys_t: &'a mut [u32],
    /// `[keys][lane]` of a group of queries: scores, and gradients of the probabilities.
    pub scores: &'a mut [f32],
    pub dp: &'a mut [f32],
    /// Rows: keys; k: queries. Gradients of the scores only where cells hold two elements.
    pub p: &'a mut [u32],
    pub ds: &'a mut [u32],
    /// `[cell of keys][query]`.
    pub ds_cells: &'a mut [u32],
    /// `[group of elements][query][lane]`.
    pub dq: &'a mut [f32],
    /// `[group of elements][key][lane]`, of the whole sequence.
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
    /// Log-sum-exp of each query.
    pub lse: [f32; QUERIES],
    /// rowsum(dout * out) of each query.
    pub d: [f32; QUERIES],
}

impl<'a> Tiles<'a> {
    /// Words of all parts, in the order of the fields.
    pub fn lens(z: &Sizes, p: &Panels) -> [usize; 14] {
        let q_cells = p.cells(QUERIES);
        let Sizes { dp, d_cells, wp, w_cells, k_cells, .. } = *z;
        let ds = if p.pairs() { KEYS * q_cells } else { 0 };
        [
            QUERIES * d_cells,
            QUERIES * w_cells,
            dp * q_cells,
            wp * q_cells,
            KEYS * d_cells,
            KEYS * w_cells,
            dp * k_cells,
            KEYS * p.group,
            KEYS * p.group,
            KEYS * q_cells,
            ds,
            k_cells * QUERIES,
            dp * QUERIES,
            z.sums(),
        ]
    }

    pub fn new(z: &Sizes, p: &Panels, mut scratch: &'a mut [f32]) -> Self {
        let mut parts = Self::lens(z, p).map(|len| Some(cut(&mut scratch, len)));
        let mut parts = parts.iter_mut().map(|part| part.take().expect("each is taken once"));
        let mut next = || parts.next().expect("as many as fields");
        macro_rules! words {
            () => {
                bytemuck::cast_slice_mut(next())
            };
        }
        let (query, dout, query_t, dout_t) = (words!(), words!(), words!(), words!());
        let (keys, values, keys_t) = (words!(), words!(), words!());
        let (scores, dp, probabilities, ds, ds_cells) = (next(), next(), words!(), words!(), words!());
        let (dq, sums) = (next(), next());
        let (dk, dv) = sums.split_at_mut(z.keys * z.dp);
        let (lse, d) = ([0.0; QUERIES], [0.0; QUERIES]);
        let p = probabilities;
        Self { query, dout, query_t, dout_t, keys, values, keys_t, scores, dp, p, ds, ds_cells, dq, dk, dv, lse, d }
    }
}
