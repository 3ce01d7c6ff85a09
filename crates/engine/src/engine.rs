//! The loop: plan, pack, one forward pass, sample. A token's logits depend on its own sequence alone, and a random
//! number on (seed, request, position), so that an answer is the same whatever else runs, however the prompt is cut
//! into chunks, and however often the sequence was put back.

use crate::batch::{Span, pack};
use crate::cache::LatentCache;
use crate::pool::{Block, BlockPool, blocks_for};
use crate::request::check_tokens;
use crate::scheduler::{self, Plan, State};
use crate::{EngineError, Event, Finish, Request};
use hadal_kernels::ops::mla_decode::BLOCK;
use hadal_kernels::ops::{rows, sample};
use hadal_kernels::{Buf, Ctx, DType};
use hadal_model::{Model, Params, decode, heads};
use std::sync::Arc;

/// How much memory the cache takes, and how a step is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Blocks of 64 tokens in each layer.
    pub blocks: usize,
    /// Most prompt tokens computed in a step, over all sequences. At least 1.
    pub prefill_tokens: usize,
}

impl CacheOptions {
    /// `blocks` blocks, 256 prompt tokens a step.
    pub fn blocks(blocks: usize) -> Self {
        Self { blocks, prefill_tokens: 256 }
    }

    /// Room for one sequence of `tokens` tokens (several share it in whole blocks), 256 prompt tokens a step.
    pub fn max_tokens(tokens: usize) -> Self {
        Self::blocks(blocks_for(tokens))
    }
}

/// What an engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Sequences that hold cache.
    pub running: usize,
    /// Sequences that wait for it.
    pub waiting: usize,
    /// Blocks held.
    pub used_blocks: usize,
    /// All blocks.
    pub total_blocks: usize,
    /// Bytes of the cache.
    pub cache_bytes: usize,
}

/// An unfinished request.
struct Sequence {
    request: Request,
    /// Prompt, then what was generated.
    tokens: Vec<u32>,
    /// Tokens whose latents are in the cache.
    cached: usize,
    /// Blocks of the cached tokens, in order.
    blocks: Vec<Block>,
}

impl Sequence {
    fn state(&self) -> State {
        let (known, held) = (self.tokens.len(), self.blocks.len());
        State { known, cached: self.cached, held, limit: self.request.limit() }
    }

    /// How the token to come is drawn.
    fn sampling(&self) -> sample::Params {
        let r = &self.request;
        sample::Params {
            temperature: r.temperature,
            top_k: r.top_k,
            top_p: r.top_p,
            seed: r.seed,
            request: r.id,
            position: self.tokens.len() as u64,
        }
    }

    /// Takes the token that was drawn.
    fn take(&mut self, token: u32, logp: f32) -> Event {
        self.tokens.push(token);
        let new = self.tokens.len() - self.request.prompt.len();
        let finished = if self.request.stop.contains(&token) {
            Some(Finish::Stop)
        } else {
            (new == self.request.max_new_tokens).then_some(Finish::Length)
        };
        Event { id: self.request.id, token, logp, finished }
    }
}

/// A model that answers requests.
pub struct Engine {
    model: Arc<Model>,
    params: Arc<Params>,
    cache: LatentCache,
    pool: BlockPool,
    prefill_tokens: usize,
    /// In order of arrival.
    sequences: Vec<Sequence>,
    /// The first so many hold cache.
    running: usize,
}

impl Engine {
    /// A whole model (embedding, all layers, head) over a cache of its own. Model and weights may be shared.
    pub fn new(ctx: &Ctx, model: impl Into<Arc<Model>>, params: impl Into<Arc<Params>>, options: CacheOptions) -> Self {
        let (model, params) = (model.into(), params.into());
        let layers = model.layout.blocks.len();
        assert_eq!(layers, model.config.num_hidden_layers, "an engine needs all layers of its model");
        assert!(options.prefill_tokens > 0, "a step must be allowed at least one prompt token");
        assert!(i32::try_from(options.blocks * BLOCK).is_ok(), "{} blocks: slots are i32", options.blocks);
        let cache = LatentCache::new(ctx, &model.config, layers, params.precision.act(), options.blocks);
        Self {
            model,
            params,
            cache,
            pool: BlockPool::new(options.blocks),
            prefill_tokens: options.prefill_tokens,
            sequences: Vec::new(),
            running: 0,
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens that the whole cache holds.
    pub fn capacity(&self) -> usize {
        self.pool.total() * BLOCK
    }

    /// What is running, waiting and held.
    pub fn usage(&self) -> Usage {
        Usage {
            running: self.running,
            waiting: self.sequences.len() - self.running,
            used_blocks: self.pool.used_blocks(),
            total_blocks: self.pool.total(),
            cache_bytes: self.cache.bytes(),
        }
    }

    /// True when every request has been answered.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Queues a request behind those that are there.
    pub fn submit(&mut self, request: Request) -> Result<(), EngineError> {
        request.check(&self.model.config, self.capacity())?;
        if self.sequences.iter().any(|s| s.request.id == request.id) {
            return Err(EngineError::DuplicateId { id: request.id });
        }
        self.sequences.push(Sequence { tokens: request.prompt.clone(), request, cached: 0, blocks: Vec::new() });
        Ok(())
    }

    /// Forgets an unfinished request; false if there is none of that id.
    pub fn cancel(&mut self, id: u64) -> bool {
        let found = self.sequences.iter().position(|s| s.request.id == id);
        if let Some(i) = found {
            self.remove(i);
        }
        found.is_some()
    }

    /// One forward pass: a token for each sequence that has caught up, in order of arrival. Where the logits of one are
    /// not finite, that request is given up and nothing is drawn; the others go on with the next step as if it had
    /// never been there.
    pub fn step(&mut self, ctx: &Ctx) -> Result<Vec<Event>, EngineError> {
        let states: Vec<State> = self.sequences.iter().map(Sequence::state).collect();
        let plan = scheduler::plan(&states, self.running, self.pool.free_blocks(), self.prefill_tokens);
        self.hold(&plan);
        if plan.work.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = self.forward(ctx, &plan);
        let (drawn, last) = self.caught_up(&plan);
        let logits = self.last_logits(ctx, &hidden, &last);
        // Of logits, which are as wide as the vocabulary, nothing leaves the device.
        let finite = self.finite(ctx, &logits, drawn.len());
        if let Some(bad) = ctx.download(finite.view()).i32().iter().position(|&f| f == 0) {
            return Err(self.give_up(&drawn, bad));
        }
        let how: Vec<sample::Params> = drawn.iter().map(|&i| self.sequences[i].sampling()).collect();
        let (tokens, logp) = self.draw(ctx, &logits, &how);
        let (tokens, logp) = (ctx.download(tokens.view()), ctx.download(logp.view()));
        let answers = drawn.iter().zip(tokens.i32()).zip(logp.f32());
        // A drawn token is an id, never negative.
        let events: Vec<Event> = answers.map(|((&i, t), p)| self.sequences[i].take(t as u32, p)).collect();
        for (&i, event) in drawn.iter().zip(&events).rev() {
            if event.finished.is_some() {
                self.remove(i);
            }
        }
        Ok(events)
    }

    /// Answers requests until all are done, those already queued included; `each` sees every token as it comes. If one
    /// request is refused none of them is queued; if one is given up, the others stay as they are.
    pub fn generate(
        &mut self,
        ctx: &Ctx,
        requests: impl IntoIterator<Item = Request>,
        mut each: impl FnMut(Event),
    ) -> Result<(), EngineError> {
        let before = self.sequences.len();
        for request in requests {
            if let Err(e) = self.submit(request) {
                // Nothing of these has run: they hold no block.
                self.sequences.truncate(before);
                return Err(e);
            }
        }
        while !self.is_idle() {
            self.step(ctx)?.into_iter().for_each(&mut each);
        }
        Ok(())
    }

    /// f32 `[T, V]` of `tokens` `[T]` through the cache, `chunk` (at least 1) tokens a pass. Queued requests stay as
    /// they are; the blocks it takes must be free.
    pub fn logits(&mut self, ctx: &Ctx, tokens: &[u32], chunk: usize) -> Result<Buf, EngineError> {
        assert!(chunk > 0, "logits in chunks of no tokens");
        check_tokens(&self.model.config, tokens, 0)?;
        if tokens.len() > self.capacity() {
            return Err(EngineError::LargerThanCache { tokens: tokens.len(), capacity: self.capacity() });
        }
        let (needed, free) = (blocks_for(tokens.len()), self.pool.free_blocks());
        let blocks = self.pool.allocate(needed).ok_or(EngineError::CacheInUse { needed, free })?;
        let vocab = self.model.config.vocab_size;
        let mut out = ctx.zeros(DType::F32, tokens.len() * vocab);
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let first = i * chunk;
            let end = first + part.len();
            let step = pack(ctx, &[Span { tokens: part, first, blocks: &blocks[..blocks_for(end)] }]);
            let hidden = decode::forward(ctx, &self.model, &self.params, &step, &mut self.cache.layers);
            let z = heads::logits(ctx, &self.model, &self.params, &hidden);
            let to = out.view_mut().slice(first * vocab..end * vocab);
            rows::copy_strided(ctx, (z.view(), vocab), (to, vocab), part.len(), vocab);
        }
        self.pool.free(blocks);
        Ok(out)
    }

    /// Moves blocks as the plan says: from those put back to those that go on.
    fn hold(&mut self, plan: &Plan) {
        for s in &mut self.sequences[plan.running..] {
            self.pool.free(s.blocks.drain(..));
            s.cached = 0;
        }
        self.running = plan.running;
        for w in &plan.work {
            let blocks = self.pool.allocate(w.blocks).expect("the plan hands out blocks that are free");
            self.sequences[w.sequence].blocks.extend(blocks);
        }
    }

    /// Hidden states of all new tokens, which are in the cache afterwards.
    fn forward(&mut self, ctx: &Ctx, plan: &Plan) -> Arc<Buf> {
        let span = |w: &scheduler::Work| {
            let s = &self.sequences[w.sequence];
            Span { tokens: &s.tokens[s.cached..s.cached + w.tokens], first: s.cached, blocks: &s.blocks }
        };
        let spans: Vec<Span<'_>> = plan.work.iter().map(span).collect();
        let step = pack(ctx, &spans);
        let hidden = decode::forward(ctx, &self.model, &self.params, &step, &mut self.cache.layers);
        for w in &plan.work {
            self.sequences[w.sequence].cached += w.tokens;
        }
        hidden
    }

    /// Sequences whose every token is cached, and the row of each one's last token.
    fn caught_up(&self, plan: &Plan) -> (Vec<usize>, Vec<i32>) {
        let mut end = 0;
        let rows = plan.work.iter().map(|w| {
            end += w.tokens;
            (w.sequence, end as i32 - 1)
        });
        rows.filter(|&(i, _)| self.sequences[i].cached == self.sequences[i].tokens.len()).unzip()
    }

    /// f32 `[n, V]` of the n rows `last` of the hidden states.
    fn last_logits(&self, ctx: &Ctx, hidden: &Buf, last: &[i32]) -> Buf {
        let dim = self.model.config.hidden_size;
        let mut picked = ctx.zeros(hidden.dtype(), last.len() * dim);
        rows::gather(ctx, hidden.view(), dim, ctx.from_i32(last).view(), picked.view_mut());
        heads::logits(ctx, &self.model, &self.params, &picked)
    }

    /// Of each of the n rows of the logits 0 if a number in it is not finite.
    fn finite(&self, ctx: &Ctx, logits: &Buf, n: usize) -> Buf {
        let mut finite = ctx.empty(DType::I32, n);
        sample::finite(ctx, logits.view(), finite.view_mut());
        finite
    }

    /// The next token of each row of the logits, drawn as `how` says, and its log-probability.
    fn draw(&self, ctx: &Ctx, logits: &Buf, how: &[sample::Params]) -> (Buf, Buf) {
        let n = how.len();
        let (mut tokens, mut logp) = (ctx.zeros(DType::I32, n), ctx.zeros(DType::F32, n));
        sample::sample(ctx, logits.view(), how, tokens.view_mut(), logp.view_mut());
        (tokens, logp)
    }

    /// Takes the memory, on a device that only counts, of the step that computes the last `new` of a sequence's `tokens`
    /// tokens and draws the next.
    pub(crate) fn rehearse_step(&mut self, ctx: &Ctx, tokens: usize, new: usize) {
        let hidden = self.rehearse_forward(ctx, tokens, new);
        let logits = self.last_logits(ctx, &hidden, &[new as i32 - 1]);
        let finite = self.finite(ctx, &logits, 1);
        drop(ctx.download(finite.view()));
        // With a limit on the choice, whatever the request: drawing may take memory for that.
        let how =
            sample::Params { temperature: 1.0, top_k: 1, top_p: 0.5, seed: 0, request: 0, position: tokens as u64 };
        drop(self.draw(ctx, &logits, &[how]));
    }

    /// As [`Engine::rehearse_step`], of the last pass of [`Engine::logits`].
    pub(crate) fn rehearse_logits(&mut self, ctx: &Ctx, tokens: usize, chunk: usize) {
        let vocab = self.model.config.vocab_size;
        let out = ctx.zeros(DType::F32, tokens * vocab);
        let hidden = self.rehearse_forward(ctx, tokens, tokens.min(chunk));
        drop((heads::logits(ctx, &self.model, &self.params, &hidden), out));
    }

    /// Hidden states of the last `new` of `tokens` tokens, the others being in the cache.
    fn rehearse_forward(&mut self, ctx: &Ctx, tokens: usize, new: usize) -> Arc<Buf> {
        let blocks = self.pool.allocate(blocks_for(tokens)).expect("an engine that was made for as many");
        let step = pack(ctx, &[Span { tokens: &vec![0; new], first: tokens - new, blocks: &blocks }]);
        self.pool.free(blocks);
        decode::forward(ctx, &self.model, &self.params, &step, &mut self.cache.layers)
    }

    /// Takes out sequence `drawn[bad]`; the rest of `drawn` computes its last token again in the next step, to the same
    /// bits.
    fn give_up(&mut self, drawn: &[usize], bad: usize) -> EngineError {
        for &i in drawn {
            self.sequences[i].cached -= 1;
        }
        let s = &self.sequences[drawn[bad]];
        let why = EngineError::NotFinite { id: s.request.id, position: s.tokens.len() };
        self.remove(drawn[bad]);
        why
    }

    /// Takes a sequence out and frees what it holds.
    fn remove(&mut self, i: usize) {
        let s = self.sequences.remove(i);
        self.running -= usize::from(i < self.running);
        self.pool.free(s.blocks);
    }
}
