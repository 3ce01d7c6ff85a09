//! Validation: bits per byte of held-out text, so that tokenizers and models can be compared.

use hadal_data::TokenStream;
use hadal_kernels::Ctx;
use hadal_model::heads::{self, Request};
use hadal_model::{Batch, Input, Model, Options, Params, Sequence, trunk};

/// What validation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean cross-entropy, nats a token (end-of-document tokens included).
    pub loss: f64,
    /// Total cross-entropy over the bytes that the predicted tokens stand for.
    pub bits_per_byte: f64,
    /// Tokens predicted.
    pub tokens: usize,
}

/// What to validate on, and how much at once.
#[derive(Clone, Copy, Debug)]
pub struct Held<'a> {
    /// Held-out documents.
    pub stream: &'a TokenStream,
    /// Bytes of text each token id stands for.
    pub byte_lengths: &'a [u32],
    /// Tokens a window.
    pub seq: usize,
    /// Windows in flight at once.
    pub batch: usize,
    /// At most this many tokens, from the beginning.
    pub max_tokens: usize,
}

impl<'a> Held<'a> {
    /// The windows that are validated on.
    pub fn windows(self) -> impl Iterator<Item = &'a [u32]> {
        self.stream.validation_windows(self.seq).take(self.max_tokens.div_ceil(self.seq))
    }
}

/// Cross-entropy of the held-out stream in windows of `seq`, each without the context before it.
pub fn evaluate(ctx: &Ctx, model: &Model, params: &Params, held: Held<'_>) -> Evaluation {
    let windows: Vec<&[u32]> = held.windows().collect();
    let (mut nats, mut tokens, mut bytes) = (0.0f64, 0usize, 0u64);
    for part in windows.chunks(held.batch) {
        let sequences: Vec<Sequence> = part.iter().map(|w| sequence(w)).collect();
        let batch = Batch::new(ctx, &sequences, 0);
        nats -= log_likelihood(ctx, model, params, &batch);
        tokens += batch.depths[0].predicted;
        bytes += part.iter().flat_map(|w| &w[1..]).map(|&t| u64::from(held.byte_lengths[t as usize])).sum::<u64>();
    }
    Evaluation {
        loss: nats / tokens.max(1) as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
        tokens,
    }
}

fn log_likelihood(ctx: &Ctx, model: &Model, params: &Params, batch: &Batch) -> f64 {
    let depth = &batch.depths[0];
    let (h, _, _) = trunk::forward(ctx, model, params, depth, Input::Tokens, Options::default());
    let (normed, _) = heads::final_norm(ctx, model, params, &h);
    let request = Request { targets: depth.targets.clone(), temperature: 1.0, given: None, top_k: 0 };
    let out = heads::forward(ctx, model, params, &normed, request, 0);
    out.logp.view().to_f32().iter().map(|&l| f64::from(l)).sum()
}

/// A window of T + 1 tokens as T inputs and their targets.
pub fn sequence(window: &[u32]) -> Sequence {
    let ids: Vec<i32> = window.iter().map(|&t| t as i32).collect();
    Sequence { tokens: ids[..ids.len() - 1].to_vec(), targets: ids[1..].to_vec() }
}
