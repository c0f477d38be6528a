#!/usr/bin/env bash
# On a machine with a GPU and no network: build, run the CUDA tests, then the benchmarks.
# usage: benchmarks/gpu_session.sh FOLDER [build|test|bench ...]     (default: all three, in order)
# Writes into FOLDER as it goes, so that a session cut short still leaves what it found:
#   info.txt  build.log  tests.xml  tests.log  benchmarks.json  report.md
# PYTHON chooses the interpreter; its packages are used as they are, nothing is downloaded.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu_session.sh FOLDER [build|test|bench ...]}" && cd "$1" && pwd)
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test bench)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}
capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
failed=0

for stage in "${stages[@]}"; do
  echo "== $stage ($SECONDS s)"
  case $stage in
    build)
      FASTGEN_BUILD=cuda $python setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 30 "$out/build.log"; exit 1; }
      $python -m fastgen info | tee "$out/info.txt"
      ;;
    test)
      $python -m pytest tests -q -m "not slow" -k "cuda or contracts" --deselect tests/test_packaging.py \
        --junitxml="$out/tests.xml" >"$out/tests.log" 2>&1 || failed=1
      tail -n 40 "$out/tests.log"
      ;;
    bench)
      $python -m pytest benchmarks/bench_*.py -q -k cuda --benchmark-only \
        --benchmark-json="$out/benchmarks.json" >"$out/benchmarks.log" 2>&1 || failed=1
      $python benchmarks/report.py "$out/benchmarks.json" | tee "$out/report.md"
      ;;
    *) echo "unknown stage: $stage"; exit 2 ;;
  esac
done
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || true
echo "== done ($SECONDS s), failed=$failed"
exit $failed
