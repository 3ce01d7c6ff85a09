#!/usr/bin/env bash
# Speed of training by op, and how it changes with context, experts and batch: `mini` in bf16.
#   runs/cpu-speed/run.sh [STEPS [PRESET [OUT]]]       default: 4 steps a point (the first is not timed) of mini
# Writes OUT/runs/cpu-speed/output.jsonl (results of `bench peak` and `bench train`), by-op.md beside it, and
# OUT/docs/pictures/cpu-*.svg; OUT is the repository unless given. The variable HADAL names a binary that is there already.
# Takes 3 to 4 minutes on two cores; nothing else should run meanwhile. Exits non-zero if a measurement fails.
set -euo pipefail
steps=${1:-4}
preset=${2:-mini}
cd "$(dirname "$0")/../.."
out=${3:-.}
if [ -z "${HADAL:-}" ]; then
  cargo build --release --quiet
  HADAL=${CARGO_TARGET_DIR:-target}/release/hadal
fi
new=$(mktemp)
trap 'rm -f "$new"' EXIT

train() { # BATCH SEQ [KEY=VALUE]
  "$HADAL" bench train --preset "$preset" --batch "$1" --seq "$2" --dtype bf16 --steps "$steps" --by-op --json \
    ${3:+--set "$3"} | tee -a "$new" | sed -nE 's/.*"bench":"train",.*"case":"([^"]*)".*"ours":([0-9]*).*/\1: \2 tokens\/s/p'
}

"$HADAL" bench peak --seconds 0.2 --json >> "$new"
# In all three curves.
train 8 512
# Context, at 4,096 tokens a step.
train 32 128
train 16 256
train 4 1024
# Beyond the preset's positions; RoPE's angles, and so its cost, need no more than that.
train 2 2048 model.max_position_embeddings=2048
# Routed experts, of which each token has four whatever their number.
for experts in 8 16 32 64; do
  train 8 512 "model.n_routed_experts=$experts"
done
# Sequences a step.
for batch in 1 2 4 16; do
  train "$batch" 512
done

mkdir -p "$out/runs/cpu-speed" "$out/docs/pictures"
mv "$new" "$out/runs/cpu-speed/output.jsonl"
chmod 644 "$out/runs/cpu-speed/output.jsonl"
python3 runs/cpu-speed/table.py "$out/runs/cpu-speed/output.jsonl" > "$out/runs/cpu-speed/by-op.md"
python3 runs/cpu-speed/plot.py "$out/runs/cpu-speed/output.jsonl" "$out/docs/pictures"
