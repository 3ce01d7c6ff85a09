//! Activations of a training step on one rank that holds the whole model: what forward keeps, and the most that is held
//! at any time until the step's last backward. The walk takes and gives back what the stages do, in their order;
//! `contracts/memory.rs` and the trainer's tests hold it against an allocator that counts.

use crate::{ModelConfig, MtpHidden, Precision, Recompute};

/// Passes over micro-batches of `sequences` of `tokens` each, whose weight gradients run at once.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// Numbers the model computes in.
    pub precision: Precision,
    /// What backward computes again.
    pub recompute: Recompute,
    /// Sequences in flight.
    pub sequences: usize,
    /// Tokens of each.
    pub tokens: usize,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// What forward keeps until backward: what the stages' `bytes` add up to, MTP layers and heads included.
    pub saved: usize,
    /// What is held beyond that at the fullest moment.
    pub working: usize,
}

impl Activations {
    /// Counts those of a valid configuration.
    pub fn of(c: &ModelConfig, passes: Passes) -> Self {
        let mut walk = Walk { c, p: passes, held: 0, peak: 0 };
        walk.forward();
        let saved = walk.held;
        walk.backward();
        debug_assert_eq!(walk.held, 0, "all that was kept is given back");
        Self { saved, working: walk.peak - saved }
    }

    /// The fullest moment.
    pub fn total(&self) -> usize {
        self.saved + self.working
    }
}

/// Bytes of a number that is f32 whatever the model computes in, and of an integer.
const WIDE: usize = 4;
/// Tokens whose share of a norm's gradient one task sums (`ops/rmsnorm`).
const NORM_BLOCK: usize = 64;
/// Ids whose logits exist at once, and bytes that the head keeps a row while it walks over them (`ops/head_loss`).
const SLICE: usize = 512;
const HEAD_ROW: usize = 32;
/// lse, logp, entropy, d_logp: for each position of each head.
const HEAD_VECTORS: usize = 4;

struct Walk<'a> {
    c: &'a ModelConfig,
    p: Passes,
    held: usize,
    peak: usize,
}

/// Bytes of one block's buffers, named as in the stages.
#[derive(Clone, Copy)]
struct Block {
    /// `[n, D]`.
    h: usize,
    /// f32 `[n]`.
    stat: usize,
    q: usize,
    q_latent: usize,
    kv_a: usize,
    c_kv: usize,
    kv_up: usize,
    out: usize,
    lse: usize,
    /// f32 `[H, n, R]`: heads' shares of dk_pe.
    planes: usize,
    /// SwiGLU's input of the dense or shared network; its output is half of it.
    every: usize,
    moe: Option<Moe>,
}

#[derive(Clone, Copy)]
struct Moe {
    /// f32 `[n, E]`.
    scores: usize,
    /// Four bytes a slot.
    slots: usize,
    offsets: usize,
    /// f32 `[S]`.
    balance: usize,
    /// `[n K, D]`.
    rows: usize,
    gate_up: usize,
}

impl Walk<'_> {
    fn take(&mut self, bytes: usize) {
        self.held += bytes;
        self.peak = self.peak.max(self.held);
    }

    fn give(&mut self, bytes: usize) {
        self.held -= bytes;
    }

    /// What is there for the time of one operation.
    fn briefly(&mut self, bytes: usize) {
        self.take(bytes);
        self.give(bytes);
    }

    fn act(&self) -> usize {
        self.p.precision.act().size()
    }

    fn depth(&self, k: usize) -> usize {
        self.p.sequences * self.p.tokens.saturating_sub(k)
    }

    fn stages_keep(&self) -> bool {
        self.p.recompute.stages_keep()
    }

    fn block(&self, layer: usize, n: usize) -> Block {
        let (c, act) = (self.c, self.act());
        let (heads, moe) = (c.num_attention_heads, c.is_moe(layer));
        let width = if moe { c.shared_width() } else { c.intermediate_size };
        let slots = n * c.num_experts_per_tok;
        Block {
            h: n * c.hidden_size * act,
            stat: n * WIDE,
            q: n * heads * c.qk_head_dim() * act,
            q_latent: n * c.q_lora_rank.unwrap_or(0) * act,
            kv_a: n * c.cache_width() * act,
            c_kv: n * c.kv_lora_rank * act,
            kv_up: n * heads * (c.qk_nope_head_dim + c.v_head_dim) * act,
            out: n * heads * c.v_head_dim * act,
            lse: n * heads * WIDE,
            planes: n * heads * c.qk_rope_head_dim * WIDE,
            every: 2 * n * width * act,
            moe: moe.then(|| Moe {
                scores: n * c.n_routed_experts * WIDE,
                slots: slots * WIDE,
                offsets: (c.n_routed_experts + 1) * WIDE,
                balance: self.p.sequences * WIDE,
                rows: slots * c.hidden_size * act,
                gate_up: 2 * slots * c.moe_intermediate_size * act,
            }),
        }
    }

    /// The weight's gradient of a norm over `width` bytes of n tokens' rows.
    fn norm_weight(&mut self, bytes: usize) {
        self.briefly(bytes.div_ceil(NORM_BLOCK * self.act()) * WIDE);
    }

    fn forward(&mut self) {
        let c = self.c;
        let n = self.depth(0);
        self.take(n * c.hidden_size * self.act());
        for layer in 0..c.num_hidden_layers {
            let b = self.block(layer, n);
            self.block_forward(b);
        }
        self.head_forward(n);
        for k in 1..=c.num_nextn_predict_layers {
            let (n, layer) = (self.depth(k), c.num_hidden_layers + k - 1);
            let b = self.block(layer, n);
            // Gathered and embedded rows, then both normed, then their projection.
            self.take(4 * b.h + 2 * b.stat);
            let sum = if self.p.precision == Precision::Bf16 { n * c.hidden_size * WIDE } else { 0 };
            self.take(sum + b.h);
            self.give(sum);
            if !self.p.recompute.keeps_norms() {
                self.give(2 * b.h);
            }
            self.block_forward(b);
            self.head_forward(n);
            // The next depth goes on from these normed states, or all go on from the main model's own.
            let post = c.mtp_hidden == MtpHidden::PostNorm;
            self.give_normed(if post { k - 1 } else { k });
        }
        let post = c.mtp_hidden == MtpHidden::PostNorm;
        self.give_normed(if post { c.num_nextn_predict_layers } else { 0 });
    }

    /// Normed states of a depth that nobody reads any more, unless its head keeps them.
    fn give_normed(&mut self, k: usize) {
        if !self.p.recompute.keeps_norms() {
            self.give(self.depth(k) * self.c.hidden_size * self.act());
        }
    }

    /// A final norm and its head; the norm's input is held already.
    fn head_forward(&mut self, n: usize) {
        let h = n * self.c.hidden_size * self.act();
        self.take(h + n * WIDE);
        self.take((HEAD_VECTORS - 1) * n * WIDE);
        self.briefly(n * SLICE.min(self.c.vocab_size) * WIDE + n * HEAD_ROW);
        self.take(n * WIDE);
    }

    fn block_forward(&mut self, b: Block) {
        let before = self.held;
        self.attention_forward(b);
        if self.p.recompute != Recompute::All {
            return self.feed_forward(b, true);
        }
        // Only h1 of it all is read on, then only the block's output; the experts that were chosen are kept.
        self.give(self.held - before - b.h);
        self.feed_forward(b, true);
        let kept = b.moe.map_or(0, |m| m.slots + m.balance);
        self.give(self.held - before - b.h - kept);
    }

    /// h is held before; h1 is afterwards, and what attention keeps.
    fn attention_forward(&mut self, b: Block) {
        let norms = 2 * b.stat + if b.q_latent > 0 { b.stat } else { 0 };
        self.take(norms + b.h + 2 * b.q_latent + b.q + b.kv_a + b.c_kv + b.kv_up + b.out + b.lse);
        self.take(b.h);
        if self.stages_keep() {
            return;
        }
        self.give(b.h + b.q_latent + b.c_kv + b.kv_up);
        if b.q_latent > 0 {
            self.give(b.q);
        }
    }

    /// h1 is held before; the block's output is afterwards (unless only what backward reads is wanted), and what the
    /// stages keep.
    fn feed_forward(&mut self, b: Block, outputs: bool) {
        self.take(b.h + b.stat);
        if let Some(m) = b.moe {
            // Logits are gone after the dispatch.
            self.take(3 * m.scores + 4 * m.slots + 3 * m.offsets + m.balance + m.rows);
            self.give(m.scores);
        }
        self.take(b.every);
        if let Some(m) = b.moe {
            self.take(m.gate_up);
        }
        if !self.stages_keep() {
            self.give(b.h + b.moe.map_or(0, |m| m.rows));
        }
        if !outputs {
            return;
        }
        self.outputs_forward(b);
    }

    fn outputs_forward(&mut self, b: Block) {
        let shared = if b.every > 0 { b.h } else { 0 };
        self.take(b.every / 2 + shared);
        self.give(b.every / 2);
        if let Some(m) = b.moe {
            self.take(m.gate_up / 2 + m.rows);
            self.give(m.gate_up / 2);
            self.take(b.h);
            self.give(m.rows + shared);
        }
    }

    fn backward(&mut self) {
        let c = self.c;
        let depth = c.num_nextn_predict_layers;
        let mut feed = 0;
        for k in (1..=depth).rev() {
            let (n, layer) = (self.depth(k), c.num_hidden_layers + k - 1);
            let b = self.block(layer, n);
            self.head_backward(n, feed);
            self.block_backward(b);
            let previous = self.depth(k - 1) * c.hidden_size * self.act();
            self.mtp_backward(b, previous);
            feed = previous;
        }
        let n = self.depth(0);
        self.head_backward(n, feed);
        for layer in (0..c.num_hidden_layers).rev() {
            let b = self.block(layer, n);
            self.block_backward(b);
        }
        self.give(n * c.hidden_size * self.act());
    }

    /// A head and the norm before it; the gradient of the norm's input is held afterwards, that of what an MTP layer
    /// read (`feed`) is not.
    fn head_backward(&mut self, n: usize, feed: usize) {
        let h = n * self.c.hidden_size * self.act();
        if !self.p.recompute.keeps_norms() {
            self.take(h + n * WIDE);
            self.give(n * WIDE);
        }
        self.take(h);
        let sums = if self.p.precision == Precision::Bf16 { n * self.c.hidden_size * WIDE } else { 0 };
        // Gradients of logits are rounded for their products where the other operands are.
        let narrow = if sums > 0 { self.act() } else { 0 };
        self.briefly(sums + n * SLICE.min(self.c.vocab_size) * (WIDE + narrow) + n * HEAD_ROW);
        self.give(h + HEAD_VECTORS * n * WIDE);
        self.take(h);
        self.norm_weight(h);
        // The gradient of the head's states, the norm's input and statistics.
        self.give(h + feed + h + n * WIDE);
    }

    /// From the gradient of the projection to that of the depth before, `previous` bytes.
    fn mtp_backward(&mut self, b: Block, previous: usize) {
        self.take(previous);
        for _ in 0..2 {
            if !self.p.recompute.keeps_norms() {
                self.take(b.h);
            }
            self.take(2 * b.h);
            self.give(b.h);
            self.norm_weight(b.h);
            // The gradients, and the norm with its input.
            self.give(2 * b.h + b.h + b.stat);
        }
        self.give(b.h);
    }

    /// dy is held before, dh in its place afterwards.
    fn block_backward(&mut self, b: Block) {
        if self.p.recompute == Recompute::All {
            self.attention_forward(b);
            self.feed_forward(b, false);
            self.give(b.moe.map_or(0, |m| m.slots + m.balance));
        }
        self.feed_forward_backward(b);
        self.attention_backward(b);
    }

    fn feed_forward_backward(&mut self, b: Block) {
        if let Some(m) = b.moe {
            self.take(m.rows + m.slots);
        }
        if b.every > 0 {
            self.normed_again(b);
            self.take(b.every / 2);
            self.give(b.every / 2);
            self.take(b.h);
            self.give(b.every);
        }
        if let Some(m) = b.moe {
            self.take(m.gate_up / 2 + m.slots);
            self.give(m.gate_up / 2 + m.rows + m.slots);
            // The inputs again, or those that were kept; then their gradient.
            if b.every == 0 {
                self.normed_again(b);
            }
            if !self.stages_keep() {
                self.take(m.rows);
            }
            self.give(m.rows);
            self.take(m.rows);
            self.give(m.gate_up);
            self.take(if b.every > 0 { 0 } else { b.h });
            self.give(m.rows);
            self.take(m.slots + m.scores);
            self.give(2 * m.slots + m.scores);
            self.give(2 * m.scores + 4 * m.slots + 3 * m.offsets + m.balance);
        }
        // x; then dx goes into dy, and h1 is read no more.
        self.give(b.h);
        self.norm_weight(b.h);
        self.give(2 * b.h + b.stat);
    }

    /// A normed input, where it is not kept.
    fn normed_again(&mut self, b: Block) {
        if !self.stages_keep() {
            self.take(b.h + b.stat);
            self.give(b.stat);
        }
    }

    fn attention_backward(&mut self, b: Block) {
        let lora = b.q_latent > 0;
        self.take(b.out);
        if !self.stages_keep() {
            self.take(b.c_kv + b.q_latent + b.kv_up + if lora { b.q } else { 0 });
        }
        self.take(b.q + b.kv_up + b.kv_a);
        self.briefly(b.planes);
        self.give(b.q + b.kv_up + 2 * b.out + b.lse);
        self.take(b.c_kv);
        self.give(b.c_kv + b.kv_up);
        self.give(b.c_kv + b.kv_a + b.stat);
        self.normed_again(b);
        self.take(b.h);
        self.give(b.kv_a);
        if lora {
            self.take(2 * b.q_latent);
            self.give(4 * b.q_latent + b.stat);
        }
        self.give(b.q + b.h);
        self.norm_weight(b.h);
        self.give(2 * b.h + b.stat);
    }
}
