"""Runs hadal and its rivals in turns on this machine (ours, rival, ours, ...), and prints one JSON object a case in the form
of `hadal bench --json`, with the rival filled in. Begun by run.sh, which builds hadal and restricts instruction sets.

    python pairs.py HADAL gemm|attention|grouped_gemm [--case SUBSTRING] [--pairs 5] [--seconds 0.5] [--device cpu|cuda]
    python pairs.py HADAL gemm-f32 --crate PROGRAM [--case SUBSTRING] [--pairs 5] [--seconds 0.5] [--clock wall|cpu]
    python pairs.py HADAL train [--preset mini] [--batch 8] [--seq 512] [--dtype bf16] [--steps 20] [--pairs 1]
                                [--recompute none] [--settings eager/bf16/grouped_mm,...] [--scan-steps 4]
                                [--turn-steps 3] [--device cpu|cuda]

gemm-f32 is FP32 products beside the crate gemm, both in one program (gemm/), which is started as often as there are pairs; it
needs no torch. grouped_gemm is for GPUs alone. There hadal runs all cases in one process and torch after it, as often as there are pairs:
opening a GPU takes longer than measuring.
On a CPU a pair of training runs goes in turns, since hosts that are shared swing by a factor of two within seconds: before each
step of the rival but its first, hadal runs the first few steps in a process of its own, of which all but the first count. A row
has the medians of all turns and of their ratios. Losses and memory are of runs of all steps.
Every setting of a rival, where there are several, is run once beside ours and recorded; the fastest is the rival, and runs in
as many pairs as asked for ("best": true). A training row whose losses differ from ours by over 0.5 % in the first step or 1 % on average is void,
and the exit code then 1.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SETTINGS = ["/".join(s) for s in itertools.product(
    ("eager", "compiled"), ("bf16", "fp32"), ("grouped_mm", "batched_mm", "eager"))]
# Threads of torch spin for a moment after their work.
PAUSE = 0.3


class Failed(Exception):
    pass


class Arguments(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def count(least: int):
    """A whole number that is not below `least`."""
    def count(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, found {text}")
        return int(text)
    return count


def lines(command: list[str]) -> list[dict]:
    time.sleep(PAUSE)
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        raise Failed(f"{command[0]}: cannot be started: {e.strerror}") from e
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(last.removeprefix("error: "))
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def put(row: dict, record: bool) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if record:
        folder = Path("bench/record") / row["machine"]
        folder.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.timezone.utc).date()
        with open(folder / f"{date}.jsonl", "a") as file:
            file.write(line + "\n")


def paired(ours: list[dict], name: str, theirs: list[float], best: bool) -> dict:
    """One row out of pairs: medians of both sides and of the pairs' ratios, and the least and largest of these."""
    found = [row["ours"] for row in ours]
    ratios = [a / b for a, b in zip(found, theirs)]
    row = dict(ours[0])
    row["ours"], row["rival"] = statistics.median(found), statistics.median(theirs)
    row["rival_name"], row["ratio"] = name, statistics.median(ratios)
    if row["share_of_peak"] is not None:
        row["share_of_peak"] = statistics.median(r["share_of_peak"] for r in ours)
    row["spread"], row["rival_spread"] = [min(found), max(found)], [min(theirs), max(theirs)]
    row["ratio_spread"], row["pairs"], row["best"] = [min(ratios), max(ratios)], len(ours), best
    return row


def kernels(args) -> bool:
    """Products or attention: torch in this process, hadal in one of its own."""
    import torch
    rival.threads(args.threads)
    base = [args.hadal, "bench", args.kind, "--json"]
    chosen = ["--case", args.case] if args.case is not None else []
    of = f"torch {torch.__version__.split('+')[0]}"
    settings, make = {"gemm": (rival.gemm_settings, rival.gemm),
                      "attention": (rival.attention_settings, rival.attention)}[args.kind]
    for case in lines([*base, "--list", *chosen]):
        run = [*base, "--case", case["case"], "--seconds", str(args.seconds), *threads(args)]

        def pair(work):
            ours = lines(run)[-1]
            return ours, case["work"] / rival.measure(work, args.seconds, 5) / 1e9

        tried, names = {}, settings(case)
        for setting in names if len(names) > 1 else []:
            ours, tried[setting] = pair(make(case, setting))
            put(paired([ours], f"{of} {setting}", [tried[setting]], False), args.record)
        setting = max(names, key=lambda name: tried.get(name, 0.0))
        work = make(case, setting)
        ours, theirs = zip(*(pair(work) for _ in range(args.pairs)))
        put(paired(list(ours), f"{of} {setting}", list(theirs), True), args.record)
    return True


def kernels_on_gpu(args) -> bool:
    """Products, experts' products or attention: hadal over all cases, then torch over all of them, in turns."""
    import torch
    command = [args.hadal, "bench", args.kind, "--json", "--device", "cuda"]
    command += ["--case", args.case] if args.case is not None else []
    of = f"torch {torch.__version__.split('+')[0]}"
    settings, make = {"gemm": (rival.gemm_settings, rival.gemm),
                      "grouped_gemm": (rival.grouped_gemm_settings, rival.grouped_gemm),
                      "attention": (rival.attention_settings, rival.attention)}[args.kind]
    cases = {case["case"]: case for case in lines([*command, "--list"])}
    ours, theirs = {name: [] for name in cases}, {name: {} for name in cases}
    for _ in range(args.pairs):
        for row in lines([*command, "--seconds", str(args.seconds)]):
            ours[row["case"]].append(row)
        for name, case in cases.items():
            for setting in settings(case, "cuda"):
                try:
                    seconds = rival.measure(make(case, setting, "cuda"), args.seconds, 5, "cuda")
                except Exception as e:
                    print(f"{name}, {setting}: {str(e).splitlines()[0]}", file=sys.stderr)
                    continue
                theirs[name].setdefault(setting, []).append(case["work"] / seconds / 1e9)
            torch.cuda.empty_cache()
    for name, found in theirs.items():
        whole = {s: rates for s, rates in found.items() if len(rates) == len(ours[name])}
        best = max(whole, key=lambda s: statistics.median(whole[s]), default=None)
        for setting, rates in whole.items():
            put(paired(ours[name], f"{of} {setting}", rates, setting == best), args.record)
    return True


def beside_crate(args) -> bool:
    """FP32 products beside the crate gemm: each round is a process that has both, in turns."""
    # Of this build and machine, as hadal says it.
    here = lines([args.hadal, "bench", "peak", "--repeats", "1", "--seconds", "0", "--json"])[-1]
    command = [args.crate, "--seconds", str(args.seconds), "--clock", args.clock, *threads(args)]
    command += ["--case", args.case] if args.case is not None else []
    for rows in zip(*[lines(command) for _ in range(args.pairs)]):
        ours = [dict(row, commit=here["commit"], machine=here["machine"]) for row in rows]
        put(paired(ours, rows[0]["rival_name"], [row["rival"] for row in rows], True), args.record)
    return True


def threads(args) -> list[str]:
    return ["--threads", str(args.threads)] if args.threads else []


def close(ours: dict, theirs: dict) -> bool:
    def off(key):
        return abs(ours[key] - theirs[key]) / theirs[key]
    return off("first_loss") <= 0.005 and off("mean_loss") <= 0.01


class Training:
    """Runs of both sides on one export."""

    def __init__(self, args, directory: str):
        self.args, self.directory = args, directory

    def ours(self, steps: int) -> dict:
        command = [self.args.hadal, "bench", "train", "--json", "--from", self.directory, "--device", self.args.device]
        command += ["--dtype", self.args.dtype, "--recompute", self.args.recompute]
        return lines([*command, "--steps", str(steps), *threads(self.args)])[-1]

    def command(self, setting: str, steps: int) -> list[str]:
        mode, dtype, experts = setting.split("/")
        command = [sys.executable, rival.__file__, self.directory, "--dtype", dtype, "--experts", experts]
        command += ["--compile"] if mode == "compiled" else []
        command += ["--device", self.args.device]
        return [*command, "--steps", str(steps), *threads(self.args)]

    def theirs(self, setting: str, steps: int) -> dict:
        return lines(self.command(setting, steps))[-1]

    def pair(self, setting: str, steps: int) -> "Pair":
        ours = self.ours(steps)
        if self.args.device == "cuda":
            theirs = self.theirs(setting, steps)
            return Pair(ours, theirs, [(ours, theirs["tokens_per_s"])])
        ours_now, turns, said = None, [], {}
        with tempfile.TemporaryFile("w+") as messages:
            with subprocess.Popen([*self.command(setting, steps), "--paced"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=messages, text=True) as theirs:
                # Each step, the first of which compiles and pairs with nothing, and then the result.
                for said in (json.loads(line) for line in theirs.stdout if line.startswith("{")):
                    if ours_now is not None and "step" in said:
                        turns.append((ours_now, said["tokens_per_s"]))
                    if said.get("step", steps) + 1 < steps:
                        time.sleep(PAUSE)
                        ours_now = self.ours(self.args.turn_steps)
                        try:
                            theirs.stdin.write("\n")
                            theirs.stdin.flush()
                        except BrokenPipeError:
                            # It has ended; what it said last tells why.
                            theirs.stdin = None
                            break
            if theirs.returncode:
                messages.seek(0)
                raise Failed((messages.read().strip().splitlines() or ["no message"])[-1])
        return Pair(ours, said, turns)

    def row(self, setting: str, pairs: list["Pair"], best: bool) -> dict:
        theirs = [p.theirs for p in pairs]
        of = f"transformers {theirs[0]['transformers']}, torch {theirs[0]['torch'].split('+')[0]}, {setting}"
        ours, rates = zip(*(turn for p in pairs for turn in p.turns))
        row = paired(list(ours), of, list(rates), best)
        for key in ("first_loss", "mean_loss", "peak_bytes", "state_bytes"):
            row[key] = statistics.median(p.ours[key] for p in pairs)
            row[f"rival_{key}"] = statistics.median(t[key] for t in theirs)
        row["void"] = not all(close(p.ours, p.theirs) for p in pairs)
        return row


class Pair(NamedTuple):
    """Runs of all steps, and the turns: ours and the rival's tokens a second."""
    ours: dict
    theirs: dict
    turns: list[tuple[dict, float]]


def memory(row: dict, pairs: list[Pair], lowest: dict) -> dict:
    """The row of peak memory: ours beside the lower of the rival's eager and compiled."""
    peak = [p.ours["peak_bytes"] for p in pairs]
    row = dict(row, case=row["case"] + " peak memory", unit="bytes", ours=statistics.median(peak), share_of_peak=None,
               rival=lowest["rival_peak_bytes"], rival_name=lowest["rival_name"], spread=[min(peak), max(peak)])
    row["rival_spread"], row["pairs"] = [row["rival"], row["rival"]], len(pairs)
    row["ratio"] = row["ours"] / row["rival"]
    row["ratio_spread"] = [p / row["rival"] for p in row["spread"]]
    return row


def train(args) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        directory = f"{folder}/export"
        # Compiled once for all runs, and never by a run that was killed. Who compiled before says where.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        lines([args.hadal, "bench", "train", "--export", directory, "--preset", args.preset, "--batch", str(args.batch),
               "--seq", str(args.seq), "--steps", str(args.steps), "--json"])
        job, rows, settings = Training(args, directory), {}, args.settings.split(",")
        for setting in settings if len(settings) > 1 else []:
            try:
                pair = job.pair(setting, min(args.scan_steps, args.steps))
            except Failed as e:
                print(f"{setting}: {e}", file=sys.stderr)
                continue
            rows[setting] = job.row(setting, [pair], False)
            put(rows[setting], args.record)
        if len(settings) > 1 and not rows:
            raise Failed("no setting of the rival ran")
        best = max(rows, key=lambda s: rows[s]["rival"], default=settings[0])
        pairs = [job.pair(best, args.steps) for _ in range(args.pairs)]
        row = job.row(best, pairs, True)
        put(row, args.record)
        # The same numbers and experts, eager or compiled, whichever needs less.
        alike = [r for s, r in rows.items() if s.split("/")[1:] == best.split("/")[1:] and s != best] + [row]
        last = memory(row, pairs, min(alike, key=lambda r: r["rival_peak_bytes"]))
        put(last, args.record)
        return not any(r["void"] for r in [*rows.values(), row])


def main() -> int:
    global rival
    parser = Arguments()
    parser.add_argument("hadal")
    parser.add_argument("kind", choices=["gemm", "gemm-f32", "attention", "grouped_gemm", "train"])
    parser.add_argument("--case")
    parser.add_argument("--pairs", type=count(1))
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=count(1))
    parser.add_argument("--crate")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch", type=count(1), default=8)
    parser.add_argument("--seq", type=count(1), default=512)
    parser.add_argument("--dtype", default="bf16")
    # Of ours; the rival keeps everything that its backward needs.
    parser.add_argument("--recompute", choices=["none", "paper", "all"], default="paper")
    # Of which the first does not count.
    parser.add_argument("--steps", type=count(2), default=20)
    parser.add_argument("--scan-steps", type=count(2), default=4)
    parser.add_argument("--turn-steps", type=count(2), default=3)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    args = parser.parse_args()
    args.pairs = args.pairs or (1 if args.kind == "train" and args.device == "cpu" else 3 if args.kind == "train" else 5)
    on_gpu, of_crate = args.device == "cuda", args.kind == "gemm-f32"
    run = beside_crate if of_crate else train if args.kind == "train" else kernels_on_gpu if on_gpu else kernels
    if args.kind == "grouped_gemm" and not on_gpu:
        parser.error("grouped_gemm: expected --device cuda (torch has no such product on CPUs)")
    if of_crate and (on_gpu or not args.crate):
        parser.error("gemm-f32: expected --crate PROGRAM, and no --device cuda")
    if not of_crate:
        try:
            import rival
        except ModuleNotFoundError as e:
            parser.error(f"{sys.executable}: {e}: expected a Python with bench/rivals/requirements.txt")
    try:
        return 0 if run(args) else 1
    except Failed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
