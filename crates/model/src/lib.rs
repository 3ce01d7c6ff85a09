//! A DeepSeek model: configuration, weights, stages with hand-written backward, and what they cost.
//!
//! Read in this order: `config`, `params` (arena and names), `stages` (attention, dispatch, MLP, combine), `block`,
//! `trunk`, `heads`, `mtp`, `pass` (one training micro-batch), `decode` (the latent cache). Knows tensor names and
//! safetensors; knows no text, no optimiser, no command line.

pub mod account;
mod batch;
pub mod block;
pub mod config;
pub mod decode;
pub mod heads;
pub mod io;
pub mod mtp;
mod params;
pub mod pass;
pub mod stages;
pub mod trunk;
mod weight_grad;

pub use batch::{Batch, Depth, Sequence};
pub use config::{ConfigError, Family, ModelConfig, MtpHidden, PRESETS, Rope, Yarn};
pub use io::{Checkpoint, IoError, SaveOptions, load_params, save_checkpoint};
pub use params::{
    AttentionIds, BlockIds, FeedForwardIds, Grads, Kind, Layout, MlpIds, MoeIds, MtpIds, ParamId, Params, Precision,
    Published, Scope, TensorInfo,
};
pub use trunk::{Input, LayerTrace, Model, Options, Routing};
pub use weight_grad::{Shared, WeightGrads};
