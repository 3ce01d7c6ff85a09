"""Trains the initial checkpoint of a hadal run with transformers, on the recorded tokens in the recorded order, and compares
the losses: every 20-step mean must agree within 0.5 %.

    pip install torch transformers safetensors
    python compare.py RUN_DIR BATCHES.safetensors

Both sides: fp32, AdamW (betas 0.9 and 0.95, eps 1e-8, decay 0.1 on matrices and 0 on norms), gradient clipped to norm 1,
the learning rates that the run recorded. Prints a table and one JSON line; exits with 1 if a mean is off.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def groups(model):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]


def train(run: Path, tokens: torch.Tensor, rates: list[float]) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        run / "step-000000", dtype=torch.float32, attn_implementation="eager")
    model.train()
    optimizer = torch.optim.AdamW(groups(model), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses, begin = [], time.time()
    for step, (window, rate) in enumerate(zip(tokens, rates)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=window[:, :-1].long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten().long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1}: {loss.item():.4f}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    return losses


def main() -> int:
    args = argparse.ArgumentParser()
    args.add_argument("run", type=Path)
    args.add_argument("batches", type=Path)
    args = args.parse_args()
    ours = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    tokens = load_file(args.batches)["tokens"]
    theirs = train(args.run, tokens, [m["lr"] for m in ours])
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'steps':>9} {'hadal':>10} {'transformers':>13} {'difference':>11}")
    worst = 0.0
    for first in range(0, len(ours), 20):
        a, b = (sum(x[first:first + 20]) / len(x[first:first + 20]) for x in ([m["loss"] for m in ours], theirs))
        worst = max(worst, abs(a - b) / b)
        print(f"{first + 1:4}-{first + 20:4} {a:10.5f} {b:13.5f} {(a - b) / b:+11.4%}")
    first_step = abs(ours[0]["loss"] - theirs[0]) / theirs[0]
    print(json.dumps({"first_step_difference": first_step, "worst_20_step_difference": worst, "allowed": 0.005,
                      "steps": len(ours)}))
    return 0 if worst <= 0.005 and len(ours) == len(theirs) == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
