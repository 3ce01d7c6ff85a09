//! Logits of a whole text without the cache: what the cached path is judged by.

use crate::EngineError;
use crate::request::check_tokens;
use hadal_kernels::{Buf, Ctx};
use hadal_model::{Batch, Input, Model, Options, Params, Sequence, heads, trunk};

/// f32 `[T, V]` of `tokens` `[T]` in one pass of the trunk, attention in its multi-head form (no absorption).
pub fn logits_uncached(ctx: &Ctx, model: &Model, params: &Params, tokens: &[u32]) -> Result<Buf, EngineError> {
    check_tokens(&model.config, tokens, 0)?;
    // Ids below the vocabulary's size, which fits i32.
    let tokens = tokens.iter().map(|&t| t as i32).collect();
    let batch = Batch::new(ctx, &[Sequence { tokens, targets: Vec::new() }], 0);
    let (h, _, _) = trunk::forward(ctx, model, params, &batch.depths[0], Input::Tokens, Options::default());
    let (hidden, _) = heads::final_norm(ctx, model, params, &h);
    Ok(heads::logits(ctx, model, params, &hidden))
}
