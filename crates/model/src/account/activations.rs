//! Activations of a training step on one rank that holds the whole model, on the host's cores: what forward keeps, and
//! the most that is held at any time until the step's last backward. The walk takes and gives back what the stages do, in
//! their order; `contracts/memory.rs` and the trainer's tests hold it against an allocator that counts. What products pack
//! for their time is counted too, at every level of vector instructions, as if every expert had as many rows as the others: what
//! experts really pack is more or less where that number is near one at which products are cut otherwise.

use crate::stages::attention;
use crate::{ModelConfig, MtpHidden, Precision, Recompute};
use hadal_kernels::Workers;
use hadal_kernels::ops::gemm::{self, Direction};
use hadal_kernels::ops::head_loss;
use hadal_kernels::ops::mla_prefill;
use std::collections::HashMap;

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
    /// The cores that compute them.
    pub workers: Workers,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activations {
    /// What forward keeps until backward: what the stages' `bytes` add up to, MTP layers and heads included.
    pub saved: usize,
    /// What is held beyond that at the fullest moment.
    pub working: usize,
    /// What the workers hold beside that, each for itself: attention's keys and values.
    pub workers: usize,
}

impl Activations {
    /// Counts those of a valid configuration.
    pub fn of(c: &ModelConfig, passes: Passes) -> Self {
        let mut walk = Walk { c, p: passes, held: 0, peak: 0, packed: HashMap::new() };
        walk.forward();
        let saved = walk.held;
        walk.backward();
        debug_assert_eq!(walk.held, 0, "all that was kept is given back");
        Self { saved, working: walk.peak - saved, workers: workers(c, &passes) }
    }

    /// The fullest moment, what workers hold for themselves left out.
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
/// lse, logp, entropy, d_logp: for each position of a head; log-probabilities are kept.
const HEAD_VECTORS: usize = 4;

fn workers(c: &ModelConfig, p: &Passes) -> usize {
    mla_prefill::scratch(p.workers, p.precision.act(), &attention::shape(c), p.sequences, p.tokens)
}

struct Walk<'a> {
    c: &'a ModelConfig,
    p: Passes,
    held: usize,
    peak: usize,
    /// What a product packs, by its sizes and whose rows they are: layers repeat.
    packed: HashMap<(Direction, Rows, [usize; 3]), usize>,
}

/// Whose rows a product has.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Rows {
    /// All tokens'.
    All,
    /// The experts', sorted.
    Experts,
    /// The experts', read where the tokens' lie.
    Gathered,
}

/// Bytes of one block's buffers, named as in the stages.
#[derive(Clone, Copy)]
struct Block {
    /// Tokens.
    n: usize,
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
    /// SwiGLU's input of the dense or shared network; its output is half of it. And the network's width.
    every: usize,
    width: usize,
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
    /// `[n K, D]`: the experts' outputs, and the gradient of their inputs; inputs are read where the tokens' rows lie.
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

    /// What a product of n rows with a weight `[out, cols]` packs.
    fn product(&mut self, direction: Direction, n: usize, out: usize, cols: usize) {
        self.packs(direction, Rows::All, [n, out, cols], |_| vec![n]);
    }

    fn packs(
        &mut self,
        direction: Direction,
        which: Rows,
        [n, out, cols]: [usize; 3],
        rows: impl Fn(&ModelConfig) -> Vec<usize>,
    ) {
        let (c, p) = (self.c, self.p);
        let packed = self.packed.entry((direction, which, [n, out, cols]));
        let gathered = which == Rows::Gathered;
        let scratch = || gemm::scratch(p.workers, p.precision.act(), direction, &rows(c), (out, cols), gathered);
        let bytes = *packed.or_insert_with(scratch);
        self.briefly(bytes);
    }

    /// The gradients of a linear layer's input and of its weight, one after the other.
    fn gradients(&mut self, n: usize, out: usize, cols: usize) {
        self.product(Direction::Input, n, out, cols);
        self.product(Direction::Weight, n, out, cols);
    }

    /// As [`Walk::product`], of the experts' rows, which lie even.
    fn experts(&mut self, direction: Direction, which: Rows, [n, out, cols]: [usize; 3]) {
        self.packs(direction, which, [n, out, cols], |c| {
            let (slots, e) = (n * c.num_experts_per_tok, c.n_routed_experts);
            (0..e).map(|i| (i + 1) * slots / e - i * slots / e).collect()
        });
    }

    /// (outputs, inputs) of attention's layers: q_proj or q_b, kv_a, kv_b, o_proj.
    fn attention(&self) -> [(usize, usize); 4] {
        let (c, heads) = (self.c, self.c.num_attention_heads);
        [
            (heads * c.qk_head_dim(), c.q_lora_rank.unwrap_or(c.hidden_size)),
            (c.cache_width(), c.hidden_size),
            (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            (c.hidden_size, heads * c.v_head_dim),
        ]
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
            n,
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
            width,
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
        self.head(n);
        for k in 1..=c.num_nextn_predict_layers {
            let (n, layer) = (self.depth(k), c.num_hidden_layers + k - 1);
            let b = self.block(layer, n);
            // Gathered and embedded rows, then both normed, then their projection.
            self.take(4 * b.h + 2 * b.stat);
            let sum = if self.p.precision == Precision::Bf16 { n * c.hidden_size * WIDE } else { 0 };
            self.take(sum);
            self.product(Direction::Forward, n, c.hidden_size, c.hidden_size);
            self.take(b.h);
            self.give(sum);
            if !self.p.recompute.keeps_norms() {
                self.give(2 * b.h);
            }
            self.block_forward(b);
            self.head(n);
            // The next depth goes on from these normed states, or all go on from the main model's own.
            let post = c.mtp_hidden == MtpHidden::PostNorm;
            self.give_normed(if post { k - 1 } else { k });
        }
        let post = c.mtp_hidden == MtpHidden::PostNorm;
        self.give_normed(if post { c.num_nextn_predict_layers } else { 0 });
    }

    /// Normed states of a depth that nobody reads any more.
    fn give_normed(&mut self, k: usize) {
        self.give(self.depth(k) * self.c.hidden_size * self.act());
    }

    /// A final norm and its head, both directions; the norm's input is held already. Of the head log-probabilities and the
    /// gradient of the normed states are kept.
    fn head(&mut self, n: usize) {
        let (v, d) = (self.c.vocab_size, self.c.hidden_size);
        let h = n * d * self.act();
        self.take(h + n * WIDE);
        self.take(HEAD_VECTORS * n * WIDE + h);
        let (tokens, slice) = (head_loss::tokens_at_once(n, v), SLICE.min(v));
        // Gradients of logits are rounded for their products where the other operands are, and so is that of the states.
        let rounded = if self.p.precision == Precision::Bf16 { slice * self.act() + d * WIDE } else { 0 };
        let logits = tokens * (v.next_multiple_of(slice) * WIDE + rounded + HEAD_ROW);
        self.take(logits);
        self.product(Direction::Forward, tokens, slice, d);
        self.gradients(tokens, slice, d);
        self.give(logits);
        self.give((HEAD_VECTORS - 1) * n * WIDE);
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
        let [q, kv_a, kv_b, o] = self.attention();
        let forward = |walk: &mut Self, (out, cols)| walk.product(Direction::Forward, b.n, out, cols);
        self.take(b.h + b.stat);
        if b.q_latent > 0 {
            self.take(b.q_latent);
            forward(self, (q.1, self.c.hidden_size));
            self.take(b.q_latent + b.stat);
        }
        self.take(b.q);
        forward(self, q);
        self.take(b.kv_a);
        forward(self, kv_a);
        self.take(b.c_kv + b.stat + b.kv_up);
        forward(self, kv_b);
        self.take(b.out + b.lse + b.h);
        forward(self, o);
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
            self.take(3 * m.scores + 4 * m.slots + 3 * m.offsets + m.balance);
            self.give(m.scores);
        }
        let (d, c) = (self.c.hidden_size, self.c);
        self.take(b.every);
        self.product(Direction::Forward, b.n, 2 * b.width, d);
        if let Some(m) = b.moe {
            self.take(m.gate_up);
            self.experts(Direction::Forward, Rows::Gathered, [b.n, 2 * c.moe_intermediate_size, d]);
        }
        if !self.stages_keep() {
            self.give(b.h);
        }
        if !outputs {
            return;
        }
        self.outputs_forward(b);
    }

    fn outputs_forward(&mut self, b: Block) {
        let (d, c) = (self.c.hidden_size, self.c);
        let shared = if b.every > 0 { b.h } else { 0 };
        self.take(b.every / 2 + shared);
        self.product(Direction::Forward, b.n, d, b.width);
        self.give(b.every / 2);
        if let Some(m) = b.moe {
            self.take(m.gate_up / 2 + m.rows);
            self.experts(Direction::Forward, Rows::Experts, [b.n, d, c.moe_intermediate_size]);
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
            self.head_norm_backward(n, feed);
            self.block_backward(b);
            let previous = self.depth(k - 1) * c.hidden_size * self.act();
            self.mtp_backward(b, previous);
            feed = previous;
        }
        let n = self.depth(0);
        self.head_norm_backward(n, feed);
        for layer in (0..c.num_hidden_layers).rev() {
            let b = self.block(layer, n);
            self.block_backward(b);
        }
        self.give(n * c.hidden_size * self.act());
        // Log-probabilities, of which the step's loss is the sum.
        (0..=depth).for_each(|k| self.give(self.depth(k) * WIDE));
    }

    /// The norm before a head, which has left its gradient; that of the norm's input is held afterwards, that of what an MTP
    /// layer read (`feed`) is not.
    fn head_norm_backward(&mut self, n: usize, feed: usize) {
        let h = n * self.c.hidden_size * self.act();
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
            self.take(b.h);
            self.gradients(b.n, self.c.hidden_size, self.c.hidden_size);
            self.take(b.h);
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
        let (d, width) = (self.c.hidden_size, self.c.moe_intermediate_size);
        if let Some(m) = b.moe {
            self.take(m.slots);
        }
        if b.every > 0 {
            self.normed_again(b);
            self.take(b.every / 2);
            self.gradients(b.n, d, b.width);
            self.give(b.every / 2);
            self.take(b.h);
            self.gradients(b.n, 2 * b.width, d);
            self.give(b.every);
        }
        if let Some(m) = b.moe {
            self.take(m.gate_up / 2);
            self.experts(Direction::Input, Rows::Gathered, [b.n, d, width]);
            self.take(m.slots);
            self.experts(Direction::Weight, Rows::Gathered, [b.n, d, width]);
            self.give(m.gate_up / 2 + m.slots);
            // The tokens' rows again, or those that were kept; then the gradient of the experts' inputs.
            if b.every == 0 {
                self.normed_again(b);
            }
            self.experts(Direction::Weight, Rows::Experts, [b.n, 2 * width, d]);
            self.take(m.rows);
            self.experts(Direction::Input, Rows::Experts, [b.n, 2 * width, d]);
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
        let [(q, q_in), (kv_a, d), (kv_b, rank), (_, heads)] = self.attention();
        self.take(b.out);
        self.gradients(b.n, d, heads);
        if !self.stages_keep() {
            self.take(b.c_kv + b.q_latent + b.kv_up);
            self.product(Direction::Forward, b.n, kv_b, rank);
            if lora {
                self.take(b.q);
                self.product(Direction::Forward, b.n, q, q_in);
            }
        }
        self.take(b.q + b.kv_up + b.kv_a);
        self.briefly(b.planes);
        self.give(b.q + b.kv_up + 2 * b.out + b.lse);
        self.take(b.c_kv);
        self.gradients(b.n, kv_b, rank);
        self.give(b.c_kv + b.kv_up);
        self.give(b.c_kv + b.kv_a + b.stat);
        self.normed_again(b);
        self.take(b.h);
        self.gradients(b.n, kv_a, d);
        self.give(b.kv_a);
        if !lora {
            self.gradients(b.n, q, d);
        } else {
            self.take(b.q_latent);
            self.gradients(b.n, q, q_in);
            self.take(b.q_latent);
            self.gradients(b.n, q_in, d);
            self.give(4 * b.q_latent + b.stat);
        }
        self.give(b.q + b.h);
        self.norm_weight(b.h);
        self.give(2 * b.h + b.stat);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hadal_kernels::Level;

    /// What products pack counts where it adds to the fullest moment, and the workers' keys and values always.
    #[test]
    fn packing_is_counted() {
        let c = ModelConfig::preset("v2-lite").unwrap();
        for (level, recompute) in Level::ALL.into_iter().flat_map(|level| Recompute::EACH.map(|r| (level, r))) {
            let passes = |level, precision| {
                let workers = Workers { level, threads: 2 };
                Passes { precision, recompute, sequences: 16, tokens: 2048, workers }
            };
            let of = |level, precision| Activations::of(&c, passes(level, precision));
            for precision in [Precision::Bf16, Precision::Fp32] {
                let walk = |packed| {
                    let mut walk = Walk { c: &c, p: passes(level, precision), held: 0, peak: 0, packed };
                    walk.forward();
                    walk.backward();
                    walk
                };
                let all = walk(HashMap::new());
                assert_eq!(all.peak, of(level, precision).total());
                let none = walk(all.packed.keys().map(|&product| (product, 0)).collect());
                // No more than both operands of the largest product of this step, the rows of all experts; on vectors 16 MiB,
                // or 512 columns of a weight gradient, whose groups of lanes are a little longer than they.
                let tiles = (level, precision) == (Level::Amx, Precision::Bf16);
                let most = if tiles { 32768 * 6 * (2048 + 2 * 1408) * 2 } else { 32768 * 512 * 4 * 102 / 100 };
                let (more, largest) = (all.peak - none.peak, all.packed.values().max());
                assert!(more > 0 && more <= most, "{level:?}, {precision:?}, {recompute}: {more}");
                assert!(largest.is_some_and(|&largest| more <= largest && largest <= most), "{largest:?}");
            }
            let bf16 = of(level, Precision::Bf16);
            assert_eq!(bf16.saved, of(Level::Portable, Precision::Bf16).saved);
            if level == Level::Amx {
                // 64 groups of 32 tokens, of each 8 x 6 + 6 x 4 tiles.
                assert_eq!(bf16.workers, 2 * 64 * 72 * 1024);
            }
        }
        let at = |level, precision| {
            let workers = Workers { level, threads: 2 };
            let recompute = Recompute::EACH[0];
            Activations::of(&c, Passes { precision, recompute, sequences: 16, tokens: 2048, workers })
        };
        assert_eq!(at(Level::Amx, Precision::Fp32), at(Level::Avx512, Precision::Fp32));
        assert_eq!(at(Level::Avx2, Precision::Bf16), at(Level::Portable, Precision::Bf16));
    }
}
