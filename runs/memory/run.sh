#!/usr/bin/env bash
# What `hadal inspect` predicts that training holds at most, beside what a run of `mini`, 8 x 512 tokens in bf16, held:
# the largest resident set of the process, from start to checkpoint, for each setting of recompute.
#   runs/memory/run.sh [PYTHON]
# Exits non-zero if a prediction is off by over 10 % of what was held beside parameters, gradients and optimiser state;
# records what it prints in runs/memory/output.txt if none is.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --release --quiet
{
  echo "commit $(git rev-parse --short HEAD)"
  "$python" runs/memory/check.py "${CARGO_TARGET_DIR:-target}/release/hadal" "$out"
} | tee "$out/output.txt"
mv "$out/output.txt" runs/memory/output.txt
