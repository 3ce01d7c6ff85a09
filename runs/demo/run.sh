#!/usr/bin/env bash
# The README's first command on three seeds: `nano` on the built-in corpus with the default settings, and beside it byte
# n-gram models of the same text.
#   runs/demo/run.sh [SEED...]             0 1 2 if none is given
# Exits non-zero unless every run takes at most 15 minutes after the build, has every part of its report, and beats the
# better of two interpolated byte 3-grams on the whole held-out side; says whether it beats the 5-gram too. Records what
# it prints in runs/demo/output.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- 0 1 2
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --quiet
cargo build --release --quiet -p hadal-data --example ngram
built=${CARGO_TARGET_DIR:-target}/release
{
  echo "commit $(git rev-parse --short HEAD), $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)"
  for seed in "$@"; do
    echo
    echo "seed $seed"
    # The n-grams are scored on all held-out text, and so is the model.
    "$built/examples/ngram" --seed "$seed" | tee "$out/ngram"
    begin=$SECONDS
    "$built/hadal" pretrain --preset nano --seed "$seed" --set train.eval_tokens=1000000 --set train.eval_every=1000 \
      --out "$out/run" --json > "$out/log"
    python3 - "$out/log" "$out/ngram" $((SECONDS - begin)) <<'P'
import json, re, sys
result = json.loads(open(sys.argv[1]).read().splitlines()[-1])
best = {}
for line in open(sys.argv[2]):
    order, bits = re.search(r"order (\d).*: ([\d.]+) bits per byte", line).groups()
    best[order] = min(best.get(order, 9.0), float(bits))
seconds, bits = int(sys.argv[3]), result["valid_bits_per_byte"]
a, e, d, c = (result[k] for k in ("arithmetic", "experts", "acceptance", "cache"))
for sample in result["samples"]:
    text = (sample["prompt"] + sample["text"]).strip().replace("\n", " / ")
    print(f"  {sample['kind']}: {text[:300]}")
print(f"  arithmetic, unseen problems solved: {a['solved']} of {a['problems']}; "
      + ", ".join(f"{k['name']} {k['solved']}/{k['problems']}" for k in a["kinds"]))
print(f"  cache {c}")
print(f"  expert load, largest over even less 1: {[round(l['max_violation'], 2) for l in e['layers']]}")
print(f"  MTP's second token accepted: {d['rate']:.3f} of what the model wrote, {d['held_out']['accepted'] / d['held_out']['drafted']:.3f} of held-out text")
print(f"  next: {result['next']}")
print(json.dumps({"bits_per_byte": bits, "3-gram": best["3"], "5-gram": best["5"], "beats_5_gram": bits < best["5"],
                  "steps": result["steps"], "tokens": result["tokens"], "tokens_per_s": round(result["tokens_per_s"]),
                  "minutes_with_report": round(seconds / 60, 1)}))
assert bits < best["3"], "the 3-gram is better"
assert seconds <= 900, "over 15 minutes"
P
    rm -rf "$out/run"
  done
} 2>&1 | sed -u "s#$out#OUT#g" | tee "$out/output.txt"
mv "$out/output.txt" runs/demo/output.txt
