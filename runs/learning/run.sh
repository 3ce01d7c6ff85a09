#!/usr/bin/env bash
# Learning, side by side with transformers: `nano` for 200 steps from the same weights on the same tokens in fp32.
#   runs/learning/run.sh FILE [PYTHON]     FILE: a text, e.g. tinyshakespeare; PYTHON: one with torch and transformers
# Exits non-zero if a 20-step mean differs by over 0.5 %; records what it prints in runs/learning/output.txt if none does.
set -euo pipefail
file=$(realpath "$1")
python=${2:-python3}
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --quiet
{
  echo "file $(basename "$file"), sha256 $(sha256sum "$file" | cut -d' ' -f1)"
  echo "commit $(git rev-parse --short HEAD)"
  "${CARGO_TARGET_DIR:-target}/release/hadal" pretrain --config runs/learning/nano.toml --data "$file" --out "$out/run" \
    --record-batches "$out/batches.safetensors" | grep -E 'parameters;|held out [0-9]'
  "$python" runs/learning/compare.py "$out/run" "$out/batches.safetensors"
} | tee "$out/output.txt"
mv "$out/output.txt" runs/learning/output.txt
