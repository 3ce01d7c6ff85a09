#!/usr/bin/env bash
# A run that is killed fifty times, and one whose every file operation fails in turn, equal one that was left alone.
#   runs/survive/run.sh [PYTHON]           PYTHON: any Python 3
# Exits non-zero on a difference; records what it prints in runs/survive/output.txt if there is none.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/../.."
cargo build --release --quiet
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{
  echo "commit $(git rev-parse --short HEAD)"
  echo
  echo "Killed with SIGKILL:"
  "$python" runs/survive/kill.py "$(realpath "${CARGO_TARGET_DIR:-target}/release/hadal")"
  echo
  echo "A fault at every file operation (crates/train/tests/survive.rs):"
  cargo test --quiet --release -p hadal-train --test survive -- --nocapture --test-threads 1 2>&1 | grep -oE '(survive: |test result: ).*'
} | tee "$log"
mv "$log" runs/survive/output.txt
