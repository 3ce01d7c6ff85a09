//! Selection of the largest, with the tie rule that every device follows.

use super::lanes::{self, Tile};
use super::{Config, GroupScore};
use crate::isa::{Isa, SQUARE};

/// How many of how many are chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub experts: usize,
    pub top_k: usize,
    pub n_group: usize,
    pub topk_group: usize,
    pub group_score: GroupScore,
}

impl Rule {
    /// The K largest of all.
    pub fn of_all(experts: usize, top_k: usize) -> Self {
        Self { experts, top_k, n_group: 1, topk_group: 1, group_score: GroupScore::Max }
    }
}

impl From<&Config> for Rule {
    fn from(c: &Config) -> Self {
        let Config { experts, top_k, n_group, topk_group, group_score, .. } = *c;
        Self { experts, top_k, n_group, topk_group, group_score }
    }
}

/// The chosen experts of tokens with these scores, in descending order of choice.
pub(crate) fn select(isa: Isa, rule: &Rule, scores: &[f32], bias: Option<&[f32]>, out: &mut [i32]) {
    let (mut one, mut tile) = (One::default(), Tile::default());
    for (scores, out) in scores.chunks(SQUARE * rule.experts).zip(out.chunks_mut(SQUARE * rule.top_k)) {
        let tokens = out.len() / rule.top_k;
        // Bits of those that are left to be chosen for one by one.
        let left = if lanes::fits(rule, tokens) { tile.select(isa, rule, scores, bias, out) } else { u32::MAX };
        for t in (0..tokens).filter(|t| left >> t & 1 == 1) {
            let (scores, out) = (&scores[t * rule.experts..], &mut out[t * rule.top_k..]);
            one.select(rule, &scores[..rule.experts], bias, &mut out[..rule.top_k]);
        }
    }
}

/// Whether x goes before y, where y has the lower index: ties keep the lower index, a NaN loses to every number.
#[inline(always)]
fn beats(x: f32, y: f32) -> bool {
    x > y || (y.is_nan() && !x.is_nan())
}

/// Writes to `out` the candidates with the largest values, in descending order; ties go to the lowest index.
/// Candidates come in ascending order and are at least as many as `out` holds.
fn top_k(values: &[f32], candidates: impl Iterator<Item = usize>, out: &mut [i32]) {
    let (mut held, room) = (0, out.len());
    for e in candidates {
        let x = values[e];
        if held == room && !beats(x, values[out[room - 1] as usize]) {
            continue;
        }
        let mut at = if held < room { held } else { room - 1 };
        held = room.min(held + 1);
        while at > 0 && beats(x, values[out[at - 1] as usize]) {
            out[at] = out[at - 1];
            at -= 1;
        }
        out[at] = e as i32;
    }
    debug_assert_eq!(held, room, "fewer candidates than places");
}

/// Chooses for one token, whatever its scores; holds the scratch of doing so.
#[derive(Default)]
struct One {
    choice: Vec<f32>,
    group_scores: Vec<f32>,
    groups: Vec<i32>,
}

impl One {
    fn select(&mut self, r: &Rule, scores: &[f32], bias: Option<&[f32]>, out: &mut [i32]) {
        self.choice.clear();
        match bias {
            Some(bias) => self.choice.extend(scores.iter().zip(bias).map(|(s, b)| s + b)),
            None => self.choice.extend(scores),
        }
        if r.n_group == r.topk_group {
            return top_k(&self.choice, 0..r.experts, out);
        }
        let width = r.experts / r.n_group;
        self.group_scores.clear();
        self.group_scores.extend(self.choice.chunks_exact(width).map(|group| judge(r.group_score, group)));
        self.groups.resize(r.topk_group, 0);
        top_k(&self.group_scores, 0..r.n_group, &mut self.groups);
        // Ascending, so that ties between experts of two groups also go to the lowest.
        self.groups.sort_unstable();
        let allowed = self.groups.iter().flat_map(|&g| g as usize * width..(g as usize + 1) * width);
        top_k(&self.choice, allowed, out);
    }
}

fn judge(by: GroupScore, group: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &x in group {
        if x > first {
            (first, second) = (x, first);
        } else if x > second {
            second = x;
        }
    }
    match by {
        GroupScore::Max => first,
        GroupScore::TopTwo => first + second,
    }
}
