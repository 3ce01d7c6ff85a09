#!/usr/bin/env bash
# How close the model is to transformers on the golden models: the golden tests with what they print.
#   runs/goldens/run.sh
# Exits non-zero if one fails; records what they print in runs/goldens/output.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(mktemp)
trap 'rm -f "$out"' EXIT
{
  echo "commit $(git rev-parse --short HEAD)"
  cargo test -p hadal-train --test parity --quiet -- golden:: --nocapture --test-threads=1 2>/dev/null
} | tee "$out"
cp "$out" runs/goldens/output.txt
