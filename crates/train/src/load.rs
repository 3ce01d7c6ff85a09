//! How many tokens chose each expert: counted on the device, where the biases of the gates are moved by it, and read by
//! whoever wants to see it.

use hadal_kernels::ops::{bias_update, expert_load};
use hadal_kernels::{Buf, Ctx, DType, Download};
use hadal_model::{FeedForwardIds, LayerTrace, Layout, ParamId, Params};
use std::collections::BTreeMap;

/// Tokens that chose each expert, by MoE layer, over a global batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    layers: BTreeMap<usize, Vec<i64>>,
}

impl Load {
    /// Adds one micro-batch's routing.
    pub fn add(&mut self, traces: &[LayerTrace]) {
        for t in traces {
            let load = t.load();
            let sum = self.layers.entry(t.layer).or_insert_with(|| vec![0; load.len()]);
            sum.iter_mut().zip(load).for_each(|(a, b)| *a += b);
        }
    }

    /// max_i load_i / mean - 1, the worst layer (MaxVio of arXiv 2408.15664); 0 without experts.
    pub fn max_violation(&self) -> f64 {
        let violation = |l: &Vec<i64>| {
            let mean = l.iter().sum::<i64>() as f64 / l.len() as f64;
            if mean == 0.0 { 0.0 } else { *l.iter().max().unwrap_or(&0) as f64 / mean - 1.0 }
        };
        self.layers.values().map(violation).fold(0.0, f64::max)
    }

    /// Load of each MoE layer by global index.
    pub fn layers(&self) -> &BTreeMap<usize, Vec<i64>> {
        &self.layers
    }
}

/// The counts of one rank's tokens over a global batch, on the device.
pub(crate) struct Counts {
    /// Global index and correction bias of each MoE layer held, MTP layers included.
    layers: Vec<(usize, Option<ParamId>)>,
    experts: usize,
    /// i32 `[layers, E]`.
    counts: Buf,
}

/// Counts on their way to the host.
pub(crate) struct CountsDownload {
    layers: Vec<usize>,
    experts: usize,
    counts: Download,
}

impl Counts {
    pub fn new(ctx: &Ctx, layout: &Layout, experts: usize) -> Self {
        let blocks = layout.blocks.iter().chain(layout.mtp.iter().map(|m| &m.block));
        let moe = blocks.filter_map(|b| match b.feed_forward {
            FeedForwardIds::Moe(m) => Some((b.layer, m.bias)),
            FeedForwardIds::Dense(_) => None,
        });
        let layers: Vec<_> = moe.collect();
        Self { counts: ctx.zeros(DType::I32, layers.len() * experts), layers, experts }
    }

    pub fn clear(&mut self) {
        self.counts.clear();
    }

    /// Adds one micro-batch's routing.
    pub fn add(&mut self, ctx: &Ctx, traces: &[LayerTrace]) {
        for t in traces {
            let Some(i) = self.layers.iter().position(|(layer, _)| *layer == t.layer) else {
                unreachable!("layer {} routes and is not held", t.layer)
            };
            let counts = self.counts.view_mut().slice(i * self.experts..(i + 1) * self.experts);
            expert_load::add(ctx, t.offsets.view(), counts);
        }
    }

    /// Moves every correction bias by gamma against its expert's load (V3 report 2.1.2).
    pub fn update_biases(&self, ctx: &Ctx, params: &mut Params, gamma: f32) {
        for (counts, id) in self.layers.iter().enumerate().filter_map(|(i, (_, id))| Some((i, (*id)?))) {
            let load = self.counts.view().slice(counts * self.experts..(counts + 1) * self.experts);
            bias_update::step(ctx, load, gamma, params.f32_mut(id));
        }
    }

    /// Asks for the counts as they are once all before is done.
    pub fn download(&self, ctx: &Ctx) -> CountsDownload {
        let layers = self.layers.iter().map(|(layer, _)| *layer).collect();
        CountsDownload { layers, experts: self.experts, counts: ctx.download(self.counts.view()) }
    }
}

impl CountsDownload {
    pub fn read(&self) -> Load {
        let counts = self.counts.i32();
        let of = |i: usize| counts[i * self.experts..(i + 1) * self.experts].iter().map(|&c| i64::from(c)).collect();
        Load { layers: self.layers.iter().enumerate().map(|(i, layer)| (*layer, of(i))).collect() }
    }
}
