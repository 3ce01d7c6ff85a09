#!/usr/bin/env bash
# Runs hadal's suite on this machine's GPU and writes report.txt beside itself; exits non-zero if anything failed.
# Needs the GPU's driver, NVRTC and cuBLASLt. `run.sh NAME ...` runs some of the parts alone.
set -uo pipefail
cd "$(dirname "$0")"
export HADAL_GOLDENS=$PWD/goldens
export HADAL_CACHE=${HADAL_CACHE:-$PWD/cache}
parts=("$@")
[ ${#parts[@]} = 0 ] && parts=(kernels train golden memcheck racecheck)
log=$(mktemp)
: > report.txt
say() { echo "$*" | tee -a report.txt; }

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1)
say "gpu: ${gpu:-none that nvidia-smi knows}"
say "date: $(date -u +%Y-%m-%d)"
say "commit: @COMMIT@"

# The sanitizer wherever the toolkit put it.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2> /dev/null | head -n 1)
# One suite on small shapes under one of its tools. Out-of-order copies make racecheck slow: few tests.
sanitize() {
  local tool=$1
  shift
  if [ -z "$sanitizer" ]; then
    echo "skipped: $tool: no compute-sanitizer on this machine"
    return 0
  fi
  timeout "${HADAL_SANITIZE_SECONDS:-240}" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "$@"
  local status=$?
  [ $status = 124 ] && { echo "skipped: $tool: not done within its time"; return 0; }
  return $status
}

failed=0
for part in "${parts[@]}"; do
  begin=$SECONDS
  case $part in
    kernels | train | golden) ./bin/$part --test-threads "${HADAL_TEST_THREADS:-4}" ;;
    memcheck) sanitize memcheck ./bin/kernels --test-threads 1 small_shapes ;;
    racecheck) sanitize racecheck ./bin/kernels --test-threads 1 small_shapes ;;
    *) echo "no part $part" && false ;;
  esac > "$log" 2>&1
  status=$?
  summary=$(grep -aE '^test result|ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tr '\n' ' ')
  say "$part: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") in $((SECONDS - begin)) s: $summary"
  grep -aoE 'skipped: .*' "$log" | sort -u | sed 's/^/  /' | tee -a report.txt
  grep -aE '^[A-Za-z0-9]+: loss .* apart$' "$log" | sed 's/^/  /' | tee -a report.txt
  if [ $status != 0 ]; then
    failed=1
    grep -aE -A4 'panicked|^========= (Invalid|Error|ERROR)' "$log" | head -n 80 | cut -c1-400 | sed 's/^/  /' | tee -a report.txt
  fi
done
exit $failed
