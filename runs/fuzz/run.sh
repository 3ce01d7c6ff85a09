#!/usr/bin/env bash
# Hostile files: random and structure-aware mutations of a checkpoint, an index, a configuration and a tokenizer, each
# loaded as the commands load it, under AddressSanitizer and with overflow checks. A crash, a panic, an input that takes
# over 60 s, an allocation of over 256 MiB and a process of over 2 GiB each end the run.
#   runs/fuzz/run.sh [INPUTS] [TARGET...]   INPUTS for each target, 1000000 if not given; TARGET: all if none is given
# Targets run side by side, each with WORKERS processes (environment; 1 if not given) that share its inputs, and each
# for at most 30 minutes, the time of its processes added up. Needs a
# nightly toolchain and cargo-fuzz (`cargo install cargo-fuzz --locked`), or BUILT, a directory with the built targets.
# Exits non-zero if a target fails, and leaves the input in fuzz/artifacts. Records what it prints in
# runs/fuzz/output.txt (RECORD, if given) if all targets were to get at least 1000000 inputs.
set -euo pipefail
cd "$(dirname "$0")/../.."
inputs=${1:-1000000}
shift || true
[ $# -gt 0 ] || set -- safetensors index config tokenizer
all=$#
workers=${WORKERS:-1}
# Targets write their input into files: in memory, where the system offers that.
if [ -z "${TMPDIR:-}" ] && [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# The sanitizer keeps freed memory for a while, to find uses of it; less of it shows what the product itself takes.
export ASAN_OPTIONS=quarantine_size_mb=32

commit=$(git rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}")
if [ -z "${BUILT:-}" ]; then
  cargo +nightly fuzz build
  BUILT=fuzz/target/$(rustc -vV | sed -n 's/^host: //p')/release
  tools="$(rustc +nightly --version), $(cargo fuzz --version)"
fi

# Longest input: about twice the largest seed.
length() {
  case $1 in config) echo 4096 ;; safetensors) echo 12288 ;; *) echo 8192 ;; esac
}

# One process of a target: its number is its seed.
worker() {
  local target=$1 n=$2 here=$out/$1-$2
  mkdir -p "$here/corpus" "fuzz/artifacts/$target"
  TMPDIR=$here "$BUILT/$target" "$here/corpus" "fuzz/seeds/$target" -runs=$(((inputs + workers - 1) / workers)) \
    -max_total_time=$((1800 / workers)) -seed="$n" -max_len="$(length "$target")" -timeout=60 -rss_limit_mb=2048 -malloc_limit_mb=256 \
    -dict="fuzz/dict/$target.dict" -artifact_prefix="fuzz/artifacts/$target/" -print_final_stats=1 \
    > "$here.log" 2>&1
}

# All processes of a target, and what they did.
run() {
  local target=$1 begin=$SECONDS pids=() failed=0
  for n in $(seq "$workers"); do
    worker "$target" "$n" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  if [ "$failed" = 1 ]; then
    tail -n 40 "$out/$target"-*.log >&2
    echo "$target: FAILED after $((SECONDS - begin)) s" >&2
    return 1
  fi
  # libFuzzer's statistics: added up, or the worst.
  sum() { sed -n "s/^stat::$1: *//p" "$out/$target"-*.log | awk '{ n += $1 } END { print n }'; }
  worst() { sed -n "s/^stat::$1: *//p" "$out/$target"-*.log | sort -n | tail -n 1; }
  echo "$target: $(sum number_of_executed_units) inputs, no crash, $((SECONDS - begin)) s of $workers processes," \
    "$(sum average_exec_per_sec) inputs/s, peak RSS $(worst peak_rss_mb) MiB," \
    "slowest input $(worst slowest_unit_time_sec) s," \
    "$(grep -ho 'cov: [0-9]*' "$out/$target"-*.log | sort -k2 -n | tail -n 1 | sed 's/cov: //') edges"
}

{
  echo "commit $commit${tools:+, $tools}; at most 30 minutes of processes a target"
  pids=()
  for target in "$@"; do
    run "$target" > "$out/$target.txt" &
    pids+=($!)
  done
  failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  for target in "$@"; do cat "$out/$target.txt"; done
  [ "$failed" = 0 ]
} | tee "$out/output.txt"
if [ "$inputs" -ge 1000000 ] && [ "$all" = 4 ]; then cp "$out/output.txt" "${RECORD:-runs/fuzz/output.txt}"; fi
