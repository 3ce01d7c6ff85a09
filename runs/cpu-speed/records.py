"""Reading of `hadal bench --json`: what was trained, and its time by family of ops. Standard library only."""

import json
import re

# Families in the order in which they are stacked, by the first word of an op's name; what has none is the last.
FAMILIES = {
    "gemm": "dense products",
    "gemm_grouped": "products of experts",
    "mla_prefill": "attention",
    "head_loss": "head and loss",
    "adamw": "optimiser",
    "grad_norm": "optimiser",
}
REST = "rest"
ORDER = [*dict.fromkeys(FAMILIES.values()), REST]

CASE = re.compile(r"(?P<preset>\S+)(?P<keys>( \w+=\S+)*) (?P<batch>\d+)x(?P<seq>\d+) bf16 cpu")


def read(path):
    """Peak in GFLOP/s, and the results of training, each with preset, keys, batch and seq taken from its name."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    peak = max(row["ours"] for row in rows if row["bench"] == "peak")
    trained = [dict(row, **named(row["case"])) for row in rows if row["bench"] == "train"]
    return peak, trained


def named(case):
    # A level that HADAL_ISA names follows the name.
    found = CASE.match(case)
    if not found:
        raise SystemExit(f"{case!r}: expected the name of a case of bench train in bf16")
    keys = dict(key.split("=", 1) for key in found["keys"].split())
    return {"preset": found["preset"], "keys": keys, "batch": int(found["batch"]), "seq": int(found["seq"])}


def families(row):
    """Milliseconds for 1,000 tokens, by family."""
    tokens = row["batch"] * row["seq"]
    times = dict.fromkeys(ORDER, 0.0)
    for op, seconds in row["by_op"].items():
        times[FAMILIES.get(op.split()[0], REST)] += seconds * 1e6 / tokens
    return times
