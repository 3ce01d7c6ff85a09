//! What is not finite shows where it is seen, and nowhere else. On the host's cores: a GPU's tiles may end in the next sequence.

use super::case::{Case, Results, kinds, rows};
use crate::Buf;
use crate::testing::{assert_same_bits, buf, ctx_of, isas};

const SEQUENCES: [(usize, usize); 4] = [(67, 67), (130, 130), (40, 100), (1, 1)];
/// The sequence and the head that have it, and its queries and keys, one of each sequence's tiles at least.
const SEQUENCE: usize = 1;
const HEAD: usize = 1;
const PLACES: [usize; 3] = [0, 40, 129];

/// Where sequence s begins in queries and keys.
fn first(s: usize) -> (usize, usize) {
    SEQUENCES[..s].iter().fold((0, 0), |(q, k), s| (q + s.0, k + s.1))
}

fn with(b: &Buf, at: usize, x: f32) -> Buf {
    let mut all = b.view().to_f32();
    all[at] = x;
    buf(b.dtype(), &all)
}

/// No bit of another sequence has changed, in either direction.
fn assert_others_same(case: &Case, found: &Results, clean: &Results) {
    let s = &case.shape;
    let of_q = [s.heads * s.v, s.heads, s.heads * (s.nope + s.rope)];
    let of_k = [s.heads * (s.nope + s.v), s.k_pe_stride];
    for (i, (nq, nk)) in SEQUENCES.into_iter().enumerate().filter(|(i, _)| *i != SEQUENCE) {
        let (q, k) = first(i);
        let pairs = [(&found.out, &clean.out), (&found.lse, &clean.lse), (&found.dq, &clean.dq)];
        for ((found, clean), width) in pairs.into_iter().zip(of_q) {
            assert_same_bits("of another sequence's queries", &rows(found, q, nq, width), &rows(clean, q, nq, width));
        }
        let pairs = [(&found.dkv_up, &clean.dkv_up), (&found.dk_pe, &clean.dk_pe)];
        for ((found, clean), width) in pairs.into_iter().zip(of_k) {
            assert_same_bits("of another sequence's keys", &rows(found, k, nk, width), &rows(clean, k, nk, width));
        }
    }
}

/// What a query and head of the sequence have, found and clean.
struct Seen {
    query: usize,
    head: usize,
    out: [Vec<f32>; 2],
    lse: [f32; 2],
}

impl Seen {
    fn all(case: &Case, found: &Results, clean: &Results) -> Vec<Self> {
        let (heads, v, first) = (case.shape.heads, case.shape.v, first(SEQUENCE).0);
        let results = [found, clean].map(|r| (r.out.view().to_f32(), r.lse.view().to_f32()));
        let of = |query: usize, head: usize| {
            let at = (first + query) * heads + head;
            let (out, lse) = (|r: usize| results[r].0[at * v..][..v].to_vec(), |r: usize| results[r].1[at]);
            Self { query, head, out: [out(0), out(1)], lse: [lse(0), lse(1)] }
        };
        (0..SEQUENCES[SEQUENCE].0)
            .flat_map(|query| (0..heads).map(move |h| (query, h)))
            .map(|(q, h)| of(q, h))
            .collect()
    }

    fn is_nan(&self) -> bool {
        self.lse[0].is_nan() && self.out[0].iter().all(|x| x.is_nan())
    }

    fn is_finite(&self) -> bool {
        self.lse[0].is_finite() && self.out[0].iter().all(|x| x.is_finite())
    }

    fn is_clean(&self) -> bool {
        self.lse[0].to_bits() == self.lse[1].to_bits() && same(&self.out[0], &self.out[1])
    }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Changes a case for each place, runs it, and looks at the sequence, others being as before.
fn each(change: impl Fn(&mut Case, usize), check: impl Fn(&Case, usize, &Seen) -> bool) {
    for isa in isas() {
        let ctx = ctx_of(2, isa);
        for (dtype, shape) in kinds() {
            let clean = Case::new(dtype, shape, &SEQUENCES).run(&ctx);
            for place in PLACES {
                let mut case = Case::new(dtype, shape, &SEQUENCES);
                change(&mut case, place);
                let found = case.run(&ctx);
                assert_others_same(&case, &found, &clean);
                for seen in Seen::all(&case, &found, &clean) {
                    let Seen { query, head, out: [out, _], lse: [lse, _] } = &seen;
                    let name = format!("{isa:?}, {}: at {place}, query {query}, head {head}", case.name);
                    assert!(check(&case, place, &seen), "{name}: {lse}, {out:?}");
                }
            }
        }
    }
}

/// Where a key begins, of the head.
fn key_at(case: &Case, key: usize) -> usize {
    let s = &case.shape;
    ((first(SEQUENCE).1 + key) * s.heads + HEAD) * (s.nope + s.v)
}

/// Where a query begins, of the head.
fn query_at(case: &Case, query: usize) -> usize {
    let s = &case.shape;
    ((first(SEQUENCE).0 + query) * s.heads + HEAD) * (s.nope + s.rope)
}

/// Other queries, and other heads, keep their bits.
#[test]
fn a_nan_in_a_key_reaches_who_sees_it() {
    let change = |case: &mut Case, key| case.kv_up = with(&case.kv_up, key_at(case, key), f32::NAN);
    each(change, |_, key, x| if x.query >= key && x.head == HEAD { x.is_nan() } else { x.is_clean() });
}

/// What all heads share of a key is seen by all.
#[test]
fn a_nan_in_a_shared_key_reaches_who_sees_it() {
    let change = |case: &mut Case, key| {
        let at = (first(SEQUENCE).1 + key) * case.shape.k_pe_stride;
        case.k_pe = with(&case.k_pe, at, f32::NAN);
    };
    each(change, |_, key, x| if x.query >= key { x.is_nan() } else { x.is_clean() });
}

/// An infinite score makes NaNs if it is the largest, and is as good as not seen if it is the least.
#[test]
fn an_infinite_key_reaches_who_sees_it() {
    let change = |case: &mut Case, key| case.kv_up = with(&case.kv_up, key_at(case, key), f32::INFINITY);
    each(change, |case, key, x| {
        let factor = case.q.view().to_f32()[query_at(case, x.query)];
        match x.query {
            query if query < key || x.head != HEAD => x.is_clean(),
            _ if factor > 0.0 => x.is_nan(),
            // It sees no other key.
            0 => x.lse[0] == f32::NEG_INFINITY && x.out[0].iter().all(|x| *x == 0.0),
            _ => x.is_finite(),
        }
    });
}

#[test]
fn a_nan_in_a_query_is_its_own() {
    let change = |case: &mut Case, query| case.q = with(&case.q, query_at(case, query), f32::NAN);
    each(change, |_, query, x| if (x.query, x.head) == (query, HEAD) { x.is_nan() } else { x.is_clean() });
}

/// It reaches one element. Of queries that do not see it zero times it may be taken.
#[test]
fn a_nan_in_a_value_reaches_who_sees_it() {
    let change = |case: &mut Case, key| {
        let at = key_at(case, key) + case.shape.nope + case.shape.v - 1;
        case.kv_up = with(&case.kv_up, at, f32::NAN);
    };
    each(change, |case, key, x| {
        let (element, [out, clean]) = (case.shape.v - 1, &x.out);
        let others = x.lse[0].to_bits() == x.lse[1].to_bits() && same(&out[..element], &clean[..element]);
        others && if x.head == HEAD { x.query < key || out[element].is_nan() } else { x.is_clean() }
    });
}
