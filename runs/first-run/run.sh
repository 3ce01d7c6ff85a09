#!/usr/bin/env bash
# The README's first command, timed: `nano` on the built-in corpus with the default settings.
#   runs/first-run/run.sh
# Exits non-zero unless the model learns (under 1.6 bits per byte on held-out text, from about 4); records what it prints in
# runs/first-run/output.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --quiet
{
  echo "commit $(git rev-parse --short HEAD), $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)"
  begin=$SECONDS
  target/release/hadal pretrain --preset nano --out "$out/run"
  echo "wall time after the build: $((SECONDS - begin)) s"
  python3 - "$out/run/metrics.jsonl" <<'P'
import json, statistics, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
last = lines[-1]
rate = statistics.median(m["tokens_per_s"] for m in lines)
print(json.dumps({"steps": last["step"], "tokens": last["tokens"], "median_tokens_per_s": round(rate),
                  "loss": last["loss_main"], "valid_bits_per_byte": last["valid_bits_per_byte"]}))
sys.exit(last["valid_bits_per_byte"] >= 1.6)
P
} 2>&1 | sed -u "s#$out#OUT#g" | tee "$out/output.txt"
mv "$out/output.txt" runs/first-run/output.txt
