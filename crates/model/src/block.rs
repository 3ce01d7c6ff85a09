//! One transformer block: the four stages in a row. Pre-norm residuals: h1 = h + attention, y = h1 + feed-forward.

use crate::stages::attention::Places;
use crate::stages::dispatch::{GateOptions, Gradient};
use crate::stages::{attention, combine, dispatch, mlp};
use crate::trunk::LayerTrace;
use crate::weight_grad::{Shared, WeightGrads};
use crate::{BlockIds, Depth, Model, Params, Recompute};
use hadal_kernels::{Buf, Ctx, View};

/// What one block keeps.
#[derive(Debug)]
pub struct Saved(Form);

#[derive(Debug)]
enum Form {
    /// What its stages keep.
    Stages(Box<Stages>),
    /// Its input, and what makes another forward pass the same.
    Input(Box<Again>),
}

#[derive(Debug)]
struct Stages {
    attention: attention::Saved,
    dispatch: dispatch::Saved,
    mlp: mlp::Saved,
    combine: combine::Saved,
}

#[derive(Debug)]
struct Again {
    ids: BlockIds,
    h: Shared,
    places: Places,
    /// i32 `[n, K]`: the experts that were chosen.
    chosen: Option<Shared>,
    /// f32 `[S]`: weights of the balance loss.
    balance: Option<Buf>,
}

impl Saved {
    /// Bytes kept until backward.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Form::Stages(s) => s.attention.bytes() + s.dispatch.bytes() + s.mlp.bytes() + s.combine.bytes(),
            Form::Input(a) => {
                let (chosen, balance) = (a.chosen.as_ref().map(|b| b.bytes()), a.balance.as_ref().map(Buf::bytes));
                a.h.bytes() + chosen.unwrap_or(0) + balance.unwrap_or(0)
            }
        }
    }
}

/// h `[n, D]` to y `[n, D]`, and the routing of a MoE layer.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    ids: &BlockIds,
    depth: &Depth,
    h: Shared,
    options: GateOptions<'_>,
) -> (Shared, Saved, Option<LayerTrace>) {
    let input = (model.recompute == Recompute::All).then(|| h.clone());
    let (h1, attention) = attention::forward(ctx, model, params, ids, depth, h);
    // Stages of a block that will run again keep nothing for later.
    let attention = input.is_none().then_some(attention);
    let (inputs, dispatch) = dispatch::forward(ctx, model, params, ids, h1, options);
    let trace = LayerTrace::of(ids.layer, &dispatch);
    let (output, mlp) = mlp::forward(ctx, model, params, ids, inputs);
    let (y, combine) = combine::forward(ctx, model, &dispatch, output);
    let form = match (input, attention) {
        (None, Some(attention)) => Form::Stages(Box::new(Stages { attention, dispatch, mlp, combine })),
        (h, _) => {
            let Some(h) = h else { unreachable!("what attention keeps was dropped because the input is kept") };
            let chosen = dispatch.gate.as_ref().map(|g| g.indices.clone());
            let balance = options.balance.filter(|_| chosen.is_some()).map(|(_, w)| ctx.copy_of(w));
            Form::Input(Box::new(Again { ids: ids.clone(), h, places: Places::of(depth), chosen, balance }))
        }
    };
    (y, Saved(form), trace)
}

impl Again {
    /// Forward as far as backward reads it.
    fn run(self, ctx: &Ctx, model: &Model, params: &Params) -> Stages {
        let Self { ids, h, places, chosen, balance } = self;
        let cu = places.cu.clone();
        let (h1, attention) = attention::forward_at(ctx, model, params, &ids, places, h);
        let options = GateOptions {
            given: chosen.as_ref().map(|c| c.view()),
            balance: balance.as_ref().map(|w| -> (View<'_>, View<'_>) { (cu.view(), w.view()) }),
        };
        let (input, dispatch) = dispatch::forward(ctx, model, params, &ids, h1, options);
        let mlp = mlp::inner(ctx, model, params, &ids, input);
        Stages { attention, dispatch, mlp, combine: combine::Saved }
    }
}

/// dy `[n, D]` to dh `[n, D]`; weight gradients go to `jobs`.
pub fn backward_input(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    dy: Shared,
    jobs: &mut WeightGrads<'_>,
) -> Shared {
    let Stages { attention, mut dispatch, mlp, combine } = match saved.0 {
        Form::Stages(s) => *s,
        Form::Input(a) => a.run(ctx, model, params),
    };
    let experts = combine::backward_input(ctx, model, &dispatch, combine, &dy);
    let (dx, experts) = mlp::backward_input(ctx, model, params, &mut dispatch, mlp, &dy, experts, jobs);
    let dh1 = dispatch::backward_input(ctx, model, params, dispatch, Gradient { dy, dx, experts }, jobs);
    attention::backward_input(ctx, model, params, attention, dh1, jobs)
}
