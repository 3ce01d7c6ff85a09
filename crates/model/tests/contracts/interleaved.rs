//! Stages of one micro-batch's forward between those of another's backward, as DualPipe runs them (V3 report 3.2.1),
//! give what one micro-batch after the other gives.

use crate::setup::*;
use hadal_kernels::{Buf, Ctx};
use hadal_model::pass::{self, LossWeights};
use hadal_model::stages::dispatch::{self, GateOptions, Gradient};
use hadal_model::stages::{attention, combine, mlp};
use hadal_model::trunk::{self, Input, LayerTrace, Options};
use hadal_model::{Batch, Depth, Grads, Model, ModelConfig, Params, Precision, Shared, WeightGrads};

/// A part of a model with its weights.
struct Part {
    model: Model,
    params: Params,
}

impl Part {
    fn new(ctx: &Ctx, config: &ModelConfig, scope: hadal_model::Scope, precision: Precision) -> Self {
        let model = part(ctx, config, scope);
        let params = weights(ctx, &model, precision);
        Self { model, params }
    }
}

/// What a block's stages keep, filled as they run.
#[derive(Default)]
struct Kept {
    attention: Option<attention::Saved>,
    dispatch: Option<dispatch::Saved>,
    mlp: Option<mlp::Saved>,
    combine: Option<combine::Saved>,
}

/// What the next stage of a forward pass reads.
enum Ahead {
    Attention(Shared),
    Dispatch(Shared),
    Mlp(dispatch::ExpertInput),
    Combine(mlp::ExpertOutput),
}

/// A forward pass through the blocks of a part, one stage at a time.
struct ForwardWalk<'a> {
    part: &'a Part,
    depth: &'a Depth,
    balance: &'a Buf,
    ahead: Option<Ahead>,
    kept: Vec<Kept>,
    traces: Vec<LayerTrace>,
}

impl<'a> ForwardWalk<'a> {
    fn new(part: &'a Part, depth: &'a Depth, balance: &'a Buf, h: Shared) -> Self {
        Self { part, depth, balance, ahead: Some(Ahead::Attention(h)), kept: Vec::new(), traces: Vec::new() }
    }

    fn blocks(&self) -> usize {
        self.part.model.layout.blocks.len()
    }

    /// Runs the next stage; false when all blocks are done.
    fn step(&mut self, ctx: &Ctx) -> bool {
        let Part { model, params } = self.part;
        let starts = matches!(self.ahead, Some(Ahead::Attention(_)));
        if starts && self.kept.len() == self.blocks() {
            return false;
        }
        if starts {
            self.kept.push(Kept::default());
        }
        let ids = &model.layout.blocks[self.kept.len() - 1];
        let kept = self.kept.last_mut().unwrap();
        self.ahead = Some(match self.ahead.take().unwrap() {
            Ahead::Attention(h) => {
                let (h1, saved) = attention::forward(ctx, model, params, ids, self.depth, h);
                kept.attention = Some(saved);
                Ahead::Dispatch(h1)
            }
            Ahead::Dispatch(h1) => {
                let options = GateOptions { given: None, balance: Some((self.depth.cu.view(), self.balance.view())) };
                let (input, saved) = dispatch::forward(ctx, model, params, ids, h1, options);
                if let Some(g) = &saved.gate {
                    let (indices, offsets) = (g.indices.clone(), g.offsets.clone());
                    self.traces.push(LayerTrace { layer: ids.layer, indices, offsets, balance: g.balance.clone() });
                }
                kept.dispatch = Some(saved);
                Ahead::Mlp(input)
            }
            Ahead::Mlp(input) => {
                let (output, saved) = mlp::forward(ctx, model, params, ids, input);
                kept.mlp = Some(saved);
                Ahead::Combine(output)
            }
            Ahead::Combine(output) => {
                let (y, saved) = combine::forward(ctx, model, kept.dispatch.as_ref().unwrap(), output);
                kept.combine = Some(saved);
                Ahead::Attention(y)
            }
        });
        true
    }

    fn finish(self) -> (Shared, Vec<Kept>, Vec<LayerTrace>) {
        let Some(Ahead::Attention(h)) = self.ahead else { panic!("the walk is not at its end") };
        (h, self.kept, self.traces)
    }
}

/// What the next stage of a backward pass reads.
enum Behind {
    Combine(Shared),
    Mlp { dy: Shared, experts: Option<combine::ExpertGradient> },
    Dispatch(Gradient),
    Attention(Shared),
}

/// A backward pass, one stage at a time; weight gradients run at once, between the stages of the other pass.
struct BackwardWalk<'a> {
    part: &'a Part,
    kept: Vec<Kept>,
    behind: Option<Behind>,
}

impl BackwardWalk<'_> {
    fn step(&mut self, ctx: &Ctx, grads: &mut Grads) -> bool {
        let Part { model, params } = self.part;
        let Some(kept) = self.kept.last_mut() else { return false };
        let mut jobs = WeightGrads::default();
        self.behind = Some(match self.behind.take().unwrap() {
            Behind::Combine(dy) => {
                let (d, c) = (kept.dispatch.as_ref().unwrap(), kept.combine.take().unwrap());
                let experts = combine::backward_input(ctx, model, d, c, &dy);
                Behind::Mlp { dy, experts }
            }
            Behind::Mlp { dy, experts } => {
                let (saved, dispatched) = (kept.mlp.take().unwrap(), kept.dispatch.as_mut().unwrap());
                let (dx, experts) = mlp::backward_input(ctx, model, params, dispatched, saved, &dy, experts, &mut jobs);
                Behind::Dispatch(Gradient { dy, dx, experts })
            }
            Behind::Dispatch(g) => {
                let saved = kept.dispatch.take().unwrap();
                Behind::Attention(dispatch::backward_input(ctx, model, params, saved, g, &mut jobs))
            }
            Behind::Attention(dh1) => {
                let saved = self.kept.pop().unwrap().attention.unwrap();
                Behind::Combine(attention::backward_input(ctx, model, params, saved, dh1, &mut jobs))
            }
        });
        jobs.run(ctx, params, grads);
        true
    }

    fn finish(self) -> Shared {
        let Some(Behind::Combine(dh)) = self.behind else { panic!("the walk is not at its end") };
        dh
    }
}

/// A model as embedding, blocks, and all that follows.
struct Pipeline {
    parts: [Part; 3],
    weights: LossWeights,
}

impl Pipeline {
    fn new(ctx: &Ctx, config: &ModelConfig, precision: Precision) -> Self {
        let layers = config.num_hidden_layers;
        let middle = hadal_model::Scope { embedding: false, ..front(config, 0..layers) };
        let scopes = [front(config, 0..0), middle, back(config, layers..layers)];
        Self { parts: scopes.map(|s| Part::new(ctx, config, s, precision)), weights: loss_weights(config) }
    }

    fn embed(&self, ctx: &Ctx, batch: &Batch) -> (Shared, trunk::Saved) {
        let Part { model, params } = &self.parts[0];
        let (h, saved, _) = trunk::forward(ctx, model, params, &batch.depths[0], Input::Tokens, Options::default());
        (h, saved)
    }

    fn embed_backward(&self, ctx: &Ctx, saved: trunk::Saved, dh: Shared, grads: &mut Grads) -> Shared {
        let Part { model, params } = &self.parts[0];
        let mut jobs = WeightGrads::default();
        let dh = trunk::backward(ctx, model, params, saved, dh, &mut jobs);
        jobs.run(ctx, params, grads);
        dh
    }

    /// Head and MTP of micro-batch `i` after its last block, forward and backward: where its backward walk begins.
    fn turn(&self, ctx: &Ctx, (i, batch): (usize, &Batch), walk: ForwardWalk<'_>, run: &mut Run) -> BackwardWalk<'_> {
        let (h, kept, traces) = walk.finish();
        let Part { model, params } = &self.parts[2];
        let (h, saved, _) = trunk::forward(ctx, model, params, &batch.depths[0], Input::Hidden(h), Options::default());
        let f = pass::tail(ctx, model, params, batch, &self.weights, None, h, saved, traces);
        run.step.losses(i, &f.losses.read());
        run.step.traces(i, &f);
        let (dh, jobs) = pass::backward_input(ctx, model, params, f);
        jobs.run(ctx, params, &mut run.grads[2]);
        BackwardWalk { part: &self.parts[1], kept, behind: Some(Behind::Combine(dh)) }
    }
}

/// What a run gathers.
struct Run {
    step: Step,
    grads: [Grads; 3],
}

/// The backward of `a` and the forward of `b` take turns; `b`'s forward begins `lead` stages ahead.
fn interleaved(ctx: &Ctx, p: &Pipeline, [a, b]: [&Batch; 2], lead: usize) -> Step {
    let grads = [0, 1, 2].map(|i: usize| Grads::zeros(ctx, p.parts[i].model.layout.clone()));
    let mut run = Run { step: Step::default(), grads };
    let [balance_a, balance_b] = [a, b].map(|x| balance(ctx, x, &p.weights));

    let (h, first_a) = p.embed(ctx, a);
    let mut forward = ForwardWalk::new(&p.parts[1], &a.depths[0], &balance_a, h);
    while forward.step(ctx) {}
    let mut backward = p.turn(ctx, (0, a), forward, &mut run);

    let (h, first_b) = p.embed(ctx, b);
    let mut forward = ForwardWalk::new(&p.parts[1], &b.depths[0], &balance_b, h);
    (0..lead).for_each(|_| assert!(forward.step(ctx), "the lead is shorter than the pass"));
    while [backward.step(ctx, &mut run.grads[1]), forward.step(ctx)] != [false, false] {}
    let dh = p.embed_backward(ctx, first_a, backward.finish(), &mut run.grads[0]);
    run.step.input(0, &dh);

    let mut backward = p.turn(ctx, (1, b), forward, &mut run);
    while backward.step(ctx, &mut run.grads[1]) {}
    let dh = p.embed_backward(ctx, first_b, backward.finish(), &mut run.grads[0]);
    run.step.input(1, &dh);
    run.step.gradients(ctx, &mut run.grads);
    run.step
}

#[test]
fn forward_between_backward_stages_changes_nothing() {
    each_case(|ctx, case, config, precision| {
        let (a, b) = (batch(ctx, config, &LENGTHS, 1), batch(ctx, config, &[31, 2, 66], 2));
        let model = Model::whole(ctx, config.clone());
        let params = weights(ctx, &model, precision);
        let expected = step(ctx, &model, &params, &[&a, &b], None);
        assert_lively(case, &expected.values);
        let pipeline = Pipeline::new(ctx, config, precision);
        for lead in [0, 3] {
            let found = interleaved(ctx, &pipeline, [&a, &b], lead);
            assert_same(&format!("{case}, lead {lead}"), &found.values, &expected.values);
        }
    });
}
