//! Which queries a tile has, and which keys they see.

use super::Problem;

/// Most queries of a tile: so many that what is packed of keys serves many of them, and so few that what is packed of them
/// stays in the second-level cache.
pub const QUERIES: usize = 256;

/// Queries of one sequence that stand together, [`QUERIES`] at most.
#[derive(Clone, Copy)]
pub struct QueryTile {
    /// First query, in the packed batch.
    pub q: usize,
    /// Number of queries.
    pub nq: usize,
    /// First key of the sequence, in the packed batch.
    pub k: usize,
    /// Keys that the tile's last query sees: those of the others are fewer.
    pub keys: usize,
    /// Keys that the first query sees; not positive when it sees none.
    pub first: i64,
}

/// What a group of queries sees of some keys.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// Keys that its last query sees.
    pub keys: usize,
    /// Keys that all see.
    pub by_all: usize,
    /// Keys that the first sees, the second one more, and so on; any number <= 0 is none.
    pub first: i32,
    /// Queries.
    pub queries: usize,
}

impl Seen {
    /// Where every query sees every key.
    pub fn everything(keys: usize, queries: usize) -> Self {
        Self { keys, by_all: keys, first: keys as i32, queries }
    }

    /// How many of the group's first queries do not see key j; more than there are, or a number <= 0, is all or none.
    #[inline(always)]
    pub fn unseen(&self, j: usize) -> f32 {
        (j as i32 + 1 - self.first) as f32
    }
}

impl QueryTile {
    /// What `group` queries from `g * group` on see of the `nk` keys from `base` on.
    pub fn seen(&self, g: usize, group: usize, base: usize, nk: usize) -> Seen {
        let first = self.first + (g * group) as i64 - base as i64;
        let queries = (self.nq - g * group).min(group);
        let of = |keys: i64| keys.clamp(0, nk as i64) as usize;
        let clamped = first.clamp(-(group as i64), nk as i64) as i32;
        Seen { keys: of(first + queries as i64 - 1), by_all: of(first), first: clamped, queries }
    }
}

/// The tiles of sequence s, in order, each of `most` queries but for the last. How queries are cut changes no bit.
pub fn query_tiles(x: &Problem<'_>, s: usize, most: usize) -> impl Iterator<Item = QueryTile> + use<> {
    let (q0, q1) = (x.cu_q[s] as usize, x.cu_q[s + 1] as usize);
    let (k0, k1) = (x.cu_k[s] as usize, x.cu_k[s + 1] as usize);
    (q0..q1).step_by(most).map(move |q| {
        let nq = (q1 - q).min(most);
        // Aligned at the end: the last query sees all keys.
        let first = (k1 - k0) as i64 - (q1 - q) as i64 + 1;
        QueryTile { q, nq, k: k0, keys: (first + nq as i64 - 1).max(0) as usize, first }
    })
}

/// Neighbouring groups that see equally many keys, and some: (first group, the one after the last, keys).
pub fn spans(seen: &[Seen]) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        while from < seen.len() {
            let keys = seen[from].keys;
            let to = from + seen[from..].iter().take_while(|s| s.keys == keys).count();
            let first = std::mem::replace(&mut from, to);
            if keys > 0 {
                return Some((first, to, keys));
            }
        }
        None
    })
}
