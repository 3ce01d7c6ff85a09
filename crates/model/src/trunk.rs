//! A range of blocks, with or without the embedding in front: what one pipeline stage holds.

use crate::block;
use crate::stages::dispatch::{self, GateOptions};
use crate::weight_grad::{Shared, WeightGrads};
use crate::{Depth, Layout, ModelConfig, Params, Recompute, Scope};
use hadal_comm::{Exchange, ExpertRange, Identity};
use hadal_kernels::ops::embedding;
use hadal_kernels::{Buf, Ctx};
use std::sync::Arc;

/// A model, or the part of one that `layout.scope` names; its weights live in [`Params`].
pub struct Model {
    /// What it is.
    pub config: ModelConfig,
    /// Where its weights lie.
    pub layout: Arc<Layout>,
    /// How tokens reach their experts.
    pub exchange: Box<dyn Exchange>,
    /// What training's backward computes again.
    pub recompute: Recompute,
    /// f32 `[R/2]`.
    pub(crate) inv_freq: Buf,
}

impl Model {
    /// The part of a model that `layers`, `embedding`, `head` and `mtp` of `scope` name; the experts held are the
    /// exchange's.
    pub fn new(ctx: &Ctx, config: ModelConfig, scope: Scope, exchange: Box<dyn Exchange>) -> Self {
        let scope = Scope { experts: exchange.experts(), ..scope };
        let inv_freq = ctx.from_f32(&config.inv_freq());
        let layout = Arc::new(Layout::new(&config, scope));
        Self { layout, config, exchange, recompute: Recompute::default(), inv_freq }
    }

    /// What inference without speculation needs of a model, on one rank: no MTP layers.
    pub fn without_mtp(ctx: &Ctx, config: ModelConfig) -> Self {
        let scope = Scope { mtp: 0, ..Scope::whole(&config) };
        let experts = config.n_routed_experts;
        Self::new(ctx, config, scope, Box::new(Identity { experts }))
    }

    /// Whether all experts are held here, so that no rows of others come or go.
    pub(crate) fn alone(&self) -> bool {
        self.exchange.experts() == ExpertRange::all(self.config.n_routed_experts)
    }

    /// All of a model on one rank.
    pub fn whole(ctx: &Ctx, config: ModelConfig) -> Self {
        let (scope, experts) = (Scope::whole(&config), config.n_routed_experts);
        Self::new(ctx, config, scope, Box::new(Identity { experts }))
    }
}

/// What enters a trunk.
pub enum Input {
    /// The depth's own tokens, embedded here.
    Tokens,
    /// `[n, D]` from an earlier stage.
    Hidden(Shared),
}

/// Choices of every layer to replay: i32 `[n, K]` by global layer index (MTP layers counted on); None selects.
pub type Routing = Vec<Option<Buf>>;

/// How a forward pass is to run.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Replay these choices.
    pub routing: Option<&'a Routing>,
    /// f32 `[S]`: weight of each sequence's balance loss; None leaves it out.
    pub balance: Option<&'a Buf>,
}

impl<'a> Options<'a> {
    pub(crate) fn gate(self, layer: usize, depth: &'a Depth) -> GateOptions<'a> {
        GateOptions {
            given: self.routing.and_then(|r| r.get(layer)?.as_ref()).map(Buf::view),
            balance: self.balance.map(|w| (depth.cu.view(), w.view())),
        }
    }
}

/// One MoE layer's routing in a pass.
#[derive(Clone, Debug)]
pub struct LayerTrace {
    /// Global layer index.
    pub layer: usize,
    /// i32 `[n, K]`.
    pub indices: Shared,
    /// i32 `[E + 1]`: differences are the load of this rank's tokens.
    pub offsets: Shared,
    /// f32 `[S]`: balance loss of each sequence, without alpha; if it was asked for.
    pub balance: Option<Shared>,
}

impl LayerTrace {
    pub(crate) fn of(layer: usize, dispatched: &dispatch::Saved) -> Option<Self> {
        let g = dispatched.gate.as_ref()?;
        let (indices, offsets) = (g.indices.clone(), g.offsets.clone());
        Some(Self { layer, indices, offsets, balance: g.balance.clone() })
    }

    /// Tokens of this rank that chose each expert.
    pub fn load(&self) -> Vec<i64> {
        self.offsets.view().to_i32().windows(2).map(|w| i64::from(w[1] - w[0])).collect()
    }
}

/// What a trunk keeps until backward.
pub struct Saved {
    tokens: Option<Shared>,
    blocks: Vec<block::Saved>,
}

impl Saved {
    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(block::Saved::bytes).sum()
    }
}

/// Embeds tokens `[n]` into `[n, D]` of the activation dtype.
pub(crate) fn embed(ctx: &Ctx, model: &Model, params: &Params, tokens: &Buf) -> Shared {
    let Some(id) = model.layout.embedding else { panic!("this part of the model has no embedding") };
    let mut h = ctx.empty(params.precision.act(), tokens.len() * model.config.hidden_size);
    embedding::forward(ctx, tokens.view(), &params.weight(id), h.view_mut());
    Arc::new(h)
}

/// Through the held blocks: the residual stream `[n, D]` before the final norm, and each MoE layer's routing.
pub fn forward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    depth: &Depth,
    input: Input,
    options: Options<'_>,
) -> (Shared, Saved, Vec<LayerTrace>) {
    let (mut h, tokens) = match input {
        Input::Tokens => (embed(ctx, model, params, &depth.tokens), Some(depth.tokens.clone())),
        Input::Hidden(h) => (h, None),
    };
    let (mut blocks, mut traces) = (Vec::new(), Vec::new());
    for ids in &model.layout.blocks {
        let (y, saved, trace) = block::forward(ctx, model, params, ids, depth, h, options.gate(ids.layer, depth));
        traces.extend(trace);
        blocks.push(saved);
        h = y;
    }
    (h, Saved { tokens, blocks }, traces)
}

/// From the gradient of the output to that of the input `[n, D]`; the embedding's (use 0) goes to `jobs` if it was
/// here.
pub fn backward(
    ctx: &Ctx,
    model: &Model,
    params: &Params,
    saved: Saved,
    mut dh: Shared,
    jobs: &mut WeightGrads<'_>,
) -> Shared {
    for block in saved.blocks.into_iter().rev() {
        dh = block::backward_input(ctx, model, params, block, dh, jobs);
    }
    if let (Some(tokens), Some(id)) = (saved.tokens, model.layout.embedding) {
        jobs.embedding(id, 0, &tokens, &dh);
    }
    dh
}
