//! A DeepSeek model: configuration, weights, stages with hand-written backward, and what they cost.
//!
//! Read in this order: `config`, `params` (arena and names), `stages` (attention, feed-forward), `block`, `transformer`,
//! `mtp`, `heads`. Knows tensor names and safetensors; knows no text, no optimiser, no command line.

pub mod account;
pub mod config;
pub mod io;
mod params;

pub use config::{ConfigError, Family, ModelConfig, MtpHidden, PRESETS, Rope, Yarn};
pub use io::{Checkpoint, IoError, SaveOptions, load_params, save_checkpoint};
pub use params::{
    AttentionIds, BlockIds, FeedForwardIds, Grads, Kind, Layout, MlpIds, MoeIds, MtpIds, ParamId, Params, Precision,
    Published, Scope, TensorInfo,
};
