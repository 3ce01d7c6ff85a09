"""The golden of AdamW alone: one torch.optim.AdamW step on values of every magnitude."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
MAGNITUDES = (0.0, 1e-40, 1e-30, 1e-20, 1e-12, 1e-8, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e9, 1e15)
COUNT = 301


def inputs() -> dict[str, torch.Tensor]:
    """v is a square of some magnitude, independent of g and m: the moments need not fit each other."""
    rng = torch.Generator().manual_seed(1)

    def draw(magnitudes: tuple[float, ...]) -> torch.Tensor:
        picked = torch.tensor(magnitudes)[torch.randint(0, len(magnitudes), (COUNT,), generator=rng)]
        return picked * torch.randn(COUNT, generator=rng)

    return {"w": draw((0.0, 1e-8, 1e-3, 0.02, 1.0, 100.0, 1e6)), "g": draw(MAGNITUDES),
            "m": draw(MAGNITUDES[:-2]), "v": draw(MAGNITUDES[:-2]).square()}


def step(given: dict[str, torch.Tensor], t: int, weight_decay: float) -> dict[str, torch.Tensor]:
    w = torch.nn.Parameter(given["w"].clone())
    w.grad = given["g"].clone()
    optimiser = torch.optim.AdamW([w], lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"],
                                  weight_decay=weight_decay, foreach=False, fused=False)
    state = {"step": torch.tensor(float(t - 1)), "exp_avg": given["m"].clone(), "exp_avg_sq": given["v"].clone()}
    optimiser.state[w] = state
    optimiser.step()
    return {"w": w.detach(), "m": state["exp_avg"], "v": state["exp_avg_sq"]}


def write(path: Path, versions: dict[str, str]) -> None:
    given = inputs()
    tensors = dict(given)
    for t in (1, 7):
        for label, weight_decay in (("decay", HYPER["weight_decay"]), ("plain", 0.0)):
            tensors |= {f"t{t}.{label}.{name}": x for name, x in step(given, t, weight_decay).items()}
    assert all(x.isfinite().all() for x in tensors.values())
    meta = json.dumps({"versions": versions, "hyperparameters": HYPER}, sort_keys=True)
    save_file(tensors, path, metadata={"meta": meta})
