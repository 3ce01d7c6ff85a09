#!/usr/bin/env bash
# `hadal convert` against torch and transformers, and a 671B checkpoint in less than 1 GB of memory.
#   runs/formats/run.sh [PYTHON]        PYTHON: one with torch, transformers, safetensors and numpy
# Exits non-zero on a difference; records what it prints in runs/formats/output.txt if there is none. HADAL names another
# binary than the release build. The 671B checkpoint is a sparse file: it needs a file system with holes (ext4, xfs,
# btrfs) in TMPDIR and some 100 MB there; the rest needs 7 GB.
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
if [ -z "${HADAL:-}" ]; then
  cargo build --release --quiet
fi
hadal=$(realpath "${HADAL:-${CARGO_TARGET_DIR:-target}/release/hadal}")
check() { "$python" runs/formats/check.py "$@"; }
convert() { "$hadal" convert "$@" > /dev/null; }
main() {
  echo "commit $(git rev-parse --short HEAD)"
  # A trained model, into FP8 and back.
  "$hadal" pretrain --preset nano --steps 5 --dtype fp32 --out "$out/run" --json > "$out/log" 2>&1
  for scales in fp32 ue8m0; do
    convert "$out/run" "$out/fp8-$scales" --dtype fp8 --scale-fmt $scales
    convert "$out/fp8-$scales" "$out/wide-$scales" --dtype fp32
    check quantised "$out/run/latest" "$out/fp8-$scales" "$out/wide-$scales" $scales
  done
  # Checkpoints that transformers wrote: experts one by one in shards, and fused.
  check make "$out/hf" 2> "$out/log"
  convert "$out/hf/bf16" "$out/bf16" --dtype bf16
  check same "$out/hf/bf16" "$out/bf16"
  check opens "$out/hf/bf16" "$out/bf16" 2> "$out/log"
  convert "$out/hf/bf16-fused" "$out/bf16-fused" --dtype bf16
  check same "$out/hf/bf16-fused" "$out/bf16-fused"
  check opens "$out/hf/bf16-fused" "$out/bf16-fused" 2> "$out/log"
  convert "$out/hf/f32" "$out/f32" --dtype fp32
  check same "$out/hf/f32" "$out/f32"
  check opens "$out/hf/f32" "$out/f32" 2> "$out/log"
  convert "$out/hf/f32" "$out/f32-bf16" --dtype bf16 --shard-size 1MB
  check same "$out/hf/f32" "$out/f32-bf16" bfloat16
  convert "$out/hf/fp8-fused" "$out/wide-fused" --dtype fp32
  check widened "$out/hf/fp8-fused" "$out/wide-fused"
  check dense "$hadal" "$out/dense"
  rm -r "$out/dense"
  # All of V3.
  for form in each fused; do
    check sparse-make "$out/v3" $form
    check sparse-run "$hadal" "$out/v3" "$out/v3-bf16" $form
    rm -r "$out/v3" "$out/v3-bf16"
  done
}
main | tee "$out/output.txt"
mv "$out/output.txt" runs/formats/output.txt
