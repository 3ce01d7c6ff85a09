"""Kills a run fifty times and compares it with one that was never killed.

usage: kill.py HADAL [KILLS]

A small model of the same architecture trains with a checkpoint every second step. The victim is killed with SIGKILL at
a delay after one of its steps that is uniform over the time of a step, and resumed, until it has been killed often
enough; then it may finish. After every kill each entry of its directory must be a whole checkpoint, a file of the
run, or something whose name begins with a dot. In the end every number of every step (times aside) and every byte of
the last checkpoint must equal those of the run that was left alone. Needs nothing but Python's standard library.
"""

import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SETTINGS = """
[model]
preset = "nano"
vocab_size = 512
hidden_size = 64
intermediate_size = 128
moe_intermediate_size = 64
num_hidden_layers = 3
q_lora_rank = 32
kv_lora_rank = 32

[train]
steps = 240
batch = 4
seq = 64
eval_every = 10
eval_tokens = 512
checkpoint_every = 2
keep_last = 2
ema_decay = 0.9
"""
SKIP = {"seconds", "tokens_per_s"}
FILES = {"run.toml", "metrics.jsonl", "data", "latest", "best"}


def command(hadal, settings, out):
    return [hadal, "pretrain", "--config", settings, "--out", out, "--resume", "--json", "--no-demo"]


def curve(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    # Numbers stay text, so that nothing is rounded on the way.
    steps = [json.loads(line, parse_float=str) for line in lines]
    return [{k: v for k, v in step.items() if k not in SKIP} for step in steps]


def whole(checkpoint):
    """Every file that state.json lists is there with its size, and no other."""
    state = json.loads((checkpoint / "state" / "state.json").read_text())
    found = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    found.pop("state/state.json")
    assert found == {name: stamp["bytes"] for name, stamp in state["files"].items()}, checkpoint


def look(out):
    """Checks what a kill left; returns (checkpoints, hidden leftovers)."""
    whole_ones, hidden = 0, 0
    for entry in out.iterdir():
        if entry.name.startswith("."):
            hidden += entry.name != ".lock"
        elif entry.name.startswith("step-"):
            whole(entry)
            whole_ones += 1
        else:
            assert entry.name in FILES, f"{entry}: neither a checkpoint nor a file of a run"
    return whole_ones, hidden


def start(args):
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_until_killed(args, after, delay):
    """Kills the run `delay` seconds after its step number `after` of this life; returns the steps it made."""
    process = start(args)
    steps = 0
    for line in process.stdout:
        if "loss_main" not in json.loads(line):
            continue
        steps += 1
        if steps == after:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
    rest = process.stdout.read()
    error = process.stderr.read()
    code = process.wait()
    assert code in (0, -signal.SIGKILL), error
    return steps + rest.count('"loss_main"'), code


def main():
    hadal, kills = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50
    random.seed(3)
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        settings = root / "run.toml"
        settings.write_text(SETTINGS)
        alone, victim = root / "alone", root / "victim"
        begin = time.time()
        subprocess.run(command(hadal, settings, alone), check=True, stdout=subprocess.DEVNULL)
        steps = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
        step = statistics.median(s["seconds"] for s in steps)
        print(f"alone: {len(steps)} steps, median {step * 1000:.0f} ms, {time.time() - begin:.1f} s in all")

        killed = hidden_seen = 0
        while killed < kills:
            after = random.randint(1, 4)
            made, code = run_until_killed(command(hadal, settings, victim), after, random.uniform(0, step))
            assert code != 0, "finished before it was killed often enough: give it more steps"
            killed += 1
            whole_ones, hidden = look(victim)
            hidden_seen += hidden > 0
            done = max((int(p.name[5:]) for p in victim.glob("step-*")), default=0)
            print(f"kill {killed:2}: {made} steps made, newest checkpoint {done}, {whole_ones} whole, {hidden} unfinished")
        subprocess.run(command(hadal, settings, victim), check=True, stdout=subprocess.DEVNULL)

        assert curve(victim) == curve(alone), "the curves differ"
        last = sorted(p.name for p in alone.glob("step-*"))
        assert last == sorted(p.name for p in victim.glob("step-*"))
        files = [p.relative_to(alone) for name in last for p in (alone / name).rglob("*") if p.is_file()]
        for name in files:
            assert (alone / name).read_bytes() == (victim / name).read_bytes(), name
        print(f"killed {killed} times, {hidden_seen} times in the middle of writing a checkpoint")
        print(f"equal to the bit: {len(steps)} steps of metrics, {len(files)} files of {len(last)} checkpoints")


main()
