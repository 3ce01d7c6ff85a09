//! Why a request is refused, before anything is computed, or given up: one line each.

/// A request that cannot be served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// Nothing to continue.
    #[error("the prompt is empty: expected at least one token")]
    EmptyPrompt,
    /// Nothing to do.
    #[error("max_new_tokens 0: expected at least 1")]
    NoNewTokens,
    /// A token that the model does not have.
    #[error("token {token} at index {index} of the prompt: expected an id below {vocab}")]
    TokenOutOfRange {
        /// Where in the prompt.
        index: usize,
        /// What was found.
        token: u32,
        /// vocab_size.
        vocab: usize,
    },
    /// More positions than the model has.
    #[error(
        "{prompt} prompt tokens and {new} new ones: expected at most {positions} together (max_position_embeddings)"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// max_new_tokens.
        new: usize,
        /// max_position_embeddings.
        positions: usize,
    },
    /// It would not fit even alone.
    #[error("{tokens} tokens to cache: expected at most {capacity}, the whole cache")]
    LargerThanCache {
        /// Tokens it caches at its longest.
        tokens: usize,
        /// Tokens the cache holds.
        capacity: usize,
    },
    /// Logits were asked for while requests hold the cache.
    #[error("{needed} cache blocks needed, {free} free: other requests hold the rest")]
    CacheInUse {
        /// Blocks needed.
        needed: usize,
        /// Blocks free.
        free: usize,
    },
    /// Events of two live requests would be told apart by nothing.
    #[error("request {id} is already there: expected an id that no unfinished request has")]
    DuplicateId {
        /// The id.
        id: u64,
    },
    /// A temperature that divides into nonsense.
    #[error("temperature {0}: expected 0 (greedy) or a finite positive number")]
    Temperature(f32),
    /// A share that is none.
    #[error("top_p {0}: expected a number from 0 to 1")]
    TopP(f32),
    /// Finite weights whose activations overflow: there is nothing to draw from.
    #[error("request {id}: expected finite logits for position {position}, found others (the activations overflow)")]
    NotFinite {
        /// The request, which is no longer there.
        id: u64,
        /// Position of the token that could not be drawn, from 0.
        position: usize,
    },
}
