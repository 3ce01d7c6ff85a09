//! Selection of the largest, with the tie rule that every device follows.

use super::{Config, GroupScore};

/// Whether x goes before y, where y has the lower index: ties keep the lower index, a NaN loses to every number.
#[inline(always)]
fn beats(x: f32, y: f32) -> bool {
    x > y || (y.is_nan() && !x.is_nan())
}

/// Writes to `out` the candidates with the largest values, in descending order; ties go to the lowest index.
/// Candidates come in ascending order and are at least as many as `out` holds.
pub(crate) fn top_k(values: &[f32], candidates: impl Iterator<Item = usize>, out: &mut [i32]) {
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

/// Chooses the experts of one token; holds the scratch of doing so.
pub struct Selector {
    choice: Vec<f32>,
    group_scores: Vec<f32>,
    groups: Vec<i32>,
}

impl Selector {
    /// Scratch for tokens of one gate.
    pub fn new(c: &Config) -> Self {
        Self { choice: vec![0.0; c.experts], group_scores: vec![0.0; c.n_group], groups: vec![0; c.topk_group] }
    }

    /// The chosen experts of a token with these scores, in descending order of choice.
    pub fn select(&mut self, c: &Config, scores: &[f32], bias: Option<&[f32]>, out: &mut [i32]) {
        match bias {
            Some(bias) => self.choice.iter_mut().zip(scores).zip(bias).for_each(|((o, s), b)| *o = s + b),
            None => self.choice.copy_from_slice(scores),
        }
        if c.n_group == c.topk_group {
            return top_k(&self.choice, 0..c.experts, out);
        }
        let width = c.experts / c.n_group;
        for (score, group) in self.group_scores.iter_mut().zip(self.choice.chunks_exact(width)) {
            *score = judge(c.group_score, group);
        }
        top_k(&self.group_scores, 0..c.n_group, &mut self.groups);
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
