//! A DeepSeek model: configuration, weights, stages with hand-written backward, and what they cost.
//!
//! Read in this order: `config`, `layout` (arenas and names), `params`, `grads`, `stages` (attention, dispatch, MLP,
//! combine), `block`, `trunk`, `heads`, `mtp`, `pass` (one training micro-batch), `decode` (the latent cache). Knows
//! tensor names and safetensors; knows no text, no optimiser, no command line.

pub mod account;
mod batch;
pub mod block;
pub mod config;
pub mod decode;
mod grads;
pub mod heads;
pub mod io;
mod layout;
pub mod mtp;
mod params;
pub mod pass;
mod recompute;
pub mod stages;
pub mod trunk;
mod weight_grad;

pub use batch::{Batch, Depth, Sequence};
pub use config::{ConfigError, Family, ModelConfig, MtpHidden, PRESETS, Quantization, Rope, Yarn, preset_sequence};
pub use grads::Grads;
pub use io::{
    Checkpoint, ConvertObserver, ConvertOptions, Converted, IoError, SaveOptions, Target, convert, save_checkpoint,
};
pub use layout::{
    AttentionIds, BlockIds, FeedForwardIds, Kind, Layout, MlpIds, MoeIds, MtpIds, ParamId, Published, Scope, TensorInfo,
};
pub use params::{Params, Precision};
pub use recompute::Recompute;
pub use trunk::{Input, LayerTrace, Model, Options, Routing};
pub use weight_grad::{ExpertRows, Shared, WeightGrads};
