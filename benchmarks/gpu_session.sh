#!/usr/bin/env bash
# A short session on a machine with a GPU and no network: three calls, of at most 4, 3 and 3 minutes.
# usage: benchmarks/gpu_session.sh FOLDER [check|attention|rest|report ...]     (default: check attention rest report)
#   check      builds, or takes prebuilt libraries of these sources; then each family of tests in its own process
#   attention  attention against PyTorch's backends, in device time
#   rest       latent, projection and layers in device time; trains two models, if fastgen[train] is installed
# Results are lines of FOLDER/results.jsonl, each written when it is known, and FOLDER/report.md.
# PYTHON selects the interpreter; nothing is installed or downloaded. FASTGEN_PREBUILT: a folder with libraries that
# `python -m benchmarks.gpu.prebuilt FOLDER` made; default: shared/prebuilt, build/prebuilt. TORCH_CUDA_ARCH_LIST: what to
# build for, default: the device. FASTGEN_GPU_REHEARSAL=1 runs everything without a GPU, with the emulator in its place.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu_session.sh FOLDER [check|attention|rest|report ...]}" && cd "$1" && pwd)
shift
calls=("$@")
[ ${#calls[@]} -gt 0 ] || calls=(check attention rest report)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=0
for call in "${calls[@]}"; do
  echo "== $call ($SECONDS s)"
  case $call in
    check | attention | rest) $python -m "benchmarks.gpu.$call" "$out" || failed=1 ;;
    report) $python -m benchmarks.gpu.report "$out" >"$out/report.md" || failed=1 ;;
    *) echo "unknown call: $call"; exit 2 ;;
  esac
done
echo "== done ($SECONDS s), failed=$failed"
exit $failed
