//! A DeepSeek model: configuration, weights, stages with hand-written backward, and what they cost.
//!
//! Read in this order: `config`, `params` (arena and names), `stages` (attention, feed-forward), `block`, `transformer`,
//! `mtp`, `heads`. Knows tensor names and safetensors; knows no text, no optimiser, no command line.

pub mod config;
mod params;

pub use config::{Family, ModelConfig, MtpHidden, Rope, Yarn};
pub use params::{
    AttentionIds, BlockIds, FeedForwardIds, Grads, Kind, Layout, MlpIds, MoeIds, MtpIds, ParamId, Params, Precision,
    Published, Scope, TensorInfo,
};
