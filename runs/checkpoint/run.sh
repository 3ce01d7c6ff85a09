#!/usr/bin/env bash
# A checkpoint opens in transformers as it is: weights, config, tokenizer; and gives the same logits there.
#   runs/checkpoint/run.sh [PYTHON]        PYTHON: one with torch and transformers
# Trains `nano` for 20 steps on the built-in corpus. Exits non-zero on a difference; records what it prints in
# runs/checkpoint/output.txt if there is none.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --quiet
hadal=${CARGO_TARGET_DIR:-target}/release/hadal
text='Ada counts: 17 + 25 = 42. 你好，世界！ def f(x): return x'
"$hadal" pretrain --preset nano --steps 20 --out "$out/run" --json > "$out/log" 2>/dev/null
ids=$("$python" -c 'import sys, tokenizers; print(*tokenizers.Tokenizer.from_file(sys.argv[1]).encode(sys.argv[2]).ids, sep=",")' \
  "$out/run/latest/tokenizer.json" "$text")
"$hadal" logits "$out/run" --tokens "$ids" --out "$out/logits.safetensors" --dtype fp32 > /dev/null
{
  echo "commit $(git rev-parse --short HEAD)"
  "$python" runs/checkpoint/check.py "$out/run/latest" "$out/logits.safetensors" "$ids" "$text"
} | tee "$out/output.txt"
mv "$out/output.txt" runs/checkpoint/output.txt
