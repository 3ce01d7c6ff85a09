#!/usr/bin/env bash
# A disk that fills during a save, on a small ext4 of its own: the run stops with one line that names the file, what is
# on the disk is whole, the last checkpoint loads, and with room again the run goes on to the same bits.
#   runs/full-disk/run.sh                  needs root (to mount), mkfs.ext4 and loop devices
# Exits non-zero if anything else happens; records what it prints in runs/full-disk/output.txt if nothing does.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "needs root, to mount a file system of its own" >&2; exit 1; }
cargo build --release --quiet
hadal=$(realpath "${CARGO_TARGET_DIR:-target}/release/hadal")
tmp=$(mktemp -d)
trap 'umount "$tmp/disk" 2>/dev/null || true; rm -rf "$tmp"' EXIT

cat > "$tmp/run.toml" <<'TOML'
[model]
preset = "nano"
vocab_size = 512
hidden_size = 64
intermediate_size = 128
moe_intermediate_size = 64
num_hidden_layers = 3
q_lora_rank = 32
kv_lora_rank = 32

[train]
steps = 40
batch = 4
seq = 64
eval_every = 20
eval_tokens = 512
checkpoint_every = 5
keep_last = 100
TOML
pretrain() { "$hadal" pretrain --config "$tmp/run.toml" --out "$1" --resume --no-demo; }
# Numbers of every step but times.
curve() { sed -E 's/"(seconds|tokens_per_s)":[^,}]*,?//g' "$1/metrics.jsonl"; }

{
  echo "commit $(git rev-parse --short HEAD)"
  pretrain "$tmp/alone" > /dev/null 2>&1
  size=$(du -sk --apparent-size "$tmp/alone/latest/" | cut -f1)
  echo "a checkpoint has $size KiB, the run writes 8"
  truncate -s 160M "$tmp/image"
  mkfs.ext4 -q "$tmp/image"
  mkdir "$tmp/disk"
  # Room for about 1.2, 1.5, 2.1, 2.9 and 4.3 checkpoints: the disk fills in different places of a save.
  for tenths in 12 15 21 29 43; do
    mount -o loop "$tmp/image" "$tmp/disk"
    out=$tmp/disk/run
    free=$(df -k --output=avail "$tmp/disk" | tail -1)
    # The rest of the run's files (tokenised text, metrics) are given room of their own.
    fallocate -l $(((free - size * tenths / 10 - 4096) * 1024)) "$tmp/disk/filler"
    code=0
    pretrain "$out" > "$tmp/log" 2> "$tmp/error" || code=$?
    [ "$code" = 1 ] || { echo "expected exit code 1, found $code"; exit 1; }
    grep -q 'No space left on device' "$tmp/error"
    [ "$(grep -c '^error: ' "$tmp/error")" = 1 ]
    whole=$(find "$out" -maxdepth 1 -name 'step-*' | wc -l)
    for checkpoint in "$out"/step-*; do
      "$hadal" generate "$checkpoint" "Once" --max-tokens 4 > /dev/null
    done
    echo "room for $((tenths / 10)).$((tenths % 10)): $whole whole checkpoints, all load;" \
      "$(grep '^error: ' "$tmp/error" | sed "s#$tmp/##g")"
    rm "$tmp/disk/filler"
    pretrain "$out" > /dev/null 2>&1
    cmp <(curve "$out") <(curve "$tmp/alone")
    diff -r "$out/step-000040" "$tmp/alone/step-000040"
    echo "  with room again: resumed, same curve and same last checkpoint, to the bit"
    rm -r "$out"
    umount "$tmp/disk"
  done
} | tee "$tmp/output.txt"
mv "$tmp/output.txt" runs/full-disk/output.txt
