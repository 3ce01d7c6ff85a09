"""The time of a step of 8 x 512 tokens by op, as a table. Usage: table.py OUTPUT.jsonl > by-op.md"""

import sys

from records import read

# Ops that take less than this part of the step share a line.
LEAST = 0.0035


def matrices(preset):
    """Elements that a token is multiplied by in a forward pass: (dense, routed experts, head), and of the dense ones
    those that the paper's recomputation uses again; attention's operations for a token of 512."""
    if preset != "mini":
        return None
    d, layers, sparse, heads, nope, rope, v = 512, 8, 7, 8, 64, 32, 64
    q_rank, kv_rank, experts, width, dense, chosen, vocab = 192, 128, 32, 256, 1408, 4, 8192
    up = layers * heads * (q_rank * (nope + rope) + kv_rank * (nope + v))
    down = layers * d * (q_rank + kv_rank + rope)
    shared = sparse * 3 * d * width + 3 * d * dense + sparse * d * experts
    keys = (512 + 1) / 2
    score, value = layers * heads * keys * (nope + rope), layers * heads * keys * v
    return {
        "gemm": up + down + layers * heads * v * d + shared,
        "again": up,
        "gemm_grouped": sparse * chosen * 3 * d * width,
        "head_loss": d * vocab,
        "score": score,
        "value": value,
    }


def counted(preset):
    """GFLOP of a step of 4,096 tokens, by op."""
    m = matrices(preset)
    if m is None:
        return {}
    works = {
        "gemm forward": m["gemm"] + m["again"],
        "gemm backward input": m["gemm"],
        "gemm backward weight": m["gemm"],
        "gemm_grouped forward": m["gemm_grouped"],
        "gemm_grouped backward input": m["gemm_grouped"],
        "gemm_grouped backward weight": m["gemm_grouped"],
        "head_loss forward and backward": 3 * m["head_loss"],
        "mla_prefill forward": m["score"] + m["value"],
        # Scores once more; gradients of queries, keys, values and probabilities.
        "mla_prefill backward": 3 * m["score"] + 2 * m["value"],
    }
    return {op: 2 * elements * 4096 / 1e9 for op, elements in works.items()}


def main(path):
    peak, trained = read(path)
    row = next(r for r in trained if not r["keys"] and (r["batch"], r["seq"]) == (8, 512))
    works, step = counted(row["preset"]), sum(row["by_op"].values())
    print(f"{row['case']}: {row['ours']:.0f} tokens/s; peak {peak:.0f} GFLOP/s; {row['machine']}, commit {row['commit']}\n")
    print("| op | ms | of the step | GFLOP | GFLOP/s | of peak |")
    print("|---|---:|---:|---:|---:|---:|")
    times = sorted(row["by_op"].items(), key=lambda op: -op[1])
    small = [seconds for _, seconds in times if seconds < LEAST * step]
    for op, seconds in times[: len(times) - len(small)] + [(f"{len(small)} others", sum(small))]:
        speed = works[op] / seconds if op in works else None
        cells = [f"{works[op]:.0f}", f"{speed:.0f}", f"{speed / peak:.0%}"] if speed else ["", "", ""]
        print("| " + " | ".join([op, f"{seconds * 1e3:.0f}", f"{seconds / step:.1%}", *cells]) + " |")
    done = sum(works.values())
    cells = [f"{done:.0f}", f"{done / step:.0f}", f"{done / step / peak:.0%}"] if works else ["", "", ""]
    print("| " + " | ".join(["step", f"{step * 1e3:.0f}", "100.0%", *cells]) + " |")


main(*sys.argv[1:])
