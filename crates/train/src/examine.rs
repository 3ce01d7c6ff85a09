//! What a pass over text shows of a trained model beside its loss: how its experts share the work, and how often the
//! first MTP layer's guess at the second next token would be kept if decoding used it (V3 report, 2.2 and 5.4.3).

use crate::Load;
use hadal_kernels::{Buf, Ctx};
use hadal_model::heads::{self, Request};
use hadal_model::{Batch, Depth, Input, Model, MtpHidden, Options, Params, Sequence, Shared, mtp, trunk};

/// The first MTP layer's guesses along a text: from the hidden state at i and the token at i + 1, its likeliest token
/// at i + 2, beside what the main model finds likeliest there once it has read the token at i + 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafts {
    /// Guesses that were judged: those whose place has a target.
    pub drafted: usize,
    /// Guesses that equal the target. On text that the model itself wrote greedily these are the accepted ones.
    pub as_text: usize,
    /// Guesses that equal the main model's choice in the same place: the accepted ones along any text.
    pub as_model: usize,
}

impl Drafts {
    /// Adds another text's.
    pub fn add(&mut self, other: Self) {
        self.drafted += other.drafted;
        self.as_text += other.as_text;
        self.as_model += other.as_model;
    }
}

/// What [`examine`] found.
#[derive(Clone, Debug, Default)]
pub struct Examination {
    /// Tokens read.
    pub tokens: usize,
    /// Tokens of every expert in every MoE layer, MTP layers included.
    pub load: Load,
    /// The guesses in each sequence; all zero where there is no MTP layer or the sequence is too short for one.
    pub drafts: Vec<Drafts>,
}

/// Reads sequences without a cache, `batch` at once, all MTP layers included. A guess is judged where its sequence has a
/// target; the numbers of a sequence do not depend on the others.
pub fn examine(ctx: &Ctx, model: &Model, params: &Params, sequences: &[Sequence], batch: usize) -> Examination {
    let mut found = Examination::default();
    for part in sequences.chunks(batch) {
        let packed = Batch::new(ctx, part, model.layout.mtp.len());
        found.tokens += packed.n();
        found.drafts.extend(read(ctx, model, params, &packed, &mut found.load));
    }
    found
}

/// One packed batch through the trunk and every MTP layer; the first one's guesses in each sequence.
fn read(ctx: &Ctx, model: &Model, params: &Params, packed: &Batch, load: &mut Load) -> Vec<Drafts> {
    let main = &packed.depths[0];
    let mut drafts = vec![Drafts::default(); main.cu.len() - 1];
    let (h, _, traces) = trunk::forward(ctx, model, params, main, Input::Tokens, Options::default());
    load.add(&traces);
    let (normed, _) = heads::final_norm(ctx, model, params, &h);
    let mut feed = match model.config.mtp_hidden {
        MtpHidden::PostNorm => normed.clone(),
        MtpHidden::PreNorm => h,
    };
    for (k, depth) in packed.depths.iter().enumerate().skip(1) {
        if depth.n == 0 {
            break;
        }
        let o = mtp::forward(ctx, model, params, k, depth, &feed, Options::default());
        load.add(o.trace.as_slice());
        if k == 1 {
            let choices = likeliest(ctx, model, params, (0, main), &normed);
            judge(depth, &likeliest(ctx, model, params, (k, depth), &o.normed), &choices, &mut drafts);
        }
        feed = o.feed;
    }
    drafts
}

/// i32 `[n]`: the likeliest next token at each row of a depth; ties go to the lowest id, as in greedy sampling.
fn likeliest(ctx: &Ctx, model: &Model, params: &Params, (k, depth): (usize, &Depth), normed: &Shared) -> Buf {
    let request = Request { targets: depth.targets.clone(), temperature: 1.0, given: None, top_k: 1 };
    let out = heads::forward(ctx, model, params, normed, request, k);
    out.top.unwrap_or_else(|| unreachable!("the likeliest token was asked for")).0
}

/// Counts the guesses at depth 1, sequence by sequence, against targets and the main model's `choices` of depth 0.
fn judge(depth: &Depth, guesses: &Buf, choices: &Buf, drafts: &mut [Drafts]) {
    let [guesses, choices, from, cu] = [guesses, choices, &depth.from, &depth.cu].map(|b| b.view().to_i32());
    for (bounds, drafts) in cu.windows(2).zip(drafts) {
        let rows = bounds[0] as usize..bounds[1] as usize;
        for row in rows.filter(|&row| depth.host_targets[row] >= 0) {
            // The row continues hidden state i; the main model's own choice of the token at i + 2 is made at i + 1.
            let choice = choices[from[row] as usize + 1];
            drafts.drafted += 1;
            drafts.as_text += usize::from(guesses[row] == depth.host_targets[row]);
            drafts.as_model += usize::from(guesses[row] == choice);
        }
    }
}
