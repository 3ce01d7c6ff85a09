"""The same work in torch and transformers: matrix products, attention, training steps; on a GPU experts' products too.

As a program it is one training run on what `hadal bench train --export DIR` wrote, and prints one JSON object:

    python rival.py DIR [--dtype fp32|bf16] [--experts grouped_mm|batched_mm|eager] [--compile] [--steps N] [--threads N]
                        [--device cpu|cuda]
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import statistics
import sys
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
        from torch._inductor import config
        config.cpp.simdlen = 256


def timed(work, times: int, device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / times
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times


def measure(work, seconds: float, repeats: int, device: str = "cpu") -> float:
    """Median seconds of one doing, after two to warm up."""
    work()
    times = max(1, math.ceil(SHORTEST / timed(work, 1, device)))
    found, begin = [], time.perf_counter()
    while len(found) < repeats or time.perf_counter() - begin < seconds:
        found.append(timed(work, times, device))
    return statistics.median(found)


def gemm(case: dict, setting: str, device: str = "cpu"):
    """The product of a case. Operands of unlike types are all FP32; nothing is accumulated, which is less work."""
    m, n, k, layout = case["m"], case["n"], case["k"], case["layout"]
    dtype = DTYPES[setting]
    a = torch.randn((k, m) if layout == "tn" else (m, k), device=device).to(dtype)
    bs = [torch.randn((n, k) if layout == "nt" else (k, n), device=device).to(dtype) for _ in range(case["copies"])]
    a = a.T if layout == "tn" else a
    bs = [b.T if layout == "nt" else b for b in bs]
    c = torch.empty(m, n, dtype=dtype, device=device)
    turn = iter(range(0))

    def work():
        nonlocal turn
        b = next(turn, None)
        if b is None:
            turn = iter(bs)
            b = next(turn)
        torch.mm(a, b, out=c)

    return torch.no_grad()(work)


def gemm_settings(case: dict, device: str = "cpu") -> list[str]:
    return ["bf16" if case["a"] == case["b"] == "bf16" else "f32"]


def grouped_gemm(case: dict, setting: str, device: str):
    """Products over experts by grouped_mm. The weight's gradient is BF16 and not accumulated, which is less work."""
    experts, out, width, rows = case["experts"], case["out"], case["in"], case["rows"]
    offsets = torch.tensor(case["counts"], device=device).cumsum(0).to(torch.int32)

    def floats(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    if case["direction"] == "weight gradient":
        a, b = floats(rows, out).T, floats(rows, width)
    elif case["direction"] == "forward":
        a, b = floats(rows, width), floats(experts, out, width).transpose(-2, -1)
    else:
        a, b = floats(rows, out), floats(experts, out, width)
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return torch.no_grad()(lambda: grouped_mm(a, b, offs=offsets))


def grouped_gemm_settings(case: dict, device: str) -> list[str]:
    return ["grouped_mm"]


def attention(case: dict, setting: str, device: str = "cpu"):
    """Causal attention by scaled_dot_product_attention; sequences of one length as a batch, others one by one or, where
    torch has it, packed."""
    if setting == "varlen padded":
        return varlen(case, device)
    dtype, padded = setting.split()[0], setting.endswith("padded")
    backend = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}.get(dtype)
    dtype = "bf16" if backend else dtype
    heads, qk, v = case["heads"], case["qk"], case["v"]
    lengths = case["lengths"]
    batches = [(len(lengths), lengths[0])] if len(set(lengths)) == 1 else [(1, t) for t in lengths]
    backward = case["direction"] != "forward"
    inputs = []
    for batch, t in batches:
        tensors = [torch.randn(batch, heads, t, width, device=device).to(DTYPES[dtype]) for width in (qk, qk, v)]
        inputs.append([x.requires_grad_(backward) for x in tensors])

    def forward(q, k, v_):
        if padded:
            v_ = F.pad(v_, (0, qk - v))
        with chosen(backend):
            return F.scaled_dot_product_attention(q, k, v_, is_causal=True, scale=qk ** -0.5)[..., :v]

    return directions(case, forward, inputs)


def chosen(backend: str | None):
    """Only this way to compute attention, or torch's own choice."""
    if backend is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel(getattr(SDPBackend, backend))


def directions(case: dict, forward, inputs):
    """What a case measures of a forward pass over each of `inputs`."""
    def gradients(out, x, d, keep):
        torch.autograd.grad(out, x, d, retain_graph=keep)

    if case["direction"] == "forward":
        return torch.no_grad()(lambda: [forward(*x) for x in inputs])
    ds = [torch.randn_like(forward(*x)) for x in inputs]
    if case["direction"] == "backward":
        outs = [forward(*x) for x in inputs]
        return lambda: [gradients(out, x, d, True) for out, x, d in zip(outs, inputs, ds)]
    return lambda: [gradients(forward(*x), x, d, False) for x, d in zip(inputs, ds)]


def varlen(case: dict, device: str):
    """All sequences in one launch, which torch has for equal widths only."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn
    heads, qk, v, lengths = case["heads"], case["qk"], case["v"], case["lengths"]
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    causal = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
    backward = case["direction"] != "forward"
    x = [torch.randn(sum(lengths), heads, width, device=device, dtype=torch.bfloat16).requires_grad_(backward)
         for width in (qk, qk, v)]

    def forward(q, k, v_):
        return varlen_attn(q, k, F.pad(v_, (0, qk - v)), cu, cu, max(lengths), max(lengths), **causal)[..., :v]

    return directions(case, forward, [x])


def attention_settings(case: dict, device: str = "cpu") -> list[str]:
    if device == "cuda":
        packed = ["varlen padded"] if len(set(case["lengths"])) > 1 else []
        return ["cudnn", "flash padded", "efficient", *packed]
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


# A model of every part that takes no memory to speak of.
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    n_group=2, topk_group=1)


class Training:
    """A model with its optimiser, and their step."""

    def __init__(self, model, constants: dict, experts: str, compiled: bool):
        model.set_experts_implementation(experts)
        model.train()
        self.model, self.clip = model, constants["clip"]
        self.optimizer = torch.optim.AdamW(
            groups(model, constants["weight_decay"]), lr=constants["lr"], fused=True,
            betas=(constants["beta1"], constants["beta2"]), eps=constants["eps"])
        self.loss = torch.compile(self.forward) if compiled else self.forward
        self.gradients = 0

    def forward(self, inputs, targets):
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step(self, window) -> float:
        loss = self.loss(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self) -> int:
        """Bytes of parameters, gradients and moments."""
        moments = (x for s in self.optimizer.state.values() for x in s.values() if torch.is_tensor(x))
        return sum(p.nbytes for p in self.model.parameters()) + self.gradients + sum(x.nbytes for x in moments)


def load_code(directory: Path, dtype: str, constants: dict, experts: str, compiled: bool) -> None:
    """A step of a tiny model, which is gone afterwards: what a process holds before there is a model has all code."""
    import transformers
    config = transformers.AutoConfig.from_pretrained(directory)
    kept = {key: value for key, value in TINY.items() if key != "q_lora_rank" or config.q_lora_rank is not None}
    config = type(config)(**{"q_lora_rank": None, **kept})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    Training(model, constants, experts, compiled).step(torch.randint(0, 64, (2, 17)))
    del model
    torch.compiler.reset()
    gc.collect()


def train_on_gpu(directory: Path, dtype: str, experts: str, compiled: bool, tokens, constants: dict) -> dict:
    """As `train`. Memory is what torch has handed out."""
    import transformers
    tokens = tokens.cuda()
    before = torch.cuda.memory_allocated()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], attn_implementation="sdpa").cuda()
    job = Training(model, constants, experts, compiled)
    losses, seconds = [], []
    for step, window in enumerate(tokens):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        losses.append(job.step(window))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step == 1:
            # Compiling, which the second step may have too, is no part of the steps.
            torch.cuda.reset_peak_memory_stats()
    rates = [tokens.shape[1] * (tokens.shape[2] - 1) / s for s in seconds[2:] or seconds]
    return {
        "tokens_per_s": statistics.median(rates), "spread": [min(rates), max(rates)], "first_loss": losses[0],
        "mean_loss": statistics.fmean(losses),
        "peak_bytes": max(0, torch.cuda.max_memory_allocated() - before - job.state()),
        "state_bytes": job.state(), "torch": torch.__version__, "transformers": transformers.__version__,
    }


def train(directory: Path, dtype: str, experts: str, compiled: bool, steps: int | None, device: str, paced: bool) -> dict:
    """Steps of AdamW from the exported weights on the exported tokens. If paced, waits for a line before each but the first,
    and says how fast it was."""
    import transformers
    from safetensors.torch import load_file

    constants = json.loads((directory / "bench.json").read_text())["constants"]
    tokens = load_file(directory / "tokens.safetensors")["tokens"].long()
    tokens = tokens[:steps] if steps else tokens
    if device == "cuda":
        return train_on_gpu(directory, dtype, experts, compiled, tokens, constants)
    load_code(directory, dtype, constants, experts, compiled)
    before, files = status("VmRSS"), status("RssFile")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], attn_implementation="sdpa")
    job = Training(model, constants, experts, compiled)
    # What loading has left behind is no part of the steps.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    losses, seconds = [], []
    for step, window in enumerate(tokens):
        if paced and step > 0:
            sys.stdin.readline()
        begin = time.perf_counter()
        losses.append(job.step(window))
        seconds.append(time.perf_counter() - begin)
        if paced:
            print(json.dumps({"step": step, "tokens_per_s": window[:, 1:].numel() / seconds[-1]}), flush=True)
        if step == 0 and len(tokens) > 1:
            # Compiling is no part of the steps; what it leaves resident is.
            Path("/proc/self/clear_refs").write_text("5")
    # Nor are pages of the checkpoint that are still mapped: the system can drop them.
    before += max(0, status("RssFile") - files)
    rates = [tokens.shape[1] * (tokens.shape[2] - 1) / s for s in seconds[1:] or seconds]
    return {
        "tokens_per_s": statistics.median(rates), "spread": [min(rates), max(rates)], "first_loss": losses[0],
        "mean_loss": statistics.fmean(losses), "peak_bytes": max(0, status("VmHWM") - before - job.state()),
        "state_bytes": job.state(), "torch": torch.__version__, "transformers": transformers.__version__,
    }


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("directory", type=Path)
    args.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    args.add_argument("--experts", choices=["grouped_mm", "batched_mm", "eager"], default="grouped_mm")
    args.add_argument("--compile", action="store_true")
    args.add_argument("--steps", type=int)
    args.add_argument("--threads", type=int)
    args.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args.add_argument("--paced", action="store_true", help="on a CPU: wait for a line before each step but the first")
    args = args.parse_args()
    threads(args.threads)
    print(json.dumps(train(args.directory, args.dtype, args.experts, args.compile, args.steps, args.device, args.paced)))


if __name__ == "__main__":
    main()
