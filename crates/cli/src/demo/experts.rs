//! How the experts of each MoE layer share held-out text.

use super::text::column;
use hadal_model::ModelConfig;
use hadal_train::Load;
use serde::Serialize;

/// Widest chart; of more experts a column shows the busiest of several.
const COLUMNS: usize = 64;

/// The load of all layers.
#[derive(Serialize)]
pub struct Experts {
    /// Tokens read.
    tokens: usize,
    /// Share of the tokens that each expert would get if all got the same.
    even: f64,
    layers: Vec<Layer>,
}

/// One layer's.
#[derive(Serialize)]
struct Layer {
    layer: usize,
    mtp: bool,
    /// Share of the layer's tokens that chose each expert.
    shares: Vec<f64>,
    most: f64,
    least: f64,
    /// Largest load over the mean, less 1.
    max_violation: f64,
    /// Experts that no token chose.
    unused: Vec<usize>,
}

impl Experts {
    /// None for a model without experts.
    pub fn of(c: &ModelConfig, tokens: usize, load: &Load) -> Option<Self> {
        let even = c.num_experts_per_tok as f64 / c.n_routed_experts.max(1) as f64;
        let layers: Vec<Layer> = load.layers().iter().map(|(&layer, counts)| Layer::of(c, layer, counts)).collect();
        (!layers.is_empty()).then_some(Self { tokens, even, layers })
    }

    /// The chart.
    pub fn text(&self) -> String {
        let mut s = format!(
            "\nExpert load on {} held-out tokens (▄: an even share, {:.1} % of the tokens; █: twice that or more)\n\n",
            self.tokens,
            100.0 * self.even
        );
        for l in &self.layers {
            let name = format!("layer {}{}", l.layer, if l.mtp { ", MTP" } else { "" });
            s += &format!(
                "  {name:<14} {}  most {:.1} %, least {:.1} %, MaxVio {:.2}\n",
                self.chart(&l.shares),
                100.0 * l.most,
                100.0 * l.least,
                l.max_violation
            );
        }
        let unused: Vec<String> = self.layers.iter().filter_map(Layer::unused).collect();
        s + &match unused.is_empty() {
            true => "  No expert is dead: each got tokens.\n".to_string(),
            false => format!("  Dead, without a single token: {}.\n", unused.join("; ")),
        }
    }

    /// A column an expert, or a few; a dot for none.
    fn chart(&self, shares: &[f64]) -> String {
        let each = shares.len().div_ceil(COLUMNS);
        let highest = |part: &[f64]| part.iter().fold(0.0, |a: f64, &b| a.max(b));
        let picture = |share: f64| if share == 0.0 { '·' } else { column(share / (2.0 * self.even)) };
        shares.chunks(each).map(|part| picture(highest(part))).collect()
    }
}

impl Layer {
    fn of(c: &ModelConfig, layer: usize, counts: &[i64]) -> Self {
        let slots: i64 = counts.iter().sum();
        // Every token chooses K experts.
        let tokens = slots as f64 / c.num_experts_per_tok as f64;
        let shares: Vec<f64> = counts.iter().map(|&n| n as f64 / tokens.max(1.0)).collect();
        let most = shares.iter().fold(0.0, |a: f64, &b| a.max(b));
        let even = c.num_experts_per_tok as f64 / counts.len() as f64;
        Self {
            layer,
            mtp: layer >= c.num_hidden_layers,
            most,
            least: shares.iter().fold(f64::INFINITY, |a, &b| a.min(b)),
            max_violation: most / even - 1.0,
            unused: (0..counts.len()).filter(|&e| counts[e] == 0).collect(),
            shares,
        }
    }

    fn unused(&self) -> Option<String> {
        let names: Vec<String> = self.unused.iter().map(usize::to_string).collect();
        (!names.is_empty()).then(|| format!("layer {}: {}", self.layer, names.join(", ")))
    }
}
