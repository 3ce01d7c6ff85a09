#!/usr/bin/env bash
# hadal beside its rivals, in turns on this machine.
#   bench/rivals/run.sh PYTHON [--isa avx2|avx512] [gemm|attention|train] [options of pairs.py]
#   bench/rivals/run.sh PYTHON gemm|grouped_gemm|attention|train --device cuda [options of pairs.py]
# PYTHON: one with bench/rivals/requirements.txt. --isa restricts both sides to that instruction set (avx512: no AMX).
# Without a kind all are run. --record appends the rows to bench/record/<machine>/<date>.jsonl.
# Exits non-zero if a side fails, or if both did not train alike.
set -euo pipefail
python=${1:?a Python with bench/rivals/requirements.txt}
case $python in */*) python=$(realpath --no-symlinks "$python") ;; esac
shift
cd "$(dirname "$0")/../.."
if [ "${1:-}" = --isa ]; then
  case ${2:-} in
    avx2) export HADAL_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ;;
    avx512)
      # All of AVX-512, BF16 and FP16 included, but no tiles. vdpbf16ps pays on AMD's CPUs alone.
      HADAL_ISA=avx512
      if grep -qm1 AuthenticAMD /proc/cpuinfo && grep -qwm1 avx512_bf16 /proc/cpuinfo; then HADAL_ISA=avx512bf16; fi
      export HADAL_ISA ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 MKL_ENABLE_INSTRUCTIONS=AVX512
      ;;
    *) echo "error: --isa ${2:-}: expected avx2 or avx512" >&2; exit 2 ;;
  esac
  shift 2
fi
kinds=(gemm attention train)
case ${1:-} in
  gemm | grouped_gemm | attention | train) kinds=("$1"); shift ;;
  '' | -*) ;;
  *) echo "error: $1: expected gemm, grouped_gemm, attention or train" >&2; exit 2 ;;
esac
cargo build --release --quiet
hadal=${CARGO_TARGET_DIR:-target}/release/hadal
status=0
for kind in "${kinds[@]}"; do
  "$python" bench/rivals/pairs.py "$hadal" "$kind" "$@" || status=1
done
exit "$status"
