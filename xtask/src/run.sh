#!/usr/bin/env bash
# Runs hadal's suite on this machine's GPU and writes report.txt beside itself; exits non-zero if anything failed.
# Needs the GPU's driver, NVRTC and cuBLASLt. `run.sh NAME ...` runs some of the parts alone.
set -uo pipefail
cd "$(dirname "$0")"
export HADAL_GOLDENS=$PWD/goldens
export HADAL_CACHE=${HADAL_CACHE:-$PWD/cache}
# Kernels are compiled for every architecture, not only for this machine's.
export HADAL_TEST_ARCHS=${HADAL_TEST_ARCHS:-all}
parts=("$@")
[ ${#parts[@]} = 0 ] && parts=(kernels engine train golden steps cache memcheck racecheck)
log=$(mktemp)
: > report.txt
say() { echo "$*" | tee -a report.txt; }

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1)
say "gpu: ${gpu:-none that nvidia-smi knows}"
say "date: $(date -u +%Y-%m-%d)"
say "commit: @COMMIT@"

# The sanitizer wherever the toolkit put it.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
# The suite on small shapes under one of its tools, each test in a process of its own: racecheck takes its time.
sanitize() {
  local tool=$1 tests folder test status failed=0
  if [ -z "$sanitizer" ]; then
    echo "skipped: $tool: no compute-sanitizer on this machine"
    return 0
  fi
  folder=$(mktemp -d)
  tests=$(./bin/kernels small_shapes --list | sed -n 's/: test$//p')
  [ -n "$tests" ] || { echo "broken: no tests on small shapes" && return 1; }
  export sanitizer tool folder
  xargs -P "${HADAL_SANITIZE_JOBS:-6}" -I '{}' bash -c 'timeout "${HADAL_SANITIZE_SECONDS:-240}" "$sanitizer" --tool "$tool" \
    --error-exitcode 9 --print-limit 20 ./bin/kernels --exact "{}" > "$folder/{}" 2>&1; echo $? > "$folder/{}.status"' <<< "$tests"
  for test in $tests; do
    status=$(< "$folder/$test.status")
    # What was found before the time was over counts.
    if [ "$status" = 124 ] && ! grep -qaE '^========= .*(Invalid|Race reported|hazard)' "$folder/$test"; then
      echo "skipped: $tool: no finding in $test when its time was over"
    elif [ "$status" != 0 ]; then
      failed=1
      echo "broken: $test ($status)"
      cat "$folder/$test"
    fi
  done
  echo "$tool SUMMARY: $(cat "$folder"/*.status | grep -cx 0) of $(wc -l <<< "$tests") tests without a finding"
  rm -r "$folder"
  return $failed
}

# A few kernels with a cache that cannot be made, an empty one, a damaged one: they run, and the user is told what matters.
cache() {
  local folder said file
  folder=$(mktemp -d)
  few() { HADAL_CACHE=$1 ./bin/hadal bench memory_ops --device cuda --case nano --repeats 1 --seconds 0 2>&1 > "$folder/out"; }
  said=$(few /dev/null) || { echo "broken: without a cache: $said" && return 1; }
  [ "$(grep -c 'compiled kernels are not kept for the next run: ' <<< "$said")" = 1 ] || { echo "broken: said: $said" && return 1; }
  said=$(few "$folder/cache") && [ -z "$said" ] || { echo "broken: with an empty cache: $said" && return 1; }
  (cd "$folder/cache/kernels" && sha256sum -- *) > "$folder/sums"
  [ -s "$folder/sums" ] || { echo "broken: nothing was kept" && return 1; }
  for file in "$folder"/cache/kernels/*; do
    truncate -s -1 "$file"
  done
  said=$(few "$folder/cache") && [ -z "$said" ] || { echo "broken: with a damaged cache: $said" && return 1; }
  (cd "$folder/cache/kernels" && sha256sum --quiet -c "$folder/sums") || { echo "broken: what was damaged was not mended" && return 1; }
  rm -r "$folder"
}

# What a bench says of a real step: the host waited for none, and all were replayed.
steps() {
  local row
  row=$(./bin/hadal bench train --preset nano --batch 2 --seq 64 --steps 12 --device cuda --json | tail -n 1)
  echo "row: $row"
  [[ $row == *'"host_waits":0.0,'*'"graph_replayed":true'* ]] || { echo "broken: expected no waits and all steps replayed" && return 1; }
}

failed=0
for part in "${parts[@]}"; do
  begin=$SECONDS
  case $part in
    kernels | engine) ./bin/$part --test-threads "${HADAL_TEST_THREADS:-4}" ;;
    golden) ./bin/train --test-threads "${HADAL_TEST_THREADS:-4}" golden:: ;;
    # One device at a time, as a run has it.
    train) ./bin/train --test-threads 1 --show-output cuda:: ;;
    steps) steps ;;
    cache) cache ;;
    memcheck | racecheck) sanitize "$part" ;;
    *) echo "no part $part" && false ;;
  esac > "$log" 2>&1
  status=$?
  summary=$(grep -aE '^test result: (FAILED|.* [1-9][0-9]* passed)|^[a-z]+check SUMMARY' "$log" | tr '\n' ' ')
  say "$part: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - begin)) s: $summary"
  grep -aoE 'skipped: .*' "$log" | sort -u | sed 's/^/  /' | tee -a report.txt
  grep -aE '^(Fp32|Bf16)[^:]*: loss .* apart$|^[a-z]+: [0-9]+ bytes, predicted [0-9]+$|^row: ' "$log" | sed 's/^/  /' | tee -a report.txt
  if [ $status != 0 ]; then
    failed=1
    grep -aE -A4 'panicked|^broken: |^========= (Invalid|Error|ERROR)' "$log" | head -n 80 | cut -c1-400 | sed 's/^/  /' | tee -a report.txt
  fi
done
exit $failed
