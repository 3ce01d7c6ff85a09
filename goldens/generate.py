"""Writes the golden models: tiny DeepSeek-V2 and V3 models run by Hugging Face transformers, the independent
implementation that this project is checked against.

    pip install torch transformers safetensors numpy
    python goldens/generate.py [case ...]

Without arguments every case is written, and adamw_op.safetensors and cases.txt too. The versions used are recorded in
each file. The model is transformers' own (FP32, eager attention and experts), loaded from a checkpoint with published
names, so that its reading of names and config.json is part of the golden. What transformers does not have is written
here: the balance loss, the MTP loss, the bias update. Same machine and versions: same bytes.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import save_file

import adamw_op
from cases import CASES, Case
from reference import Hf, Output, bias_update, losses, margins

HERE = Path(__file__).parent
# What transformers' own bf16 run must reach in every tensor of logits and gradients. The test of this project's bf16
# asks for 0.999, which says something only where rounding alone stays clear of it.
BF16_COSINE = 0.9996
VERSIONS = {
    "torch": torch.__version__, "transformers": transformers.__version__,
    "safetensors": safetensors.__version__, "numpy": numpy.__version__,
}


def published_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Published name and shape of every weight, the correction biases included."""
    c, d = case.config, case.config["hidden_size"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,),
              "lm_head.weight": (c["vocab_size"], d)}
    for layer in range(c["num_hidden_layers"] + case.mtp):
        prefix = f"model.layers.{layer}."
        is_mtp = layer >= c["num_hidden_layers"]
        own = attention_shapes(c) | mlp_shapes(case, dense=layer < c["first_k_dense_replace"])
        own |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        if is_mtp:
            own |= {"enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d),
                    "shared_head.norm.weight": (d,)}
        shapes |= {prefix + name: shape for name, shape in own.items()}
    return shapes


def attention_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    d, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    own = {"kv_a_proj_with_mqa.weight": (latent + rope, d), "kv_a_layernorm.weight": (latent,),
           "kv_b_proj.weight": (heads * (nope + value), latent), "o_proj.weight": (d, heads * value)}
    rank = c["q_lora_rank"]
    if rank is None:
        own["q_proj.weight"] = (heads * (nope + rope), d)
    else:
        own |= {"q_a_proj.weight": (rank, d), "q_a_layernorm.weight": (rank,),
                "q_b_proj.weight": (heads * (nope + rope), rank)}
    return {"self_attn." + name: shape for name, shape in own.items()}


def mlp_shapes(case: Case, dense: bool) -> dict[str, tuple[int, ...]]:
    c = case.config
    d, experts, width = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]

    def swiglu(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {prefix + "gate_proj.weight": (inner, d), prefix + "up_proj.weight": (inner, d),
                prefix + "down_proj.weight": (d, inner)}

    if dense:
        return swiglu("mlp.", c["intermediate_size"])
    own = {"mlp.gate.weight": (experts, d)} | swiglu("mlp.shared_experts.", c["n_shared_experts"] * width)
    if case.is_v3:
        own["mlp.gate.e_score_correction_bias"] = (experts,)
    for e in range(experts):
        own |= swiglu(f"mlp.experts.{e}.", width)
    return own


def draw_weights(case: Case, rng: torch.Generator) -> dict[str, torch.Tensor]:
    weights = {}
    for name, shape in sorted(published_shapes(case).items()):
        noise = torch.randn(shape, generator=rng)
        if name.endswith("e_score_correction_bias"):
            weights[name] = draw_bias(case, shape, rng)
        elif len(shape) == 1:
            weights[name] = 1 + 0.2 * noise.clamp(-2, 2)
        else:
            weights[name] = scale(name, shape[1]) * noise
    for source, copy in case.copies:
        copy_expert(weights, source, copy)
    return weights


def scale(name: str, inputs: int) -> float:
    """Of a matrix's normal entries. Routing is lively, while attention or an MLP adds to the residual stream a tenth to a
    third of what is there (two thirds with a routed scaling of 16) and attention is soft: rounding errors are then not
    amplified from layer to layer, and a bf16 run can be told from a wrong one (BF16_COSINE)."""
    if name == "model.embed_tokens.weight":
        return 1.0
    if name == "lm_head.weight":
        return 0.3
    if name.endswith("mlp.gate.weight"):
        return 1.2 / math.sqrt(inputs)
    if name.endswith(("q_proj.weight", "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")):
        return 0.7 / math.sqrt(inputs)
    return 0.5 / math.sqrt(inputs)


def draw_bias(case: Case, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    noise = torch.rand(shape, generator=rng)
    if case.bias == "negative":
        return -5 + 0.5 * (noise - 0.5)
    if case.bias == "large":
        # Exactly half of the experts are high, in a random order.
        order = torch.randperm(shape[0], generator=rng)
        return torch.where(order % 2 == 0, 100.0, -100.0) + noise
    return 0.4 * (noise - 0.5)


def copy_expert(weights: dict[str, torch.Tensor], source: int, copy: int) -> None:
    for name in list(weights):
        if name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
            weights[name][copy] = weights[name][source]
        elif f".experts.{source}." in name:
            weights[name.replace(f".experts.{source}.", f".experts.{copy}.")] = weights[name].clone()


def draw_tokens(case: Case, rng: torch.Generator) -> list[torch.Tensor]:
    return [torch.randint(0, case.config["vocab_size"], (n,), generator=rng) for n in case.lengths]


def write_config(case: Case) -> Path:
    folder = HERE / case.name
    folder.mkdir(exist_ok=True)
    text = json.dumps(case.file(transformers.__version__), indent=2)
    (folder / "config.json").write_text(text + "\n")
    return folder


def load(case: Case, folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Hf:
    """Through a checkpoint on disk, as a user's would be."""
    with tempfile.TemporaryDirectory() as checkpoint:
        save_file(weights, Path(checkpoint) / "model.safetensors", metadata={"format": "pt"})
        (Path(checkpoint) / "config.json").write_bytes((folder / "config.json").read_bytes())
        return Hf(case, checkpoint, dtype)


def gradients(hf: Hf, loss: torch.Tensor, keep: bool) -> dict[str, torch.Tensor]:
    """By published name. A weight that the loss does not reach is left out."""
    parameters = hf.parameters()
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=keep, allow_unused=True)
    named = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return hf.published(named)


def adamw_steps(case: Case, hf: Hf, sequences: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Ten steps on the same batch; also the smallest margin met on the way."""
    h = case.hyper
    parameters = hf.parameters()
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": h["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"],
                                  foreach=False, fused=False)
    total, norms, smallest = [], [], math.inf
    for _ in range(h["steps"]):
        output = hf.run(sequences)
        now = margins(case, hf, output)
        smallest = min(smallest, now.choice, now.plain)
        loss = losses(case, output)["total"]
        optimiser.zero_grad()
        loss.backward()
        total.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), h["clip"]).detach())
        optimiser.step()
        bias_update(case, hf, output)
    tensors = {"adamw.losses": torch.stack(total), "adamw.norms": torch.stack(norms)}
    return tensors | {f"adamw.w.{name}": w for name, w in hf.weights().items()}, smallest


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[1:], ids.new_tensor([-1])])


def tensors_of(case: Case, hf: Hf, sequences: list[torch.Tensor], output: Output) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, *(len(s) for s in sequences)])
    loss = losses(case, output)
    tensors = {
        "ids": torch.cat(sequences).int(), "cu": lengths.cumsum(0).int(),
        "targets": torch.cat([targets_of(s) for s in sequences]).int(),
        "logits": torch.cat(output.logits[0]),
    }
    for depth in range(1, case.mtp + 1):
        tensors[f"mtp.{depth}.logits"] = torch.cat(output.logits[depth])
    for layer, calls in output.routers.items():
        tensors[f"router.{layer}.indices"] = torch.cat([call.indices for call in calls]).int()
        tensors[f"router.{layer}.scores"] = torch.cat([call.scores for call in calls])
    tensors |= {f"loss.{name}": value for name, value in loss.items()}
    if case.main_gradient:
        tensors |= {f"gm.{name}": g for name, g in gradients(hf, loss["main"], keep=True).items()}
    return tensors | {f"g.{name}": g for name, g in gradients(hf, loss["total"], keep=False).items()}


def bf16_cosines(case: Case, folder: Path, weights: dict[str, torch.Tensor], sequences: list[torch.Tensor],
                 tape: list[torch.Tensor], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of transformers' own bf16 run, with the fp32 run's routing, to the fp32 run: logits and every gradient."""
    hf = load(case, folder, weights, torch.bfloat16)
    output = hf.run(sequences, tape)
    found = {"logits" if k == 0 else f"mtp.{k}.logits": torch.cat(l) for k, l in enumerate(output.logits)}
    total = losses(case, output)["total"]
    found |= {f"g.{name}": g for name, g in gradients(hf, total, keep=False).items()}
    assert found.keys() == {name for name in tensors if name.endswith("logits") or name.startswith("g.")}
    return {name: cosine(t, tensors[name]) for name, t in found.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 if both are zero: the gradient of an expert that nobody chose."""
    if not a.any() and not b.any():
        return 1.0
    return torch.cosine_similarity(a.detach().double().flatten(), b.detach().double().flatten(), dim=0).item()


def attempt(case: Case, folder: Path, seed: int) -> tuple[dict[str, torch.Tensor], dict] | None:
    """None if this seed leaves some choice too close to a tie, or some gradient at the mercy of bf16 rounding."""
    rng = torch.Generator().manual_seed(seed)
    weights = draw_weights(case, rng)
    sequences = draw_tokens(case, rng)
    hf = load(case, folder, weights)
    assert all(torch.equal(weights[name], w) for name, w in hf.weights().items())
    assert hf.weights().keys() == weights.keys()

    output = hf.run(sequences)
    first = margins(case, hf, output)
    if min(first.choice, first.plain) <= case.margin or first.order <= 1e-5:
        return None
    assert first.exact_ties == bool(case.copies), f"{case.name}: exact ties {first.exact_ties}"
    tensors = {f"w.{name}": w for name, w in weights.items()} | tensors_of(case, hf, sequences, output)
    facts = {"seed": seed, "margin": first.choice, "margin_balance": first.plain}
    cosines = bf16_cosines(case, folder, weights, sequences, hf.tape, tensors)
    facts["bf16_noise"] = min(cosines.values())
    if facts["bf16_noise"] < BF16_COSINE:
        return None
    if not case.copies:  # With copies the first step breaks the ties by rounding alone.
        steps, facts["margin_adamw"] = adamw_steps(case, hf, sequences)
        if facts["margin_adamw"] <= case.margin_steps:
            return None
        tensors |= steps
    return tensors, facts


def meta_of(case: Case, facts: dict) -> dict[str, str]:
    meta = {"case": case.name, "about": case.about, "config_layout": case.layout, "mtp_depth": case.mtp,
            "versions": VERSIONS, "hyperparameters": case.hyper, **facts}
    return {"meta": json.dumps(meta, sort_keys=True)}


def write_case(case: Case) -> None:
    folder = write_config(case)
    seed = 0
    while (found := attempt(case, folder, seed)) is None:
        seed += 1
    tensors, facts = found
    tensors = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    assert all(t.isfinite().all() for t in tensors.values())
    path = folder / "golden.safetensors"
    save_file(tensors, path, metadata=meta_of(case, facts))
    parameters = sum(t.numel() for name, t in tensors.items() if name.startswith("w."))
    print(f"{case.name}: seed {seed}, {parameters} weights, {path.stat().st_size} bytes, "
          f"loss {tensors['loss.total'].item():.6f}, margin {facts['margin']:.1e}, "
          f"bf16 {facts['bf16_noise']:.5f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = sys.argv[1:]
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    for case in CASES:
        if not names or case.name in names:
            write_case(case)
    if not names:
        adamw_op.write(HERE / "adamw_op.safetensors", VERSIONS)
        (HERE / "cases.txt").write_text("".join(f"{case.name}: {case.about}\n" for case in CASES))


if __name__ == "__main__":
    main()
