//! What inference takes of a GPU's memory, known before a weight is read: the fullest moments of the work are run on a
//! device that only counts ([`Cuda::dry`]), so that the figure is that of the code and not of a formula beside it.

use crate::{CacheOptions, Engine, logits_uncached};
use hadal_kernels::cuda::Cuda;
use hadal_kernels::{Cpu, Device};
use hadal_model::{Model, ModelConfig, Params, Precision};
use std::sync::Arc;

/// What is to be computed with one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A text of so many tokens, whose first are given.
    Write {
        /// Tokens of the prompt.
        prompt: usize,
        /// Those and what is written.
        tokens: usize,
    },
    /// Logits of all tokens through the cache.
    Logits {
        /// Tokens.
        tokens: usize,
        /// Of them in a pass.
        chunk: usize,
    },
    /// Logits of all tokens in one pass without a cache.
    Uncached {
        /// Tokens.
        tokens: usize,
    },
}

impl Work {
    /// Tokens of the sequence.
    pub fn tokens(self) -> usize {
        match self {
            Self::Write { tokens, .. } | Self::Logits { tokens, .. } | Self::Uncached { tokens } => tokens,
        }
    }

    /// Tokens of the sequence that the cache holds.
    pub fn cached(self) -> usize {
        if matches!(self, Self::Uncached { .. }) { 0 } else { self.tokens() }
    }

    /// The same with a sequence of `tokens` tokens.
    pub fn of(self, tokens: usize) -> Self {
        match self {
            Self::Write { prompt, .. } => Self::Write { prompt: prompt.min(tokens), tokens },
            Self::Logits { chunk, .. } => Self::Logits { tokens, chunk },
            Self::Uncached { .. } => Self::Uncached { tokens },
        }
    }
}

/// Bytes that `work` takes with this model, weights included, on a GPU like `like` (None: an H200): of the arena that has
/// room for all of it. The CUDA context and the compiled kernels, some hundred MiB, are not included.
pub fn gpu_memory(
    like: Option<&Cuda>,
    host: &Arc<Cpu>,
    config: &ModelConfig,
    precision: Precision,
    work: Work,
) -> usize {
    let cuda = Cuda::dry(like, host.clone());
    cuda.set_invariant(true);
    let ctx = Device::Cuda(cuda.clone()).ctx();
    let model = Model::without_mtp(&ctx, config.clone());
    let params = Params::zeros_for_inference(&ctx, model.layout.clone(), precision);
    let options = CacheOptions::max_tokens(work.cached());
    match work {
        // What the model has no positions for takes no memory: it is refused.
        Work::Uncached { tokens } => drop(logits_uncached(&ctx, &model, &params, &vec![0; tokens])),
        Work::Logits { tokens, chunk } => {
            Engine::new(&ctx, model, params, options).rehearse_logits(&ctx, tokens, chunk)
        }
        Work::Write { prompt, tokens } => {
            let mut engine = Engine::new(&ctx, model, params, options);
            engine.rehearse_step(&ctx, prompt, prompt.min(options.prefill_tokens));
            engine.rehearse_step(&ctx, tokens, 1);
        }
    }
    cuda.memory().reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Finish, Request};
    use hadal_kernels::Ctx;
    use hadal_model::{Layout, Scope, account};

    fn host() -> Arc<Cpu> {
        Device::cpu(Some(2)).unwrap().ctx().host().clone()
    }

    /// Weights, cache and logits, which are known beforehand, and little more; and no less for more.
    #[test]
    fn most_of_it_is_weights_and_cache() {
        let (config, host) = (ModelConfig::preset("v2-lite").unwrap(), host());
        let layout = Layout::new(&config, Scope { mtp: 0, ..Scope::whole(&config) });
        for precision in [Precision::Bf16, Precision::Fp32] {
            let weights = Params::inference_bytes(&layout, precision);
            let cache = account::cache_bytes_per_token(&config, precision.act());
            let logits = 4 * config.vocab_size;
            for (work, bytes_a_token) in [
                (Work::Write { prompt: 300, tokens: 1 }, cache),
                (Work::Logits { tokens: 1, chunk: 256 }, cache + logits),
                (Work::Uncached { tokens: 1 }, logits),
            ] {
                let mut before = weights;
                for tokens in [512, 4096, 8192] {
                    let found = gpu_memory(None, &host, &config, precision, work.of(tokens));
                    let least = weights + bytes_a_token * tokens;
                    assert!(found >= least.max(before), "{work:?}, {tokens} tokens: {found} bytes, at least {least}");
                    // Activations: of a pass through the cache those of one layer, without it what all layers keep.
                    let (computed, each) = if work.cached() == 0 { (tokens, 4 << 20) } else { (256, 1 << 20) };
                    let most = least + computed * each;
                    assert!(found < most, "{work:?}, {tokens} tokens: {found} bytes, at most {most}");
                    before = found;
                }
            }
        }
    }

    /// What was predicted is enough, and not far from what is taken: the whole work, chunk by chunk, takes no more than
    /// its fullest passes. A device that is not there has no answers, and so writes nothing.
    #[test]
    fn no_more_is_taken_than_predicted() {
        let config = ModelConfig::preset("mini").unwrap();
        let (write, logits) = (Work::Write { prompt: 300, tokens: 310 }, Work::Logits { tokens: 500, chunk: 128 });
        let uncached = Work::Uncached { tokens: 500 };
        for precision in [Precision::Bf16, Precision::Fp32] {
            for work in [logits, uncached] {
                check(&Cuda::dry(None, host()), false, &config, precision, work);
            }
            for work in [logits, uncached, write] {
                if Cuda::count().unwrap() == 0 {
                    return hadal_numerics::skipped("no NVIDIA GPU");
                }
                let ctx = Device::cuda(0, Some(2)).unwrap().ctx();
                check(ctx.device.as_cuda().unwrap(), true, &config, precision, work);
            }
        }
    }

    fn check(cuda: &Arc<Cuda>, there: bool, config: &ModelConfig, precision: Precision, work: Work) {
        let ctx = Device::Cuda(cuda.clone()).ctx();
        cuda.set_invariant(true);
        let predicted = gpu_memory(Some(cuda), ctx.host(), config, precision, work);
        if there {
            cuda.reserve(predicted);
        }
        let taken = cuda.memory().taken;
        compute(&ctx, config, precision, work);
        let found = cuda.memory();
        assert_eq!(found.taken, taken, "{work:?}: one piece is enough");
        assert!(found.reached <= predicted, "{work:?}: {predicted} bytes predicted, {found:?}");
        assert!(predicted <= found.peak + found.peak / 20, "{work:?}: {predicted} bytes predicted, {found:?}");
    }

    /// Does the work with weights that are all zero.
    fn compute(ctx: &Ctx, config: &ModelConfig, precision: Precision, work: Work) {
        let model = Model::without_mtp(ctx, config.clone());
        let params = Params::zeros_for_inference(ctx, model.layout.clone(), precision);
        let ids = vec![1; work.tokens()];
        let options = CacheOptions::max_tokens(work.cached());
        match work {
            Work::Uncached { .. } => drop(logits_uncached(ctx, &model, &params, &ids).unwrap()),
            Work::Logits { chunk, .. } => {
                drop(Engine::new(ctx, model, params, options).logits(ctx, &ids, chunk).unwrap())
            }
            Work::Write { prompt, tokens } => {
                let request = Request {
                    id: 0,
                    prompt: ids[..prompt].to_vec(),
                    max_new_tokens: tokens - prompt,
                    temperature: 1.0,
                    top_k: 5,
                    top_p: 0.9,
                    seed: 0,
                    stop: Vec::new(),
                };
                let mut last = None;
                let mut engine = Engine::new(ctx, model, params, options);
                engine.generate(ctx, [request], |event| last = event.finished).unwrap();
                assert_eq!(last, Some(Finish::Length));
            }
        }
    }
}
