"""The same work in torch and transformers: matrix products, attention, training steps.

As a program it is one training run on what `hadal bench train --export DIR` wrote, and prints one JSON object:

    python rival.py DIR [--dtype fp32|bf16] [--experts grouped_mm|batched_mm|eager] [--compile] [--steps N] [--threads N]
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

DTYPES = {"f32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
# A timed run takes at least so long: shorter work is done several times in it.
SHORTEST = 1e-3


def threads(n: int | None) -> None:
    """All cores, or n of them; code that torch generates obeys the instruction set asked for (run.sh)."""
    torch.set_num_threads(n or len(os.sched_getaffinity(0)))
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        import torch._inductor.config
        torch._inductor.config.cpp.simdlen = 256


def timed(work, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def measure(work, seconds: float, repeats: int) -> float:
    """Median seconds of one doing, after one to warm up."""
    times = max(1, math.ceil(SHORTEST / timed(work, 1)))
    timed(work, times)
    found, begin = [], time.perf_counter()
    while len(found) < repeats or time.perf_counter() - begin < seconds:
        found.append(timed(work, times))
    return statistics.median(found)


def gemm(case: dict, setting: str):
    """The product of a case. Operands of unlike types are all FP32; nothing is accumulated, which is less work."""
    m, n, k, layout = case["m"], case["n"], case["k"], case["layout"]
    dtype = DTYPES[setting]
    a = torch.randn((k, m) if layout == "tn" else (m, k)).to(dtype)
    bs = [torch.randn((n, k) if layout == "nt" else (k, n)).to(dtype) for _ in range(case["copies"])]
    a = a.T if layout == "tn" else a
    bs = [b.T if layout == "nt" else b for b in bs]
    c = torch.empty(m, n, dtype=dtype)
    turn = iter(range(0))

    def work():
        nonlocal turn
        b = next(turn, None)
        if b is None:
            turn = iter(bs)
            b = next(turn)
        torch.mm(a, b, out=c)

    return torch.no_grad()(work)


def gemm_settings(case: dict) -> list[str]:
    return ["bf16" if case["a"] == case["b"] == "bf16" else "f32"]


def attention(case: dict, setting: str):
    """Causal attention by scaled_dot_product_attention; sequences of one length as a batch, others one by one."""
    dtype, padded = setting.split()[0], setting.endswith("padded")
    heads, qk, v = case["heads"], case["qk"], case["v"]
    lengths = case["lengths"]
    batches = [(len(lengths), lengths[0])] if len(set(lengths)) == 1 else [(1, t) for t in lengths]
    backward = case["direction"] != "forward"
    inputs = []
    for batch, t in batches:
        tensors = [torch.randn(batch, heads, t, width).to(DTYPES[dtype]) for width in (qk, qk, v)]
        inputs.append([x.requires_grad_(backward) for x in tensors])

    def forward(q, k, v_):
        if padded:
            v_ = F.pad(v_, (0, qk - v))
        return F.scaled_dot_product_attention(q, k, v_, is_causal=True, scale=qk ** -0.5)[..., :v]

    def gradients(out, x, keep):
        torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=keep)

    if case["direction"] == "forward":
        return torch.no_grad()(lambda: [forward(*x) for x in inputs])
    if case["direction"] == "backward":
        outs = [forward(*x) for x in inputs]
        return lambda: [gradients(out, x, True) for out, x in zip(outs, inputs)]
    return lambda: [gradients(forward(*x), x, False) for x in inputs]


def attention_settings(case: dict) -> list[str]:
    pads = ["", " padded"] if case["v"] < case["qk"] else [""]
    return [dtype + pad for dtype in ("bf16", "f32") for pad in pads]


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def groups(model, decay: float):
    """As hadal: matrices are decayed, norms are not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def train(directory: Path, dtype: str, experts: str, compiled: bool, steps: int | None) -> dict:
    """Steps of AdamW from the exported weights on the exported tokens."""
    import transformers
    from safetensors.torch import load_file

    constants = json.loads((directory / "bench.json").read_text())["constants"]
    before = status("VmRSS")
    tokens = load_file(directory / "tokens.safetensors")["tokens"]
    steps = min(steps or len(tokens), len(tokens))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], attn_implementation="sdpa")
    model.set_experts_implementation(experts)
    model.train()
    optimizer = torch.optim.AdamW(
        groups(model, constants["weight_decay"]), lr=constants["lr"], fused=True,
        betas=(constants["beta1"], constants["beta2"]), eps=constants["eps"])

    def loss_of(inputs, targets):
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    run = torch.compile(loss_of) if compiled else loss_of
    losses, seconds = [], []
    for step, window in enumerate(tokens[:steps].long()):
        begin = time.perf_counter()
        loss = run(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), constants["clip"])
        optimizer.step()
        if step == 0:
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        if step == 0 and steps > 1:
            # Compiling is no part of the steps; what it leaves resident is.
            Path("/proc/self/clear_refs").write_text("5")
    state = sum(p.nbytes for p in model.parameters()) + gradients
    state += sum(x.nbytes for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
    rates = [tokens.shape[1] * (tokens.shape[2] - 1) / s for s in seconds[1:] or seconds]
    return {
        "tokens_per_s": statistics.median(rates), "spread": [min(rates), max(rates)], "first_loss": losses[0],
        "mean_loss": statistics.fmean(losses), "peak_bytes": status("VmHWM") - before - state, "state_bytes": state,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("directory", type=Path)
    args.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    args.add_argument("--experts", choices=["grouped_mm", "batched_mm", "eager"], default="grouped_mm")
    args.add_argument("--compile", action="store_true")
    args.add_argument("--steps", type=int)
    args.add_argument("--threads", type=int)
    args = args.parse_args()
    threads(args.threads)
    print(json.dumps(train(args.directory, args.dtype, args.experts, args.compile, args.steps)))


if __name__ == "__main__":
    main()
