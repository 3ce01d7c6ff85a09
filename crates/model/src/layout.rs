//! The table of offsets of a flat arena: which tensor lies where, how it is treated, and what files call it. Masters,
//! gradients, moments and compute weights share one table, so that one AdamW call, one norm pass and checkpoint I/O go
//! by range. Every tensor begins at a multiple of 256 bytes (counted in bf16, so that both dtypes are aligned).

use crate::ModelConfig;
use hadal_comm::{ExpertRange, GlobalExpert};
use hadal_kernels::ops::adamw::Segment;
use std::ops::Range;

/// Elements per alignment unit: 256 bytes of bf16.
pub(crate) const ALIGN: usize = 128;

/// Sharding group of a tensor, and how it is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Token embedding.
    Embedding,
    /// Replicated layer weights.
    Dense,
    /// Stacked routed experts: split over expert-parallel ranks.
    RoutedExpert,
    /// Output head.
    Head,
    /// Not trained by gradient: e_score_correction_bias.
    Buffer,
}

/// A tensor as files name it: a contiguous part of an arena tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Name in a Hugging Face checkpoint.
    pub name: String,
    /// Global shape.
    pub shape: Vec<usize>,
    /// First element within the arena.
    pub offset: usize,
}

impl Published {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a shape that holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements within the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Index of a tensor in its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// One arena tensor: `experts` stacked matrices `[rows, cols]`, or a vector (rows = 1).
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// First element; a multiple of 128.
    pub offset: usize,
    /// Matrices stacked.
    pub experts: usize,
    /// Output features; 1 for a vector.
    pub rows: usize,
    /// Input features, or the vector's length.
    pub cols: usize,
    /// Sharding group.
    pub kind: Kind,
    /// Matrix products read it in the activation dtype; otherwise f32 (norms, gate, bias).
    pub compute: bool,
    /// Weight decay applies (matrices, not norms).
    pub decay: bool,
    /// Its parts under their published names, in arena order, covering all elements.
    pub published: Vec<Published>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.experts * self.rows * self.cols
    }

    /// True if it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements within the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Which part of a model this process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Main layers.
    pub layers: Range<usize>,
    /// Token embedding (also needed by MTP).
    pub embedding: bool,
    /// Final norm and output head.
    pub head: bool,
    /// MTP layers held: 0..depth.
    pub mtp: usize,
    /// The routed experts held.
    pub experts: ExpertRange,
}

impl Scope {
    /// All of a model.
    pub fn whole(c: &ModelConfig) -> Self {
        Self {
            layers: 0..c.num_hidden_layers,
            embedding: true,
            head: true,
            mtp: c.num_nextn_predict_layers,
            experts: ExpertRange::all(c.n_routed_experts),
        }
    }
}

/// MLA's weights.
#[derive(Clone, Debug)]
pub struct AttentionIds {
    /// `[H (P + R), D]`; only without q_lora.
    pub q_proj: Option<ParamId>,
    /// (q_a_proj `[Q, D]`, q_a_layernorm `[Q]`, q_b_proj `[H (P + R), Q]`).
    pub q_lora: Option<(ParamId, ParamId, ParamId)>,
    /// `[C + R, D]`.
    pub kv_a: ParamId,
    /// `[C]`.
    pub kv_a_norm: ParamId,
    /// `[H (P + W), C]`.
    pub kv_b: ParamId,
    /// `[D, H W]`.
    pub o_proj: ParamId,
}

/// A SwiGLU's weights: gate and up stacked `[2F, D]`, down `[D, F]`.
#[derive(Clone, Copy, Debug)]
pub struct MlpIds {
    /// `[2F, D]`, gate rows first.
    pub gate_up: ParamId,
    /// `[D, F]`.
    pub down: ParamId,
}

/// Experts, gate and shared experts.
#[derive(Clone, Copy, Debug)]
pub struct MoeIds {
    /// `[E, D]`, f32.
    pub gate: ParamId,
    /// `[E]`, f32, selection only.
    pub bias: Option<ParamId>,
    /// `[E_local, 2F, D]` and `[E_local, D, F]`.
    pub experts: MlpIds,
    /// One SwiGLU.
    pub shared: Option<MlpIds>,
}

/// What follows attention.
#[derive(Clone, Copy, Debug)]
pub enum FeedForwardIds {
    /// A dense layer.
    Dense(MlpIds),
    /// Mixture of experts.
    Moe(MoeIds),
}

/// One block.
#[derive(Clone, Debug)]
pub struct BlockIds {
    /// Global layer index, MTP layers counted on.
    pub layer: usize,
    /// `[D]`.
    pub input_norm: ParamId,
    /// MLA.
    pub attention: AttentionIds,
    /// `[D]`.
    pub post_attention_norm: ParamId,
    /// Dense or MoE.
    pub feed_forward: FeedForwardIds,
}

/// One MTP layer.
#[derive(Clone, Debug)]
pub struct MtpIds {
    /// RMSNorm of the embedding `[D]`.
    pub enorm: ParamId,
    /// RMSNorm of the hidden state `[D]`.
    pub hnorm: ParamId,
    /// `[D, 2D]`: embedding first.
    pub eh_proj: ParamId,
    /// Its transformer block.
    pub block: BlockIds,
    /// shared_head.norm `[D]`.
    pub norm: ParamId,
}

/// The table of offsets.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What the layout covers.
    pub scope: Scope,
    /// In arena order: embedding, blocks, final norm, head, MTP.
    pub tensors: Vec<TensorInfo>,
    /// `[V, D]`.
    pub embedding: Option<ParamId>,
    /// One per held layer.
    pub blocks: Vec<BlockIds>,
    /// Final norm `[D]`.
    pub norm: Option<ParamId>,
    /// `[V, D]`.
    pub head: Option<ParamId>,
    /// One per held MTP layer.
    pub mtp: Vec<MtpIds>,
    /// Elements of an arena.
    pub len: usize,
}

struct Builder<'c> {
    config: &'c ModelConfig,
    scope: Scope,
    tensors: Vec<TensorInfo>,
    len: usize,
}

impl Builder<'_> {
    fn tensor(&mut self, kind: Kind, compute: bool, dims: [usize; 3], names: Vec<(String, Vec<usize>)>) -> ParamId {
        let [experts, rows, cols] = dims;
        let mut at = self.len;
        let published: Vec<Published> = names
            .into_iter()
            .map(|(name, shape)| {
                let p = Published { name, shape, offset: at };
                at += p.len();
                p
            })
            .collect();
        let decay = published.iter().all(|p| p.shape.len() > 1);
        let info = TensorInfo { offset: self.len, experts, rows, cols, kind, compute, decay, published };
        debug_assert_eq!(info.range().end, at, "published parts cover the tensor");
        self.len = at.next_multiple_of(ALIGN);
        self.tensors.push(info);
        ParamId(self.tensors.len() - 1)
    }

    fn vector(&mut self, name: String, len: usize) -> ParamId {
        self.tensor(Kind::Dense, false, [1, 1, len], vec![(name, vec![len])])
    }

    fn matrix(&mut self, name: String, rows: usize, cols: usize) -> ParamId {
        self.tensor(Kind::Dense, true, [1, rows, cols], vec![(name, vec![rows, cols])])
    }

    fn mlp(&mut self, kind: Kind, prefixes: &[String], width: usize) -> MlpIds {
        let d = self.config.hidden_size;
        let up = |p: &String| ["gate_proj", "up_proj"].map(|s| (format!("{p}.{s}.weight"), vec![width, d]));
        let gate_up = prefixes.iter().flat_map(up).collect();
        let down = prefixes.iter().map(|p| (format!("{p}.down_proj.weight"), vec![d, width])).collect();
        MlpIds {
            gate_up: self.tensor(kind, true, [prefixes.len(), 2 * width, d], gate_up),
            down: self.tensor(kind, true, [prefixes.len(), d, width], down),
        }
    }

    fn attention(&mut self, p: &str) -> AttentionIds {
        let c = self.config;
        let (d, h) = (c.hidden_size, c.num_attention_heads);
        let q_dim = h * c.qk_head_dim();
        let (q_proj, q_lora) = match c.q_lora_rank {
            None => (Some(self.matrix(format!("{p}.q_proj.weight"), q_dim, d)), None),
            Some(r) => {
                let a = self.matrix(format!("{p}.q_a_proj.weight"), r, d);
                let n = self.vector(format!("{p}.q_a_layernorm.weight"), r);
                (None, Some((a, n, self.matrix(format!("{p}.q_b_proj.weight"), q_dim, r))))
            }
        };
        AttentionIds {
            q_proj,
            q_lora,
            kv_a: self.matrix(format!("{p}.kv_a_proj_with_mqa.weight"), c.cache_width(), d),
            kv_a_norm: self.vector(format!("{p}.kv_a_layernorm.weight"), c.kv_lora_rank),
            kv_b: self.matrix(format!("{p}.kv_b_proj.weight"), h * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            o_proj: self.matrix(format!("{p}.o_proj.weight"), d, h * c.v_head_dim),
        }
    }

    fn feed_forward(&mut self, layer: usize, p: &str) -> FeedForwardIds {
        let c = self.config;
        if !c.is_moe(layer) {
            return FeedForwardIds::Dense(self.mlp(Kind::Dense, &[p.to_string()], c.intermediate_size));
        }
        let (e, d) = (c.n_routed_experts, c.hidden_size);
        let gate = self.tensor(Kind::Dense, false, [1, e, d], vec![(format!("{p}.gate.weight"), vec![e, d])]);
        let bias = c.correction_bias.then(|| {
            let name = format!("{p}.gate.e_score_correction_bias");
            self.tensor(Kind::Buffer, false, [1, 1, e], vec![(name, vec![e])])
        });
        let shared =
            (c.n_shared_experts > 0).then(|| self.mlp(Kind::Dense, &[format!("{p}.shared_experts")], c.shared_width()));
        let name = |GlobalExpert(e): GlobalExpert| format!("{p}.experts.{e}");
        let names: Vec<String> = self.scope.experts.global().map(name).collect();
        let experts = self.mlp(Kind::RoutedExpert, &names, c.moe_intermediate_size);
        FeedForwardIds::Moe(MoeIds { gate, bias, experts, shared })
    }

    fn block(&mut self, layer: usize) -> BlockIds {
        let p = format!("model.layers.{layer}");
        let d = self.config.hidden_size;
        BlockIds {
            layer,
            input_norm: self.vector(format!("{p}.input_layernorm.weight"), d),
            attention: self.attention(&format!("{p}.self_attn")),
            post_attention_norm: self.vector(format!("{p}.post_attention_layernorm.weight"), d),
            feed_forward: self.feed_forward(layer, &format!("{p}.mlp")),
        }
    }

    fn mtp(&mut self, k: usize) -> MtpIds {
        let layer = self.config.num_hidden_layers + k;
        let p = format!("model.layers.{layer}");
        let d = self.config.hidden_size;
        MtpIds {
            enorm: self.vector(format!("{p}.enorm.weight"), d),
            hnorm: self.vector(format!("{p}.hnorm.weight"), d),
            eh_proj: self.matrix(format!("{p}.eh_proj.weight"), d, 2 * d),
            block: self.block(layer),
            norm: self.vector(format!("{p}.shared_head.norm.weight"), d),
        }
    }
}

impl Layout {
    /// The table for the part of a model that `scope` names.
    pub fn new(config: &ModelConfig, scope: Scope) -> Self {
        let (v, d) = (config.vocab_size, config.hidden_size);
        let mut b = Builder { config, scope: scope.clone(), tensors: Vec::new(), len: 0 };
        let table = |b: &mut Builder<'_>, kind, name: &str| {
            b.tensor(kind, true, [1, v, d], vec![(name.to_string(), vec![v, d])])
        };
        let embedding = scope.embedding.then(|| table(&mut b, Kind::Embedding, "model.embed_tokens.weight"));
        let blocks = scope.layers.clone().map(|i| b.block(i)).collect();
        let norm = scope.head.then(|| b.vector("model.norm.weight".into(), d));
        let head = scope.head.then(|| table(&mut b, Kind::Head, "lm_head.weight"));
        let mtp = (0..scope.mtp).map(|k| b.mtp(k)).collect();
        Self { scope, embedding, blocks, norm, head, mtp, len: b.len, tensors: b.tensors }
    }

    /// A tensor's entry.
    pub fn info(&self, id: ParamId) -> &TensorInfo {
        &self.tensors[id.0]
    }

    /// Every published part, in arena order.
    pub fn published(&self) -> impl Iterator<Item = (&TensorInfo, &Published)> {
        self.tensors.iter().flat_map(|t| t.published.iter().map(move |p| (t, p)))
    }

    /// Ranges that AdamW updates; buffers are left out.
    pub fn segments(&self) -> Vec<Segment> {
        let trained = self.tensors.iter().filter(|t| t.kind != Kind::Buffer);
        trained.map(|t| Segment { range: t.range(), decay: t.decay }).collect()
    }

    /// Ranges of the gradient norm, one per tensor in global order.
    pub fn trained_ranges(&self) -> Vec<Range<usize>> {
        self.segments().into_iter().map(|s| s.range).collect()
    }

    /// Number of parameters, correction biases left out (as published counts do).
    pub fn parameters(&self) -> usize {
        self.tensors.iter().filter(|t| t.kind != Kind::Buffer).map(TensorInfo::len).sum()
    }
}
