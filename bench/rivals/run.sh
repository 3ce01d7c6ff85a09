#!/usr/bin/env bash
# hadal beside its rivals, in turns on this machine.
#   bench/rivals/run.sh PYTHON [--isa avx2|avx512] [gemm|attention|train] [options of pairs.py]
#   bench/rivals/run.sh PYTHON gemm-f32 [options of pairs.py]
#   bench/rivals/run.sh PYTHON gemm|grouped_gemm|attention|train --device cuda [options of pairs.py]
# PYTHON: one with bench/rivals/requirements.txt. --isa restricts both sides to that instruction set (avx512: no AMX).
# gemm-f32 is FP32 products beside the crate gemm and needs no more than Python; --isa does not reach that crate.
# Without a kind gemm, attention and train are run. --record appends the rows to bench/record/<machine>/<date>.jsonl.
# Exits non-zero if a side fails, or if both did not train alike.
set -euo pipefail
python=${1:?a Python with bench/rivals/requirements.txt}
case $python in */*) python=$(realpath --no-symlinks "$python") ;; esac
shift
cd "$(dirname "$0")/../.."
isa=
if [ "${1:-}" = --isa ]; then
  isa=${2:-}
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
  gemm | gemm-f32 | grouped_gemm | attention | train) kinds=("$1"); shift ;;
  '' | -*) ;;
  *) echo "error: $1: expected gemm, gemm-f32, grouped_gemm, attention or train" >&2; exit 2 ;;
esac
if [ "${kinds[0]}" = gemm-f32 ]; then
  [ -z "$isa" ] || { echo "error: --isa $isa: has no effect on the crate gemm" >&2; exit 2; }
  cargo build --release --quiet --manifest-path bench/rivals/gemm/Cargo.toml
  set -- --crate "${CARGO_TARGET_DIR:-bench/rivals/gemm/target}/release/hadal-rival-gemm" "$@"
fi
cargo build --release --quiet
hadal=${CARGO_TARGET_DIR:-target}/release/hadal
status=0
for kind in "${kinds[@]}"; do
  "$python" bench/rivals/pairs.py "$hadal" "$kind" "$@" || status=$?
done
exit "$status"
