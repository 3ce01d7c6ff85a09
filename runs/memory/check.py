"""Trains `mini` for two steps with each setting of recompute and compares the largest resident set with the prediction.

    python check.py HADAL DIR

HADAL is the program, DIR an empty directory. Exits with 1 if a prediction is off by over 10 %.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ALLOWED = 0.1
STATE = ("masters", "compute_weights", "gradients", "moments")


def predicted(hadal: str, recompute: str) -> dict:
    args = ["inspect", "mini", "--batch", "8", "--seq", "512", "--dtype", "bf16", "--recompute", recompute, "--json"]
    return json.loads(subprocess.run([hadal, *args], check=True, capture_output=True).stdout)["training_memory"]


def prepare(hadal: str, out: Path) -> Path:
    """A tokenizer of the size of `mini`: training one takes memory too, which the allocator would not give back."""
    run = out / "prepared"
    subprocess.run([hadal, "pretrain", "--preset", "nano", "--set", "model.vocab_size=8192", "--steps", "1", "--batch",
                    "1", "--seq", "8", "--no-demo", "--set", "train.eval_tokens=8", "--out", str(run)],
                   check=True, capture_output=True)
    return run / "data"


def held(hadal: str, recompute: str, data: Path, out: Path) -> int:
    """Bytes of the largest resident set of a run."""
    args = [hadal, "pretrain", "--preset", "mini", "--batch", "8", "--seq", "512", "--steps", "2", "--no-demo",
            "--tokenizer", str(data / "tokenizer.json"), "--out", str(out)]
    sets = {"data.cache": data, "train.dtype": "bf16", "train.recompute": recompute, "train.save_beside": "false",
            "train.eval_tokens": 512, "train.eval_every": 2, "train.checkpoint_every": 2}
    args += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    run = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(run.pid, 0)
    if status != 0:
        sys.exit(f"the run ended with status {status}: {' '.join(args)}")
    shutil.rmtree(out)
    return usage.ru_maxrss * 1024


def main() -> int:
    hadal, out = sys.argv[1], Path(sys.argv[2])
    worst = 0.0
    data = prepare(hadal, out)
    for recompute in ("none", "paper", "all"):
        said, found = predicted(hadal, recompute), held(hadal, recompute, data, out / recompute)
        state = sum(said[part] for part in STATE)
        off = (said["total"] - found) / (found - state)
        worst = max(worst, abs(off))
        print(json.dumps({
            "recompute": recompute, "predicted": said["total"], "held": found, "state": state,
            "predicted_beside_state": said["total"] - state, "held_beside_state": found - state, "off": round(off, 4),
        }), flush=True)
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
