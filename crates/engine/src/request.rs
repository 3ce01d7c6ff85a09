//! What is asked, and what is answered.

use crate::EngineError;
use hadal_model::ModelConfig;

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Told apart by this; with `seed` and the position it fixes every random number.
    pub id: u64,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// At least one.
    pub max_new_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Tokens that end the answer; the one that does is its last.
    pub stop: Vec<u32>,
}

/// One token of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// Request it answers.
    pub id: u64,
    /// The token.
    pub token: u32,
    /// Its log-probability before truncation by top_k and top_p, at the request's temperature (at 1 when greedy).
    pub logp: f32,
    /// Set on the last token.
    pub finished: Option<Finish>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token.
    Stop,
    /// max_new_tokens.
    Length,
}

impl Request {
    /// Most tokens it ever has in the cache: the last new token is never fed back.
    pub(crate) fn limit(&self) -> usize {
        self.prompt.len() + self.max_new_tokens - 1
    }

    /// What can be wrong with a request in itself, given the model; [`crate::Engine::submit`] asks too.
    pub fn validate(&self, config: &ModelConfig) -> Result<(), EngineError> {
        check_tokens(config, &self.prompt, self.max_new_tokens)?;
        if self.max_new_tokens == 0 {
            return Err(EngineError::NoNewTokens);
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(EngineError::Temperature(self.temperature));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return Err(EngineError::TopP(self.top_p));
        }
        Ok(())
    }

    /// As [`Request::validate`], and whether a cache of `capacity` tokens holds it.
    pub(crate) fn check(&self, config: &ModelConfig, capacity: usize) -> Result<(), EngineError> {
        self.validate(config)?;
        if self.limit() > capacity {
            return Err(EngineError::LargerThanCache { tokens: self.limit(), capacity });
        }
        Ok(())
    }
}

/// At least one token, ids within the vocabulary, and positions for `new` more.
pub(crate) fn check_tokens(config: &ModelConfig, tokens: &[u32], new: usize) -> Result<(), EngineError> {
    if tokens.is_empty() {
        return Err(EngineError::EmptyPrompt);
    }
    let vocab = config.vocab_size;
    if let Some((index, &token)) = tokens.iter().enumerate().find(|&(_, &t)| t as usize >= vocab) {
        return Err(EngineError::TokenOutOfRange { index, token, vocab });
    }
    let positions = config.max_position_embeddings;
    if tokens.len().saturating_add(new) > positions {
        return Err(EngineError::TooLong { prompt: tokens.len(), new, positions });
    }
    Ok(())
}
