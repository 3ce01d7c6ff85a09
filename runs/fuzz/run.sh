#!/usr/bin/env bash
# Hostile files: random and structure-aware mutations of a checkpoint, an index, a configuration and a tokenizer, each
# loaded as the commands load it, under AddressSanitizer and with overflow checks. A crash, a panic, an input that takes
# over 60 s, an allocation of over 256 MiB and a process of over 2 GiB each end the run.
#   runs/fuzz/run.sh [INPUTS] [TARGET...]   INPUTS for each target, 1000000 if not given; TARGET: all if none is given
# Needs a nightly toolchain and cargo-fuzz (`cargo install cargo-fuzz --locked`). Exits non-zero if a target fails, and
# leaves the input in fuzz/artifacts. Records what it prints in runs/fuzz/output.txt if all targets got at least 1000000
# inputs.
set -euo pipefail
cd "$(dirname "$0")/../.."
inputs=${1:-1000000}
shift || true
[ $# -gt 0 ] || set -- safetensors index config tokenizer
all=$#
# Targets write their input into files: in memory, where the system offers that.
if [ -z "${TMPDIR:-}" ] && [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export TMPDIR=$out
# The sanitizer keeps freed memory for a while, to find uses of it; less of it shows what the product itself takes.
export ASAN_OPTIONS=quarantine_size_mb=32

cargo +nightly fuzz build

# Longest input: about twice the largest seed.
length() {
  case $1 in config) echo 4096 ;; safetensors) echo 12288 ;; *) echo 8192 ;; esac
}

# One statistic of libFuzzer's.
stat() {
  sed -n "s/^stat::$1: *//p" "$out/log"
}

run() {
  local target=$1 begin=$SECONDS
  mkdir -p "$out/corpus/$target"
  if ! cargo +nightly fuzz run "$target" "$out/corpus/$target" "fuzz/seeds/$target" -- -runs="$inputs" -seed=1 \
    -max_len="$(length "$target")" -timeout=60 -rss_limit_mb=2048 -malloc_limit_mb=256 -dict="fuzz/dict/$target.dict" \
    -print_final_stats=1 > "$out/log" 2>&1; then
    tail -n 60 "$out/log" >&2
    echo "$target: FAILED after $((SECONDS - begin)) s" >&2
    return 1
  fi
  echo "$target: $(stat number_of_executed_units) inputs, no crash, $((SECONDS - begin)) s," \
    "$(stat average_exec_per_sec) inputs/s, peak RSS $(stat peak_rss_mb) MiB," \
    "slowest input $(stat slowest_unit_time_sec) s, $(coverage)"
}

# What the last line of progress says of the code reached.
coverage() {
  grep -o 'cov: [0-9]* ft: [0-9]*' "$out/log" | tail -n 1 | sed 's/cov: \(.*\) ft: \(.*\)/\1 edges, \2 features/'
}

{
  echo "commit $(git rev-parse --short HEAD), $(rustc +nightly --version), $(cargo fuzz --version)"
  for target in "$@"; do run "$target"; done
} | tee "$out/output.txt"
if [ "$inputs" -ge 1000000 ] && [ "$all" = 4 ]; then mv "$out/output.txt" runs/fuzz/output.txt; fi
