"""The golden models: what each one is there to show, its config.json and the shape of its batch.

Half of the configs use the key layout of the published checkpoints (rope_theta and rope_scaling at the top level,
torch_dtype, scoring_func, topk_method, aux_loss_alpha, ...), the other half the one transformers 5 writes
(rope_parameters, dtype). Dimensions are as small as they can be while every part still does something.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LENGTHS = (17, 3, 9, 12)
# Longer than the 16 positions that the YaRN configs call the original context.
YARN_LENGTHS = (27, 4, 14)

V3 = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 6,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}
V2 = {
    **V3, "num_hidden_layers": 3, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "topk_method": "greedy",
}
del V2["num_nextn_predict_layers"]  # V2 has no such field.

# With 8 rotary dimensions and base 50 the ramp over the 4 frequencies is 0, 1/4, 1/2, 3/4: every kind of frequency
# (kept, mixed) is there, and the ends 0.96 and 3.30 differ from their floor and ceiling.
YARN = {
    "factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 1.0, "beta_slow": 0.1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}
YARN_DIMS = {"qk_rope_head_dim": 8, "max_position_embeddings": 640}
NO_MSCALE = {key: value for key, value in YARN.items() if not key.startswith("mscale")}


@dataclass(frozen=True)
class Case:
    """One golden model."""

    name: str
    about: str
    layout: str
    config: dict
    model_type: str = "deepseek_v3"
    lengths: tuple[int, ...] = LENGTHS
    rope_theta: float = 10000.0
    yarn: dict | None = None
    bias: str = "random"
    # (from, to): expert `to` is made an exact copy of expert `from` in every MoE layer.
    copies: tuple[tuple[int, int], ...] = ()
    main_gradient: bool = False
    # Smallest gap by which a choice must be decided at the start, and during the ten AdamW steps.
    margin: float = 3e-4
    margin_steps: float = 5e-5
    hyper: dict = field(default_factory=lambda: dict(HYPER))

    @property
    def is_v3(self) -> bool:
        return self.model_type == "deepseek_v3"

    @property
    def mtp(self) -> int:
        return self.config.get("num_nextn_predict_layers", 0)

    @property
    def architecture(self) -> str:
        return "DeepseekV3ForCausalLM" if self.is_v3 else "DeepseekV2ForCausalLM"

    def file(self, transformers_version: str) -> dict:
        """The contents of config.json."""
        common = {
            "architectures": [self.architecture], "model_type": self.model_type, **self.config,
            "hidden_act": "silu", "initializer_range": 0.02, "attention_bias": False, "attention_dropout": 0.0,
            "tie_word_embeddings": False, "pretraining_tp": 1, "use_cache": True,
            "bos_token_id": 0, "eos_token_id": 1,
        }
        found = self._old(common) if self.layout == "old" else self._new(common, transformers_version)
        return dict(sorted(found.items()))

    def _old(self, common: dict) -> dict:
        scaling = None if self.yarn is None else {"type": "yarn", **_whole(self.yarn)}
        return {
            **common, "rope_theta": _whole({"": self.rope_theta})[""], "rope_scaling": scaling,
            "torch_dtype": "float32", "transformers_version": "4.33.1",
            "scoring_func": "sigmoid" if self.is_v3 else "softmax",
            "topk_method": "noaux_tc" if self.is_v3 else self.config["topk_method"],
            "aux_loss_alpha": self.hyper["alpha"], "seq_aux": True, "moe_layer_freq": 1, "ep_size": 1,
        }

    def _new(self, common: dict, transformers_version: str) -> dict:
        rope = {"rope_type": "default"} if self.yarn is None else {"rope_type": "yarn", **self.yarn}
        own = {"rope_interleave": True} if self.is_v3 else {"mlp_bias": False}
        widths = {
            "head_dim": common["qk_rope_head_dim"],
            "qk_head_dim": common["qk_nope_head_dim"] + common["qk_rope_head_dim"],
        }
        return {
            **own, **common, **widths, "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "dtype": "float32", "transformers_version": transformers_version,
            "output_router_logits": False, "pad_token_id": None,
        }


def _whole(values: dict) -> dict:
    """Published files write 40 and 10000, not 40.0 and 10000.0."""
    return {k: int(v) if isinstance(v, float) and v.is_integer() and v > 1 else v for k, v in values.items()}


# Of the loss and of the ten AdamW steps.
HYPER = {
    "lambda": 0.3, "alpha": 0.01, "gamma": 0.01, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
    "weight_decay": 0.1, "clip": 1.0, "steps": 10,
}

CASES = [
    Case("v3", "DeepSeek-V3 in small: q_lora, 8 experts in 4 groups of which 2 stay, one shared expert, one MTP layer",
         "old", V3, main_gradient=True),
    Case("v2_lite", "DeepSeek-V2-Lite: softmax, greedy top 3, no q_lora, two shared experts, no MTP",
         "old", {**V2, "q_lora_rank": None}, "deepseek_v2", main_gradient=True),
    Case("v2_grouped", "DeepSeek-V2: group-limited greedy (a group's score is its best expert), q_lora, scaling 16",
         "new", {**V2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
                 "topk_method": "group_limited_greedy"}, "deepseek_v2"),
    Case("v3_yarn", "YaRN with mscale = mscale_all_dim = 1, positions beyond the original context",
         "new", {**V3, **YARN_DIMS, "vocab_size": 40, "n_routed_experts": 6, "n_group": 3},
         lengths=YARN_LENGTHS, rope_theta=50.0, yarn=YARN, main_gradient=True),
    Case("v2_yarn", "YaRN with mscale = mscale_all_dim = 0.707 on V2's complex rotation",
         "old", {**V2, **YARN_DIMS, "q_lora_rank": None}, "deepseek_v2", lengths=YARN_LENGTHS, rope_theta=50.0,
         yarn={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    Case("v3_yarn_no_mscale", "YaRN without mscale keys: 0.1 ln(factor) + 1 on cos and sin, softmax scale unchanged",
         "old", {**V3, **YARN_DIMS, "num_nextn_predict_layers": 0}, lengths=YARN_LENGTHS, rope_theta=50.0,
         yarn=NO_MSCALE),
    Case("v3_yarn_unequal", "YaRN with mscale 0.707 over mscale_all_dim 1, truncate false",
         "old", {**V3, **YARN_DIMS, "num_nextn_predict_layers": 0}, lengths=YARN_LENGTHS, rope_theta=50.0,
         yarn={**YARN, "mscale": 0.707, "truncate": False}),
    Case("v3_yarn_attention_factor", "YaRN with attention_factor (it replaces the ratio of mscales), truncate false",
         "new", {**V3, **YARN_DIMS, "num_nextn_predict_layers": 0}, lengths=YARN_LENGTHS, rope_theta=50.0,
         yarn={**YARN, "attention_factor": 0.8, "truncate": False}),
    Case("v3_no_q_lora", "Moonlight's form: no q_lora, a single group, two shared experts, no MTP",
         "new", {**V3, "num_hidden_layers": 3, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                 "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.446,
                 "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5}),
    Case("v3_ragged", "Odd sizes everywhere; rms_norm_eps 1e-3, while the two latent norms keep their own 1e-6",
         "old", {**V3, "vocab_size": 43, "hidden_size": 20, "intermediate_size": 13, "moe_intermediate_size": 7,
                 "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 11, "kv_lora_rank": 9,
                 "qk_nope_head_dim": 10, "v_head_dim": 6, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
                 "rms_norm_eps": 1e-3}, lengths=(11, 1, 5, 19)),
    Case("v3_one_expert", "One expert per token: normalised weights are constant, only the balance loss moves the gate",
         "new", {**V3, "num_experts_per_tok": 1}),
    Case("v3_pairs", "Groups of exactly two experts, top 4 of the 4 that the group limit leaves",
         "old", {**V3, "n_routed_experts": 6, "n_group": 3, "num_experts_per_tok": 4}),
    Case("v3_bias_negative", "Biases near -5, every choice value negative: masking with 0 instead of -inf goes wrong",
         "new", {**V3, "n_group": 2, "topk_group": 1}, bias="negative"),
    Case("v3_bias_large", "Correction biases near +100 and -100: they rule the choice, never the weights",
         "old", {**V3, "n_group": 2, "topk_group": 1}, bias="large"),
    Case("v3_two_dense", "Two dense layers before two MoE layers, weights not normalised, no MTP",
         "new", {**V3, "num_hidden_layers": 4, "first_k_dense_replace": 2, "norm_topk_prob": False,
                 "num_nextn_predict_layers": 0}),
    Case("v3_lengths", "Sequences of 1, 2, 3 and 200 tokens: 64-key tiles are crossed three times, MTP rows run out",
         "new", {**V3, "vocab_size": 40, "n_routed_experts": 6, "n_group": 3}, lengths=(1, 2, 3, 200), margin=1e-4),
    Case("v3_mtp2", "Two MTP layers, the second fed by the first; sequences too short for one or both",
         "new", {**V3, "vocab_size": 40, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
                 "num_nextn_predict_layers": 2}, lengths=(13, 1, 2, 3, 11)),
    Case("v3_ties", "Experts 1, 4, 5 are copies of 0, 2, 3: exact ties of experts and of groups, lowest index first",
         "old", {**V3, "num_experts_per_tok": 3}, copies=((0, 1), (2, 4), (3, 5))),
    Case("v3_half_split", "rope_interleave false: rotary pairs are (i, i + rope/2)",
         "new", {**V3, "qk_rope_head_dim": 8, "rope_interleave": False, "num_nextn_predict_layers": 0},
         rope_theta=100.0),
]
